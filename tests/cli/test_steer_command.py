import json

import pytest
import torch
from cases import write_lines
from shell import refused, run

from manifold_unlearn import Edit, capture, intervene, load_model
from manifold_unlearn.evaluate import plain
from manifold_unlearn.evaluate.steering import concept_log_odds
from manifold_unlearn.steer.contrast import fit_vectors
from manifold_unlearn.steer.formats import write_control_vector
from manifold_unlearn.steer.spline import CentroidSpline
from manifold_unlearn.steer.traverse import traverse

WORDS = ("--concept", "river", "stone", "--others", "cloud")
LIKED = ["the river is long", "a stone and a river", "river stone river"]
OTHER = ["the cloud is high", "a bird and a cloud", "cloud bird cloud"]
TOPICS = ["one", "two", "three"]


@pytest.fixture(scope="module")
def texts(files):
    """Files of prompts, of two sides and of examples with topics."""
    write_lines(files / "prompts.jsonl", [{"text": "the long"}, {"text": "a high stone"}])
    write_lines(files / "positive.jsonl", [{"text": text} for text in LIKED])
    write_lines(files / "negative.jsonl", [{"text": text} for text in OTHER])
    write_lines(
        files / "examples.jsonl",
        [{"text": f"{lead} {t} {t}", "topic": t} for lead in ("a", "the", "so") for t in TOPICS],
    )
    return files


def command(texts, *words):
    return ("steer", texts / "model", "--prompts", texts / "prompts.jsonl", "--sites", "layers.1",
            "--max-new-tokens", 3, *words)  # fmt: skip


def sides(texts):
    return ("--positive", texts / "positive.jsonl", "--negative", texts / "negative.jsonl")


def along(texts, *words):
    return command(texts, "--examples", texts / "examples.jsonl", "--start", "one", *words)


def test_a_vector_is_what_the_library_fits_and_its_figures_what_it_measures(
    texts, tmp_path, capsys
):
    run(*command(texts, *sides(texts), *WORDS, "--strengths", 0, 4, "--method", "pca",
                 "--out", tmp_path))  # fmt: skip
    model, tokenizer = load_model(texts / "model")
    edit = fit_vectors(model, tokenizer, LIKED, OTHER, "layers.1", method="pca")
    kept = Edit.load(tmp_path / "edit")
    assert torch.equal(kept["layers.1"].vector_, edit["layers.1"].vector_)
    found = json.loads((tmp_path / "steering.json").read_text("utf-8"))
    prompts = ["the long", "a high stone"]
    assert found["prompts"] == prompts
    assert [point["strength"] for point in found["points"]] == [0, 4]
    odds = concept_log_odds(plain(model), tokenizer, prompts, ["river", "stone"], ["cloud"])
    assert found["points"][0]["log_odds"]["values"] == pytest.approx(odds.values.tolist(), rel=1e-5)
    edit["layers.1"].strength = 4.0
    moved = concept_log_odds(
        lambda: intervene(model, edit), tokenizer, prompts, ["river", "stone"], ["cloud"]
    )
    assert found["points"][1]["log_odds"]["values"] == pytest.approx(
        moved.values.tolist(), rel=1e-5
    )
    printed = capsys.readouterr().out
    assert "strength" in printed and f"wrote {tmp_path}" in printed
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "What is said at each strength" in page and "a high stone" in page


def test_neutral_questions_are_measured_beside_it(texts, tmp_path):
    run(*command(texts, *sides(texts), *WORDS, "--strengths", 0, "--neutral",
                 texts / "retain.jsonl", "--out", tmp_path))  # fmt: skip
    found = json.loads((tmp_path / "steering.json").read_text("utf-8"))
    assert found["points"][0]["neutral"]["n"] == 6


def test_a_control_vector_of_another_program_steers(texts, tmp_path, capsys):
    model, tokenizer = load_model(texts / "model")
    edit = fit_vectors(model, tokenizer, LIKED, OTHER, ["layers.1", "layers.2"])
    write_control_vector(edit, tmp_path / "vector.gguf", model_hint="llama")
    given = ("--control-vector", tmp_path / "vector.gguf", *WORDS)
    run(*command(texts, *given, "--strengths", 1, "--out", tmp_path / "out"))
    assert list(Edit.load(tmp_path / "out" / "edit")) == ["layers.1"]
    line = refused(
        capsys, "steer", texts / "model", "--prompts", texts / "prompts.jsonl", "--sites",
        "layers.0", *given, "--out", tmp_path / "none",
    )  # fmt: skip
    assert "has no ['layers.0']; it has ['layers.1', 'layers.2']" in line
    assert not (tmp_path / "none").exists()


def test_a_path_is_walked_as_the_library_walks_it(texts, tmp_path, capsys):
    run(*along(texts, "--end", "three", "--order", *TOPICS, "--waypoints", 9, "--answers", " river",
               " cloud", "--out", tmp_path))  # fmt: skip
    model, tokenizer = load_model(texts / "model")
    examples = [f"{lead} {t} {t}" for lead in ("a", "the", "so") for t in TOPICS]
    states = capture(model, tokenizer, examples, "layers.1", tokens="last")["layers.1"]
    path = CentroidSpline(order=TOPICS).fit(states, TOPICS * 3).path("one", "three", 9)
    walk = traverse(model, tokenizer, ["the long", "a high stone"], path, "layers.1",
                    how="coordinates", answers=(" river", " cloud"), max_new_tokens=3)  # fmt: skip
    found = json.loads((tmp_path / "steering.json").read_text("utf-8"))
    assert torch.allclose(
        torch.tensor(found["probabilities"]), walk.log_probabilities.exp(), atol=1e-6
    )
    assert found["texts"] == [list(row) for row in walk.texts]
    kept = Edit.load(tmp_path / "edit")["layers.1"]
    assert (kept.how, kept.strength) == ("coordinates", 1.0)
    assert torch.allclose(kept.path.points, path.points)
    printed = capsys.readouterr().out.splitlines()
    times = [line.split()[0] for line in printed if line[:2] in ("0.", "1.")]
    assert times[0] == "0.00" and times[-1] == "1.00" and len(times) == 6
    assert "<img" in (tmp_path / "report.html").read_text("utf-8")


def test_without_answers_the_path_shows_tokens_and_texts(texts, tmp_path):
    run(*along(texts, "--end", "two", "--path", "chord", "--how", "add", "--tokens", "all",
               "--waypoints", 3, "--out", tmp_path))  # fmt: skip
    found = json.loads((tmp_path / "steering.json").read_text("utf-8"))
    assert found["answers"] == [] and len(found["texts"]) == 3
    assert "<img" not in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give one of: --positive and --negative"),
        (("--positive", "p.jsonl"), "--positive needs the others of --positive --negative"),
        (("--examples", "e.jsonl", "--start", "a"), "needs the others of --examples --start --end"),
        (("--control-vector", "v.gguf"), "give --concept and --others"),
        (
            ("--control-vector", "v.gguf", "--concept", "a"),
            "needs the others of --concept --others",
        ),
        (
            ("--control-vector", "v.gguf", "--positive", "p", "--negative", "n"),
            "give one of: --positive and --negative",
        ),
        (
            ("--examples", "e", "--start", "a", "--end", "b", "--sites", "embed", "layers.0"),
            "a path is followed at one site; --sites names 2",
        ),
    ],
)
def test_what_is_asked_for_is_checked_before_a_model_is_loaded(words, message, tmp_path, capsys):
    given = ("steer", "./nowhere", "--prompts", "none.jsonl", "--sites", "layers.1")
    assert message in refused(capsys, *given, *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_examples_must_have_topics_and_both_ends(texts, tmp_path, capsys):
    plainly = ("--examples", texts / "positive.jsonl", "--start", "one", "--end", "two")
    line = refused(capsys, *command(texts, *plainly, "--out", tmp_path / "out"))
    assert "example 0 ('the river is long') has no topic" in line
    line = refused(capsys, *along(texts, "--end", "nine", "--out", tmp_path / "out"))
    assert "'nine'" in line
    assert not (tmp_path / "out").exists()
