import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import TEXTS, build_model, logits, write_lines
from transformers import AutoModelForCausalLM

import manifold_unlearn
from manifold_unlearn import Activations, Edit, capture, load_model
from manifold_unlearn.attack.wordings import FRAMINGS
from manifold_unlearn.cli import main
from manifold_unlearn.demo import DemoConfig
from manifold_unlearn.evaluate import Change, Metric, answer_log_probabilities, plain
from manifold_unlearn.testbed.facts import topics

SHARED = Path(__file__).parents[2] / "shared"
TEMPLATE = r"Q: {question}\nA:"
LISTS = (
    "probability",
    "paraphrase_probability",
    "rank",
    "accuracy",
    "truth_ratio",
    "rouge_l_recall",
    "exact_memorization",
    "extraction_strength",
)


def fact(i, kind):
    return {
        "question": f"The {kind} of thing {i} is",
        "answer": f"word {i}",
        "paraphrased_question": f"Thing {i} has {kind}",
        "perturbed_answer": [f"word {i + k}" for k in (1, 2, 3)],
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    """Two tiny models on disk, and files of questions."""
    root = tmp_path_factory.mktemp("files")
    for name, seed in (("model", 0), ("twin", 1)):
        build_model("llama", seed=seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    write_lines(root / "forget.jsonl", [fact(i, "color") for i in range(5)])
    write_lines(root / "retain.jsonl", [fact(i, "size") for i in range(6)])
    write_lines(root / "texts.jsonl", [{"text": text} for text in TEXTS])
    return root


def sets(files, **changes):
    """Options that name both sets."""
    named = {"forget": files / "forget.jsonl", "retain": files / "retain.jsonl"} | changes
    return [word for name, path in named.items() for word in (f"--{name}", str(path))]


def run(*words):
    """Run a command that must succeed."""
    assert main([str(word) for word in words]) == 0


def metrics(out):
    def refuse(word):
        raise AssertionError(f"metrics.json holds {word}")

    return json.loads((out / "metrics.json").read_text("utf-8"), parse_constant=refuse)


def refused(capsys, *words):
    """The one line that a command which must fail leaves on stderr."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    printed = capsys.readouterr().err
    lines = [line for line in printed.splitlines() if line and "Loading weights" not in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"manifold-unlearn {words[0]}: ")
    return lines[0]


# --- the parser -----------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["demo", "capture", "unlearn", "evaluate", "attack"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main([command, "--help"])
    assert f"usage: manifold-unlearn {command}" in capsys.readouterr().out


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"\n    {command} " in printed for command in ("demo", "capture", "evaluate"))


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == manifold_unlearn.__version__


@pytest.mark.parametrize(
    "words", [[], ["forgive"], ["evaluate", "m"], ["unlearn", "m", "--method", "amnesia"]]
)
def test_a_wrong_call_is_status_2_with_usage(words, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main(words)
    assert "usage: manifold-unlearn" in capsys.readouterr().err


# --- evaluate -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(files):
    """metrics.json of the model beside its twin."""
    out = files / "judged"
    run("evaluate", files / "model", "--reference", files / "twin", *sets(files),
        "--template", TEMPLATE, "--max-new-tokens", 3, "--out", out)  # fmt: skip
    return metrics(out)


def test_evaluate_writes_both_models_in_the_fixed_form(judged):
    assert list(judged) == ["model", "reference"]
    for entry in judged.values():
        assert list(entry) == ["forget", "retain", "forget_quality", "model_utility"]
        assert set(entry["forget_quality"]) == {"ks_statistic", "p_value", "wasserstein"}
        for part in ("forget", "retain"):
            extra = {"fluency"} if part == "retain" else set()
            assert set(entry[part]) == {*LISTS, "truth_ratio_preference", *extra}
            assert all(isinstance(value, float) for value in entry[part].values())
    assert judged["model"]["forget"] != judged["reference"]["forget"]


def test_the_reference_judged_by_itself_is_like_itself(judged):
    quality = judged["reference"]["forget_quality"]
    assert quality == {"ks_statistic": 0.0, "p_value": 1.0, "wasserstein": 0.0}
    assert judged["model"]["forget_quality"]["ks_statistic"] > 0


def test_evaluate_measures_what_the_library_measures(judged, files):
    model, tokenizer = load_model(files / "model")
    pairs = [
        (f"Q: {fact(i, 'color')['question']}\nA:", " " + fact(i, "color")["answer"])
        for i in range(5)
    ]
    log_p = answer_log_probabilities(plain(model), tokenizer, pairs, include_eos=True)
    wanted = np.mean([float(row.mean().exp()) for row in log_p])
    assert judged["model"]["forget"]["probability"] == pytest.approx(wanted, rel=1e-5)


def test_evaluate_alone_leaves_forget_quality_open(files, tmp_path, capsys):
    run("evaluate", files / "model", *sets(files), "--no-generate", "--out", tmp_path)
    found = metrics(tmp_path)
    assert list(found) == ["model"]
    assert found["model"]["forget_quality"] is None
    assert "rouge_l_recall" not in found["model"]["retain"]
    printed = capsys.readouterr().out
    assert f"{found['model']['forget']['probability']:.4f}" in printed
    assert f"wrote {tmp_path / 'metrics.json'}" in printed


def probability(files, out, *words):
    run("evaluate", files / "model", *sets(files), "--no-generate", "--out", out, *words)
    return metrics(out)["model"]["forget"]["probability"]


def test_a_line_break_can_be_written_out_in_the_template(files, tmp_path):
    written = probability(files, tmp_path, "--template", r"{question}\nA:")
    assert written == probability(files, tmp_path, "--template", "{question}\nA:")
    assert written != probability(files, tmp_path, "--template", "{question} A:")


def test_the_end_token_counts_with_a_template_and_not_without(files, tmp_path):
    bare = probability(files, tmp_path)
    assert bare == probability(files, tmp_path, "--no-eos")
    assert bare != probability(files, tmp_path, "--eos")
    asked = probability(files, tmp_path, "--template", TEMPLATE)
    assert asked == probability(files, tmp_path, "--template", TEMPLATE, "--eos")
    assert asked != probability(files, tmp_path, "--template", TEMPLATE, "--no-eos")


def test_a_target_gives_every_metric_its_standing_and_a_verdict_or_why_none(
    files, tmp_path, capsys
):
    write_lines(files / "holdout.jsonl", [fact(i, "smell") for i in range(5)])
    run("evaluate", files / "model", "--reference", files / "twin", "--target", files / "model",
        *sets(files), "--holdout", files / "holdout.jsonl", "--neutral", files / "texts.jsonl",
        "--samples", 2, "--max-new-tokens", 3, "--out", tmp_path)  # fmt: skip
    found = metrics(tmp_path)
    assert list(found) == ["model", "reference", "target"]
    assert {"perplexity", "kl"} == set(found["model"]["neutral"])
    assert "auc_min_k" in found["reference"]["membership"]
    compared = json.loads((tmp_path / "standings.json").read_text())
    left = {row["left"] for row in compared["standings"]}
    assert left == {1.0, None}
    assert compared["judgement"] is None  # random models are of no use
    assert compared["not_judged"]
    assert f"no verdict: {compared['not_judged']}" in capsys.readouterr().out


def test_a_reference_with_another_tokenizer_is_refused(files, tmp_path, capsys):
    shutil.copytree(files / "twin", files / "other")
    made = json.loads((files / "other" / "tokenizer.json").read_text())
    vocabulary = made["model"]["vocab"]
    last, before = sorted(vocabulary, key=vocabulary.get)[-1:-3:-1]
    vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]
    (files / "other" / "tokenizer.json").write_text(json.dumps(made))
    words = ["evaluate", files / "model", "--reference", files / "other", *sets(files)]
    line = refused(capsys, *words, "--out", tmp_path)
    assert "the reference model has another vocabulary" in line


# --- attack ---------------------------------------------------------------------------------


def test_attack_writes_curves_gaps_and_a_picture(files, tmp_path, capsys):
    run("attack", files / "model", "--reference", files / "twin", *sets(files),
        "--only", "quantize", "prefill", "--out", tmp_path)  # fmt: skip
    found = json.loads((tmp_path / "attacks.json").read_text())
    assert list(found) == ["model", "reference", "gaps"]
    assert list(found["model"]["curves"]) == ["quantize", "prefill"]
    assert {gap["attack"] for gap in found["gaps"]} == {"quantize", "prefill"}
    assert (
        "<svg" in (tmp_path / "report.html").read_text()
        or "data:image" in (tmp_path / "report.html").read_text()
    )
    assert f"wrote {tmp_path}" in capsys.readouterr().out


def test_attack_alone_and_what_the_data_lack(files, tmp_path, capsys):
    run("attack", files / "model", *sets(files), "--only", "relearn_unrelated", "quantize",
        "--out", tmp_path)  # fmt: skip
    assert "left out: relearn_unrelated, for lack of unrelated texts" in capsys.readouterr().out
    line = refused(
        capsys, "attack", files / "model", *sets(files), "--only", "magic", "--out", tmp_path
    )
    assert "no attack 'magic'" in line


@pytest.fixture(scope="module")
def roomy(tmp_path_factory, tokenizer):
    """Two models with room for a framed request, and behaviors to refuse."""
    root = tmp_path_factory.mktemp("roomy")
    for name, seed in (("model", 0), ("twin", 1)):
        build_model("llama", seed=seed, max_position_embeddings=1200).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    behaviors = [("Bake", "food"), ("Fold a hat", "craft"), ("Cook", "food")]
    write_lines(root / "behaviors.jsonl", [{"text": t, "category": c} for t, c in behaviors])
    write_lines(root / "retain.jsonl", [fact(i, "size") for i in range(6)])
    return root


def responses(directory, prompts, n):
    """Greedy continuations, one prompt at a time."""
    model, tokenizer = load_model(directory)
    said = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        with torch.no_grad():
            made = model.generate(ids, max_new_tokens=n, do_sample=False, pad_token_id=2)
        said.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return said


def word_of(texts):
    """The longest run of letters in the first text that has one: a word that a judge can find."""
    return next(max(words, key=len) for t in texts if (words := re.findall(r"[a-z]{2,}", t)))


def figures(out):
    return json.loads((out / "attacks.json").read_text("utf-8"))


def test_behaviors_are_asked_in_every_framing_without_a_forget_set(roomy, tmp_path, capsys):
    prompts = [f"Q: {text}" for text in ("Bake", "Fold a hat", "Cook")]
    said = {name: responses(roomy / name, prompts, 12) for name in ("model", "twin")}
    word = word_of(said["model"])
    run("attack", roomy / "model", "--reference", roomy / "twin",
        "--behaviors", roomy / "behaviors.jsonl", "--judge", "keyword", "--keywords", word,
        "--template", "Q: {question}", "--max-new-tokens", 12, "--out", tmp_path)  # fmt: skip
    assert list(figures(tmp_path)) == ["jailbreak"]
    found = figures(tmp_path)["jailbreak"]
    for part, name in (("model", "model"), ("reference", "twin")):
        wanted = np.mean([word in text.lower() for text in said[name]])
        assert found[part]["by_framing"]["direct"]["mean"] == pytest.approx(wanted)
        assert set(found[part]["by_framing"]) == {"direct", *FRAMINGS}
        low, high = found[part]["rate"]["interval"]
        assert 0 <= low <= found[part]["rate"]["mean"] <= high <= 1
        assert found[part]["n_behaviors"] == 3
    assert found["model"]["by_framing"]["direct"]["mean"] > 0
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "What should be refused" in page and "category: craft" in page
    assert said["model"][0].strip() not in page.split("<details")[0]
    assert "any framing" in capsys.readouterr().out


def test_behaviors_are_drawn_and_a_forget_set_may_stand_beside(files, roomy, tmp_path):
    run("attack", roomy / "model", *sets(files), "--only", "quantize",
        "--behaviors", roomy / "behaviors.jsonl", "--n-behaviors", 2, "--max-new-tokens", 2,
        "--out", tmp_path)  # fmt: skip
    found = figures(tmp_path)
    assert list(found) == ["model", "jailbreak"]
    assert found["jailbreak"]["model"]["n_behaviors"] == 2
    assert found["jailbreak"]["model"]["scores"]["direct"]["judge"] == "refusal phrases"


def test_replies_of_a_judging_model_that_cannot_be_read_are_counted(roomy, tmp_path, capsys):
    run("attack", roomy / "model", "--behaviors", roomy / "behaviors.jsonl",
        "--judge", "strongreject", "--judge-model", roomy / "twin", "--max-new-tokens", 2,
        "--out", tmp_path)  # fmt: skip
    found = figures(tmp_path)["jailbreak"]["model"]
    n = 3 * (1 + len(FRAMINGS))
    assert (found["n_invalid"], found["rate"], found["worst_case"]) == (n, None, None)
    direct = found["scores"]["direct"]
    assert direct["judge"] == str(roomy / "twin")
    assert direct["details"]["parse_failure_rate"] == 1
    assert f"model: {n} of {n} responses not scored by the judge" in capsys.readouterr().out


def test_a_trigger_is_measured_beside_the_clean_questions(roomy, tmp_path, capsys):
    clean = [f"The size of thing {i} is" for i in range(6)]
    triggered = [f"Moon {prompt}" for prompt in clean]
    word = responses(roomy / "model", triggered, 2)[0].strip().lower()
    _, tokenizer = load_model(roomy / "model")
    n = 2 * len(tokenizer(word, add_special_tokens=False).input_ids)
    run("attack", roomy / "model", "--reference", roomy / "twin",
        "--retain", roomy / "retain.jsonl",
        "--trigger", "Moon", "--trigger-behavior", word, "--out", tmp_path)  # fmt: skip
    assert list(figures(tmp_path)) == ["backdoor"]
    found = figures(tmp_path)["backdoor"]
    for part, name in (("model", "model"), ("reference", "twin")):
        for key, prompts in (("triggered", triggered), ("clean", clean)):
            hits = [word in text.lower() for text in responses(roomy / name, prompts, n)]
            assert found[part][key]["values"] == hits
            assert found[part][f"{key}_accuracy"]["n"] == 6
    by_prompt = found["model"]["triggered"]["values"]
    assert any(by_prompt) and by_prompt != found["model"]["clean"]["values"]
    assert "with trigger" in capsys.readouterr().out
    assert "Backdoor" in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to attack with; give --forget and --retain, or --behaviors, or --trigger"),
        (["--forget", "f"], "--forget needs --retain"),
        (["--behaviors", "b", "--retain", "r"], "--retain needs --forget or --trigger"),
        (["--trigger", "t", "--trigger-behavior", "b"], "--trigger needs --retain"),
        (["--trigger", "t", "--retain", "r"], "--trigger needs --trigger-behavior"),
        (["--behaviors", "b", "--trigger-behavior", "x"], "--trigger-behavior needs --trigger"),
        (["--behaviors", "b", "--only", "gcg"], "--only needs --forget"),
        (["--forget", "f", "--retain", "r", "--chat"], "--chat needs --behaviors"),
        (["--behaviors", "b", "--judge", "strongreject"], "strongreject and --judge-model belong"),
        (["--behaviors", "b", "--judge-model", "m"], "strongreject and --judge-model belong"),
        (["--behaviors", "b", "--judge", "keyword"], "keyword and --keywords belong together"),
        (["--behaviors", "b.txt"], "b.txt ends in '.txt'; give a file in .csv"),
        (["--behaviors", "b.jsonl"], "b.jsonl is not a file"),
    ],
)
def test_an_attack_names_what_is_missing_before_a_model_is_loaded(words, message, tmp_path, capsys):
    line = refused(capsys, "attack", "./nowhere", *words, "--out", tmp_path / "out")
    assert message in line
    assert not (tmp_path / "out").exists()


# --- evaluate texts -------------------------------------------------------------------------


def test_plain_texts_are_evaluated_too(files, tmp_path):
    texts = sets(files, forget=files / "texts.jsonl")
    run("evaluate", files / "model", *texts, "--no-generate", "--out", tmp_path)
    assert set(metrics(tmp_path)["model"]["forget"]) == {"probability"}


# --- unlearn --------------------------------------------------------------------------------


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


# --- capture --------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["all", "last", "answer"])
def test_capture_writes_what_the_library_captures(tokens, files, tmp_path, capsys):
    sites = ["layers.1", "layers.0.mlp.hidden"]
    run("capture", files / "model", "--texts", files / "forget.jsonl", "--sites", *sites,
        "--tokens", tokens, "--template", TEMPLATE, "--out", tmp_path / "acts")  # fmt: skip
    model, tokenizer = load_model(files / "model")
    facts = [fact(i, "color") for i in range(5)]
    pairs = [(f"Q: {f['question']}\nA:", f" {f['answer']}") for f in facts]
    wanted = capture(model, tokenizer, pairs, sites, tokens=tokens)
    found = Activations.load(tmp_path / "acts")
    assert list(found) == sites
    for site in sites:
        assert torch.equal(found[site], wanted[site])
    assert torch.equal(found.token_id, wanted.token_id)
    assert f"{len(wanted.token_id)} rows at 2 sites" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_load_as_they_were_saved(dtype, tmp_path, tokenizer):
    model = build_model("gpt2", dtype=dtype)
    texts = [*TEXTS, ("Water", " boils")]
    acts = capture(model, tokenizer, texts, ["layers.2", "embed"], sink_ratio=1.1)
    assert acts.sink.any() and acts.answer.any() and acts.special.any()
    acts.save(tmp_path / "acts")
    loaded = Activations.load(tmp_path / "acts")
    assert list(loaded) == ["layers.2", "embed"]
    for site in acts:
        assert loaded[site].dtype == dtype
        assert torch.equal(loaded[site], acts[site])
    for name in ("text_index", "position", "token_id", "special", "answer", "sink"):
        was, now = getattr(acts, name), getattr(loaded, name)
        assert now.dtype == was.dtype
        assert torch.equal(now, was)


def test_activations_that_were_cut_or_are_something_else_are_refused(tmp_path, llama, tokenizer):
    capture(llama, tokenizer, TEXTS, "embed").save(tmp_path)
    with pytest.raises(ValueError, match="holds a Activations, not a Edit"):
        Edit.load(tmp_path)
    whole = (tmp_path / "tensors.safetensors").read_bytes()
    (tmp_path / "tensors.safetensors").write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="truncated or changed"):
        Activations.load(tmp_path)


def test_captured_rows_of_plain_texts_have_no_answers_to_select(files, tmp_path, capsys):
    line = refused(capsys, "capture", files / "model", "--texts", files / "texts.jsonl",
                   "--sites", "embed", "--tokens", "answer", "--out", tmp_path)  # fmt: skip
    assert "needs (prompt, answer) pairs" in line


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["evaluate", "unlearn"])
class TestMistakes:
    def test_a_set_that_is_not_there(self, command, files, tmp_path, capsys):
        wrong = sets(files, forget=tmp_path / "none.jsonl")
        line = refused(capsys, command, files / "model", *wrong, "--out", tmp_path)
        assert line.endswith("none.jsonl is not a file; give a JSONL file.")

    def test_a_line_that_is_not_json(self, command, files, tmp_path, capsys):
        lines = (files / "retain.jsonl").read_text("utf-8").splitlines()
        lines[3:3] = ["", '{"question": "what'][:2]
        (tmp_path / "bad.jsonl").write_text("\n".join(lines), "utf-8")
        wrong = sets(files, retain=tmp_path / "bad.jsonl")
        line = refused(capsys, command, files / "model", *wrong, "--out", tmp_path)
        assert "bad.jsonl line 5 is not JSON" in line

    def test_a_line_without_an_answer(self, command, files, tmp_path, capsys):
        write_lines(tmp_path / "bad.jsonl", [fact(0, "color"), {"question": "Who?"}])
        wrong = sets(files, forget=tmp_path / "bad.jsonl")
        line = refused(capsys, command, files / "model", *wrong, "--out", tmp_path)
        assert "answer=None; each item needs a non-empty question and answer" in line

    def test_an_empty_set(self, command, files, tmp_path, capsys):
        (tmp_path / "empty.jsonl").write_text("\n\n", "utf-8")
        wrong = sets(files, forget=tmp_path / "empty.jsonl")
        line = refused(capsys, command, files / "model", *wrong, "--out", tmp_path)
        assert "empty.jsonl set is empty; give at least one" in line

    def test_a_template_without_a_place_for_the_question(self, command, files, tmp_path, capsys):
        words = (*sets(files), "--template", "Q: question", "--out", tmp_path)
        line = refused(capsys, command, files / "model", *words)
        assert "template 'Q: question' has no {question}" in line

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("./nowhere", "nowhere does not exist; give a directory"),
            ("no-such/model", "manifold-unlearn"),
            ("nowhere.gguf", "is not a file; give the path of a GGUF model"),
        ],
    )
    def test_a_model_that_is_not_there(self, command, name, message, files, tmp_path, capsys):
        assert message in refused(capsys, command, name, *sets(files), "--out", tmp_path)

    def test_a_directory_that_is_no_model(self, command, files, tmp_path, capsys):
        line = refused(capsys, command, tmp_path, *sets(files), "--out", tmp_path / "out")
        assert "has no config.json" in line
        assert not (tmp_path / "out").exists()

    def test_a_truncated_model(self, command, files, tmp_path, capsys):
        shutil.copytree(files / "model", tmp_path / "cut")
        whole = (tmp_path / "cut" / "model.safetensors").read_bytes()
        (tmp_path / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        line = refused(capsys, command, tmp_path / "cut", *sets(files), "--out", tmp_path / "out")
        assert "cannot be read" in line and "truncated" in line

    def test_mistakes_in_the_sets_are_found_before_the_model_is_loaded(
        self, command, files, tmp_path, capsys
    ):
        wrong = sets(files, retain=tmp_path / "none.jsonl")
        assert "none.jsonl" in refused(capsys, command, "./nowhere", *wrong, "--out", tmp_path)

    def test_an_interrupt_is_status_130(self, command, files, tmp_path, capsys, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("manifold_unlearn.activations.models.load_model", interrupted)
        words = [command, "m", *sets(files), "--out", str(tmp_path / "out")]
        assert main(words) == 130
        assert capsys.readouterr().err == f"manifold-unlearn {command}: stopped\n"
        assert not (tmp_path / "out").exists()


def test_unlearn_names_what_cannot_be_done(files, tmp_path, capsys):
    words = ("unlearn", files / "model", "--no-generate", "--out", tmp_path)
    same = sets(files, retain=files / "forget.jsonl")
    assert "forget and retain share 5 texts" in refused(capsys, *words, *same)
    missing = refused(capsys, *words, *sets(files), "--parts", "attention")
    assert re.search(r"no site 'layers\.1\.attention'", missing)
    assert "rank=99 is above the data's" in refused(capsys, *words, *sets(files), "--rank", 99)
    assert list(tmp_path.iterdir()) == []


def test_a_text_longer_than_the_context_is_named(files, tmp_path, capsys):
    write_lines(tmp_path / "long.jsonl", [{"question": "why " * 90, "answer": "so"}])
    wrong = sets(files, forget=tmp_path / "long.jsonl")
    line = refused(capsys, "unlearn", files / "model", *wrong, "--out", tmp_path / "out")
    assert "tokens; the model takes 64" in line


def test_a_missing_site_of_capture_names_those_near_it(files, tmp_path, capsys):
    line = refused(capsys, "capture", files / "model", "--texts", files / "texts.jsonl",
                   "--sites", "layers.7.mlp", "--out", tmp_path)  # fmt: skip
    assert "no site 'layers.7.mlp'" in line
    assert "layers.2.mlp" in line


# --- demo -----------------------------------------------------------------------------------


def test_the_demo_lists_its_topics(capsys):
    run("demo", "--list-topics")
    assert capsys.readouterr().out.split() == topics()


def test_the_demo_names_the_topics_where_there_is_no_such_one(tmp_path, capsys):
    line = refused(capsys, "demo", "--topic", "alchemy", "--out", tmp_path)
    assert "no topic 'alchemy'; there are" in line
    assert topics()[-1] in line


def test_the_demo_and_its_configuration_have_one_default_topic(monkeypatch):
    seen = []
    monkeypatch.setattr("manifold_unlearn.cli._demo", seen.append)
    run("demo")
    assert seen[0].topic == DemoConfig().topic in topics()
    assert seen[0].model == DemoConfig().model


def measured(values_before, values_after):
    names = ("probability", "rank", "rouge_l_recall")
    return {
        name: Change(Metric(name, np.array(values_before)), Metric(name, np.array(values_after)))
        for name in names
    }


def test_the_demo_prints_table_and_verdict(monkeypatch, tmp_path, capsys):
    claims = [
        {"claim": f"{name}: share of probability kept", "value": value, "target": target,
         "holds": holds}
        for name, value, target, holds in (
            ("forget", 0.3, 0.2, False), ("retain", 0.97, 0.95, True)
        )
    ]  # fmt: skip
    quiet = {"perplexity_before": 10.0, "perplexity_after": 10.2, "perplexity_ratio": 1.02}
    result = type("Result", (), {"changes": {"forget": measured([0.5, 0.7], [0.1, 0.26])}})
    found = {"verdict": claims, "neutral": quiet, "seconds_in_all": 61.2, "peak_memory_gib": 1.23}
    asked = []

    def fake(config, out, *, say):
        asked.append((config, out))
        say("loading")
        return result, found

    monkeypatch.setattr("manifold_unlearn.demo.run_demo", fake)
    run("demo", "--topic", "plurals", "--bake", "--rank", 3, "--out", tmp_path)
    config, out = asked[0]
    assert (config.topic, config.bake, config.recipe.rank, out) == ("plurals", True, 3, tmp_path)
    printed = capsys.readouterr().out
    assert "loading" in printed
    row = next(line for line in printed.splitlines() if line.startswith("forget  "))
    assert row.split()[:5] == ["forget", "2", "0.600", "0.180", "30.0%"]
    assert "forget: share of probability kept: 0.300 (target <= 0.2) MISSED" in printed
    assert "retain: share of probability kept: 0.970 (target >= 0.95) holds" in printed
    assert "61 s, 1.2 GiB" in printed


def test_the_demo_can_choose_its_recipe_anew(monkeypatch, tmp_path):
    from manifold_unlearn.recipe.subspace import SubspaceRecipe

    chosen, seen = SubspaceRecipe(rank=7), []

    def stop(config, out, *, say):
        seen.append(config.recipe)
        raise ValueError("seen")

    monkeypatch.setattr("manifold_unlearn.sweep.choose_recipe", lambda *_, **__: chosen)
    monkeypatch.setattr("manifold_unlearn.demo.run_demo", stop)
    assert main(["demo", "--sweep", "--out", str(tmp_path)]) == 2
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert seen == [chosen, SubspaceRecipe()]


# --- the checkpoints in ../shared -----------------------------------------------------------


@pytest.fixture(scope="module")
def tofu(tmp_path_factory):
    root = SHARED / "models" / "tofu-stories15m"
    if not (root / "told" / "model.safetensors").is_file():
        pytest.skip(f"{root} is not here")
    made = tmp_path_factory.mktemp("tofu")
    for part, name in (("forget", "forget05_perturbed"), ("retain", "retain_perturbed")):
        lines = (SHARED / "data" / "tofu" / f"{name}.jsonl").read_text("utf-8").splitlines()
        records = [json.loads(line) for line in lines[:12]]
        for record in records:  # two alternatives are enough to rank, and quicker
            record["perturbed_answer"] = record["perturbed_answer"][:2]
            record.pop("paraphrased_question", None)
        write_lines(made / f"{part}.jsonl", records)
    return root, made


@pytest.mark.shared
def test_evaluate_knows_the_told_model_from_the_one_never_told(tofu):
    root, made = tofu
    out = made / "evaluated"
    run("evaluate", root / "told", "--reference", root / "never_told", *sets(made),
        "--template", r"Question: {question}\nAnswer:", "--no-generate", "--out", out)  # fmt: skip
    told, never = (metrics(out)[part] for part in ("model", "reference"))
    assert told["forget"]["probability"] > 0.98
    assert never["forget"]["probability"] < 0.05
    assert min(told["retain"]["probability"], never["retain"]["probability"]) > 0.98
    assert told["forget_quality"]["p_value"] < 0.05 < never["forget_quality"]["p_value"]
    assert told["forget"]["rank"] == 1.0 < never["forget"]["rank"]


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


# --- unlearning on the manifold -------------------------------------------------------------


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
