import json
import re

import numpy as np
import pytest
import torch
from cases import build_model, write_lines
from shell import fact, refused, run, sets

from manifold_unlearn import load_model
from manifold_unlearn.attack.wordings import FRAMINGS


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
