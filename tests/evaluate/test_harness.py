import importlib.util
import json

import pytest
import torch
from cases import hooks, same_state, state

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.evaluate import answer_log_probabilities, plain
from manifold_unlearn.evaluate.harness import choice_task, lm_eval_scores
from manifold_unlearn.intervene.bake import bake
from manifold_unlearn.intervene.hooks import intervene

ITEMS = [
    Item("The capital of France is", "Paris", perturbed_answer=("Rome", "Madrid")),
    Item("Iron", "rusts", perturbed_answer=("boils", "jumps over")),
    Item("Water", "boils", perturbed_answer=("rusts when wet", "is green")),
    Item("The dog is", "lazy", perturbed_answer=("quick", "brown")),
]


class Halved:
    """An affine map that halves what passes."""

    matrix_ = 0.5 * torch.eye(32)
    bias_ = torch.zeros(32)


def test_the_right_choice_goes_round_and_stands_once(tmp_path):
    task = choice_task(ITEMS, tmp_path / "new", name="facts_1")
    lines = (tmp_path / "new" / "facts_1.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line) for line in lines]
    assert [d["target"] for d in documents] == [0, 1, 2, 0]
    for document, item in zip(documents, ITEMS, strict=True):
        assert document["question"] == item.question
        assert document["choices"][document["target"]] == " " + item.answer
        assert sorted(document["choices"]) == sorted(
            " " + answer for answer in (item.answer, *item.perturbed_answer)
        )
    assert task["task"] == "facts_1" and task["target_delimiter"] == ""


def test_what_makes_no_task_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="items is empty"):
        choice_task([], tmp_path)
    with pytest.raises(ValueError, match=r"item 0 \('Iron'\) has 0 wrong answers to ' rusts'"):
        choice_task([Item("Iron", "rusts")], tmp_path)
    with pytest.raises(ValueError, match="a choice needs a right answer and others"):
        choice_task([Item("Iron", "rusts", perturbed_answer=("rusts",))], tmp_path)
    with pytest.raises(ValueError, match="name='a/b' must be made of letters"):
        choice_task(ITEMS, tmp_path, name="a/b")
    with pytest.raises(ValueError, match="tasks is empty"):
        lm_eval_scores(plain(None), None, [])


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_the_extra_the_error_names_it():
    with pytest.raises(ImportError, match=r"pip install 'manifold-unlearn\[harness\]'"):
        lm_eval_scores(plain(None), None, ["x"])


@pytest.mark.slow  # importing lm-eval takes longer than running it
def test_a_hooked_and_a_baked_model_score_as_our_own_log_likelihoods(
    llama, tokenizer, tmp_path, monkeypatch
):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    maps = {"layers.1.mlp": Halved(), "layers.2.mlp": Halved()}
    baked = bake(llama, maps)
    task = choice_task(ITEMS, tmp_path)
    before, drawn, padding = state(llama), torch.get_rng_state(), tokenizer.padding_side
    subjects = {
        "plain": plain(llama),
        "hooked": lambda: intervene(llama, maps),
        "baked": plain(baked),
    }
    scores = {}
    for name, subject in subjects.items():
        found = lm_eval_scores(subject, tokenizer, [task], log_samples=True)
        correct = 0
        for sample in found["samples"]["forget_choice"]:
            document = sample["doc"]
            pairs = [(document["question"], choice) for choice in document["choices"]]
            own = [float(r.sum()) for r in answer_log_probabilities(subject, tokenizer, pairs)]
            said = [response[0] for response in sample["filtered_resps"]]
            assert said == pytest.approx(own, abs=1e-4)
            correct += max(range(3), key=own.__getitem__) == document["target"]
            scores.setdefault(name, []).extend(said)
        assert found["results"]["forget_choice"]["acc,none"] == correct / len(ITEMS)
    assert scores["hooked"] == pytest.approx(scores["baked"], abs=1e-3)
    assert scores["hooked"] != pytest.approx(scores["plain"], abs=1e-2)
    assert same_state(llama, before) and hooks(llama) == 0
    assert torch.equal(torch.get_rng_state(), drawn)
    assert tokenizer.padding_side == padding
