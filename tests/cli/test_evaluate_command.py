import json
import shutil

import numpy as np
import pytest
from cases import write_lines
from shell import TEMPLATE, fact, metrics, refused, run, sets

from manifold_unlearn import load_model
from manifold_unlearn.evaluate import answer_log_probabilities, plain

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


def test_plain_texts_are_evaluated_too(files, tmp_path):
    texts = sets(files, forget=files / "texts.jsonl")
    run("evaluate", files / "model", *texts, "--no-generate", "--out", tmp_path)
    assert set(metrics(tmp_path)["model"]["forget"]) == {"probability"}


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
