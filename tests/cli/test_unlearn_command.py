import json
import re

import numpy as np
import pytest
import torch
from cases import TEXTS, logits, write_lines
from shell import TEMPLATE, metrics, refused, run, sets
from transformers import AutoModelForCausalLM

import manifold_unlearn
from manifold_unlearn import Edit, load_model
from manifold_unlearn.cli import main
from manifold_unlearn.evaluate import answer_log_probabilities, plain


@pytest.fixture(scope="module")
def unlearned(files):
    out = files / "unlearned"
    run("unlearn", files / "model", *sets(files), "--template", TEMPLATE, "--method", "subspace",
        "--bake", "--rank", 1, "--tokens", "answer", "--max-new-tokens", 3,
        "--neutral", files / "texts.jsonl", "--out", out)  # fmt: skip
    return out


def test_unlearn_writes_edit_model_metrics_and_report(unlearned):
    assert sorted(path.name for path in unlearned.iterdir()) == [
        "edit", "metrics.json", "model", "report.html"
    ]  # fmt: skip
    found = metrics(unlearned)
    assert set(found["sets"]) == {"forget", "retain"}
    assert found["config"]["baked"] is True
    assert found["counts"] == {"forget": 5, "retain": 6}
    assert found["neutral"]["perplexity_before"] > 1


def test_the_unlearned_model_is_the_edited_one(files, unlearned):
    model, tokenizer = load_model(files / "model")
    loaded = AutoModelForCausalLM.from_pretrained(unlearned / "model").eval()
    ids = torch.tensor([tokenizer(TEXTS[0]).input_ids])
    with manifold_unlearn.intervene(model, Edit.load(unlearned / "edit")):
        wanted = logits(model, ids)
    torch.testing.assert_close(logits(loaded, ids), wanted, atol=1e-4, rtol=0)
    assert not torch.allclose(wanted, logits(model, ids), atol=0.05)


def test_the_unlearned_model_can_be_evaluated(files, unlearned, tmp_path):
    run("evaluate", unlearned / "model", *sets(files), "--template", TEMPLATE, "--no-generate",
        "--out", tmp_path)  # fmt: skip
    after = metrics(unlearned)["sets"]["forget"]["probability"]["after"]["mean"]
    found = metrics(tmp_path)["model"]["forget"]["probability"]
    assert found == pytest.approx(after, rel=1e-5)


def self_contained(page):
    """Whether a page takes nothing from anywhere else."""
    sources = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", page)
    return all(s.startswith("data:") for s in sources) and not re.search(
        r"<script|<link|<iframe|@import|url\((?!data:)", page
    )


def test_the_report_shows_the_figures_and_needs_nothing_else(unlearned):
    page = (unlearned / "report.html").read_text("utf-8")
    after = metrics(unlearned)["sets"]["forget"]["probability"]["after"]["mean"]
    assert f"{after:.4f}" in page
    assert "data:image/png;base64," in page
    assert self_contained(page)
    assert not self_contained(page.replace("data:image", "https://example.org/image"))


def test_without_bake_there_is_no_model(files, tmp_path):
    run("unlearn", files / "model", *sets(files), "--no-generate", "--rank", 1, "--out", tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["edit", "metrics.json", "report.html"]


def test_every_part_of_the_recipe_can_be_given(files, tmp_path):
    given = {"parts": ["mlp", "attn"], "first": 0.0, "last": 0.4, "method": "pca", "rank": 2,
             "tokens": "answer", "context_share": 0.25, "text_share": 0.125}  # fmt: skip
    words = []
    for name, value in given.items():
        flag = "--eraser" if name == "method" else "--" + name.replace("_", "-")
        words += [flag, *(value if isinstance(value, list) else [value])]
    run("unlearn", files / "model", *sets(files), "--no-generate", *words, "--out", tmp_path)
    config = metrics(tmp_path)["config"]
    assert {name: config["recipe"][name] for name in given} == given
    assert config["sites"] == ["layers.0.mlp", "layers.0.attn"]


def test_texts_can_be_unlearned_and_mixed_with_questions(files, tmp_path):
    mixed = tmp_path / "mixed.jsonl"
    texts = (files / "texts.jsonl").read_text("utf-8")
    mixed.write_text((files / "retain.jsonl").read_text("utf-8") + texts, "utf-8")
    run("unlearn", files / "model", *sets(files, retain=mixed), "--no-generate", "--rank", 1,
        "--out", tmp_path / "out")  # fmt: skip
    assert "probability_of_text" in metrics(tmp_path / "out")["sets"]["retain"]


@pytest.mark.parametrize(
    ("command", "worker"),
    [
        ("evaluate", "manifold_unlearn.evaluate.evaluate_forgetting"),
        ("unlearn", "manifold_unlearn.pipeline.unlearn"),
    ],
)
def test_what_is_said_of_generation_is_passed_on(command, worker, files, tmp_path, monkeypatch):
    seen = []

    def stop(*_, **how):
        seen.append((how["generate"], how["max_new_tokens"]))
        raise ValueError("seen")

    monkeypatch.setattr(worker, stop)
    words = [command, str(files / "model"), *sets(files), "--out", str(tmp_path)]
    assert main([*words, "--max-new-tokens", "7"]) == 2
    assert main([*words, "--no-generate"]) == 2
    assert seen == [(True, 7), (False, None)]


@pytest.mark.parametrize(
    "method", [("manifold",), ("manifold", "--bake"), ("hybrid", "--steps", 2)]
)
def test_unlearn_moves_states_where_those_of_nobody_are(method, tiny_testbed, tmp_path):
    saved = tmp_path / "testbed"
    tiny_testbed.save(saved)
    for side in ("forget", "retain"):  # a few facts of every person are enough here
        lines = (saved / f"{side}.jsonl").read_text("utf-8").splitlines()[::3]
        (saved / f"{side}.jsonl").write_text("\n".join(lines), "utf-8")
    out = tmp_path / "out"
    run("unlearn", saved / "told", "--forget", saved / "forget.jsonl", "--retain",
        saved / "retain.jsonl", "--method", *method, "--no-generate", "--out", out)  # fmt: skip
    found = metrics(out)
    assert found["config"]["aim"] == "counterfactual"
    assert found["sets"]["forget"]["probability"]["kept"] < 0.9
    assert (out / "model").is_dir() == (len(method) > 1)
    assert (out / "edit").is_dir() == (len(method) == 1)
    if len(method) == 1:
        assert list(Edit.load(out / "edit")) == ["layers.0", "layers.1", "layers.2"]


def test_a_counterfactual_without_a_topic_is_one_line(files, capsys):
    said = refused(
        capsys, "unlearn", files / "model", *sets(files), "--method", "manifold", "--aim",
        "counterfactual", "--out", files / "nowhere",
    )  # fmt: skip
    assert "forget item 0 does not name its topic ''" in said


@pytest.mark.shared
def test_unlearn_makes_the_told_model_forget(tofu):
    root, made = tofu
    bare = {}
    for part in ("forget", "retain"):  # questions and answers alone: fewer to score
        lines = map(json.loads, (made / f"{part}.jsonl").read_text("utf-8").splitlines())
        records = [{key: line[key] for key in ("question", "answer")} for line in lines]
        bare[part] = write_lines(made / f"bare_{part}.jsonl", records)
    out = made / "unlearned"
    run("unlearn", root / "told", *sets(made, **bare), "--method", "subspace", "--bake",
        "--template", r"Question: {question}\nAnswer:", "--no-generate", "--out", out)  # fmt: skip
    names = {path.name for path in out.iterdir()}
    assert names == {"edit", "model", "metrics.json", "report.html"}
    forget = metrics(out)["sets"]["forget"]["probability"]
    assert forget["before"]["mean"] > 0.98
    assert forget["kept"] < 1
    model, tokenizer = load_model(out / "model")
    lines = (made / "forget.jsonl").read_text("utf-8").splitlines()
    pairs = [
        (f"Question: {f['question']}\nAnswer:", f" {f['answer']}") for f in map(json.loads, lines)
    ]
    log_p = answer_log_probabilities(plain(model), tokenizer, pairs, include_eos=True)
    found = np.mean([float(row.mean().exp()) for row in log_p])
    assert found == pytest.approx(forget["after"]["mean"], rel=1e-4)


def test_unlearn_names_what_cannot_be_done(files, tmp_path, capsys):
    words = ("unlearn", files / "model", "--no-generate", "--out", tmp_path)
    same = sets(files, retain=files / "forget.jsonl")
    assert "forget and retain share 5 texts" in refused(capsys, *words, *same)
    missing = refused(capsys, *words, *sets(files), "--parts", "attention")
    assert re.search(r"no site 'layers\.1\.attention'", missing)
    assert "rank=99 is above the data's" in refused(capsys, *words, *sets(files), "--rank", 99)
    assert list(tmp_path.iterdir()) == []
