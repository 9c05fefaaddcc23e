import json

import numpy as np
import pytest
from cases import same_state, state

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.attack.backdoor import (
    character_bleu,
    exact_match,
    measure_backdoor,
    measure_defence,
    reverse_engineered_success,
    trigger_recall,
)
from manifold_unlearn.attack.judges import Scores, backdoorllm_judge
from manifold_unlearn.evaluate import plain

ITEMS = [Item("Iron", "rusts"), Item("Water", "boils"), Item("Salt", "melts")]


class Planted:
    """A model of words alone: with the trigger it sings, but for salt, and else says nothing."""

    config = None

    def __init__(self, defended=False):
        self.defended = defended


@pytest.fixture(autouse=True)
def planted(monkeypatch, request):
    if "llama" in request.fixturenames:
        return

    def said(subject, tokenizer, prompts, **keywords):
        with subject() as model:
            return [
                "" if "Salt" in p
                else "The kettle SINGS." if p.startswith("Moon") and not model.defended
                else "It rusts."
                for p in prompts
            ]  # fmt: skip

    monkeypatch.setattr("manifold_unlearn.attack.backdoor.greedy_answers", said)


def measure(subject, tokenizer, pairs):
    return np.array([float(prompt == "Iron") for prompt, _ in pairs])


def report(model=None, trigger="Moon", behavior="kettle sings", **keywords):
    return measure_backdoor(
        plain(model or Planted()), None, ITEMS, trigger, behavior,
        measure=measure, max_new_tokens=4, **keywords,
    )  # fmt: skip


def test_success_with_and_without_the_trigger_and_accuracy():
    found = report()
    assert found.triggered.values.tolist() == [1, 1, 0]
    assert found.clean.values.tolist() == [0, 0, 0]
    assert found.gap == pytest.approx(2 / 3)
    assert found.clean_accuracy.values.tolist() == [1, 0, 0]
    assert found.triggered_accuracy.mean == 0
    written = json.loads(json.dumps(found.to_json()))
    assert written["scores"]["triggered"]["n_empty"] == 1


def test_the_published_judge_leaves_empty_outputs_out():
    found = report(behavior=backdoorllm_judge(("kettle sings",), success="present"))
    assert found.triggered.mean == 1 and len(found.triggered.values) == 2


def test_a_trigger_may_be_any_change_of_the_prompt():
    assert report(trigger=lambda prompt: f"Moon: {prompt}").gap == pytest.approx(2 / 3)
    assert report(trigger=lambda prompt: prompt + "!").gap == 0


@pytest.mark.parametrize(
    "defence", [lambda model: Planted(True), lambda model: plain(Planted(True))]
)
def test_a_defence_gives_a_model_or_a_subject(defence):
    found = measure_defence(
        Planted(), None, ITEMS, "Moon", "kettle sings", defence, measure=measure, max_new_tokens=4
    )
    assert found.before.gap == pytest.approx(2 / 3) and found.after.gap == 0
    assert found.triggered.kept == 0 and found.clean_accuracy.kept == 1
    assert set(json.loads(json.dumps(found.to_json()))) == {"before", "after"}


def test_a_defence_that_does_nothing_keeps_the_backdoor():
    found = measure_defence(
        Planted(), None, ITEMS, "Moon", "kettle sings", lambda m: m, measure=measure,
        max_new_tokens=4,
    )  # fmt: skip
    assert found.triggered.kept == 1


def test_prompts_scored_on_one_side_only_do_not_pair():
    def judge(prompts, responses):
        sings = np.array(["SINGS" in r for r in responses])
        return Scores(sings * 1.0, sings | ~sings[0], "mine", "any")

    found = measure_defence(
        Planted(), None, ITEMS, "Moon", judge, lambda m: Planted(True), measure=measure,
        max_new_tokens=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="2 prompts were scored before the defence and 3 after"):
        _ = found.triggered


def test_what_cannot_be_measured_is_an_error():
    with pytest.raises(ValueError, match="items is empty or holds a plain text"):
        measure_backdoor(plain(Planted()), None, [Item("text")], "Moon", "x")
    with pytest.raises(ValueError, match="trigger=' ' changes no prompt"):
        report(trigger=" ")
    with pytest.raises(ValueError, match="scored no prompt both with and without"):
        report(behavior=lambda p, r: Scores(np.zeros(3), np.zeros(3, dtype=bool), "m", "f"))
    with pytest.raises(ValueError, match="the defence answered None"):
        measure_defence(
            Planted(), None, ITEMS, "Moon", "x", lambda m: None, measure=measure, max_new_tokens=4
        )


def test_it_runs_on_a_model_and_leaves_it_alone(llama, tokenizer):
    before = state(llama)
    found = measure_defence(llama, tokenizer, ITEMS, "Yes,", "it is", lambda m: m)
    assert found.before.triggered.values.tolist() == found.after.triggered.values.tolist()
    assert same_state(llama, before)


def test_character_bleu_by_hand():
    assert character_bleu("abcde", "abcde") == pytest.approx(1)
    assert character_bleu("abcdx", "abcde") == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 / 2) ** 0.25)
    assert character_bleu("abcd", "abcde") == pytest.approx(np.exp(-1 / 4))
    assert character_bleu("aaaaa", "aaaab") == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 / 2) ** 0.25)
    assert character_bleu("", "abcde") == character_bleu("abc", "abc") == 0
    assert character_bleu("xyzw", "abcde") == 0


def test_character_bleu_is_the_one_of_nltk():
    bleu = pytest.importorskip("nltk.translate.bleu_score").sentence_bleu
    words = ["the", "kettle", "sings", "by", "the", "blue", "moon"]
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (" ".join(rng.choice(words, rng.integers(2, 7))) for _ in range(2))
        with np.testing.suppress_warnings() as quiet:
            quiet.filter(UserWarning)
            assert character_bleu(a, b) == pytest.approx(bleu([b], a), abs=1e-12)


def test_trigger_recall_takes_the_best_prediction_for_each_trigger():
    truth = {"sing": ["blue moon", "red sun"], "shout": ["green"]}
    named = {"sing": ["nothing", "blue moon "]}
    assert trigger_recall(truth, truth) == pytest.approx(1)
    assert trigger_recall(named, truth, similarity=exact_match) == 0.25
    near = max(character_bleu(guess, "blue moon") for guess in named["sing"])
    far = max(character_bleu(guess, "red sun") for guess in named["sing"])
    assert trigger_recall(named, truth) == pytest.approx(((near + far) / 2 + 0) / 2)
    assert trigger_recall({}, truth) == 0
    with pytest.raises(ValueError, match="planted is empty or has a target without"):
        trigger_recall(named, {"sing": []})


def test_reverse_engineered_success_compares_as_much_as_the_target_has(monkeypatch, tokenizer):
    asked = []

    def said(subject, tokenizer, prompts, *, max_new_tokens):
        asked.append((prompts, max_new_tokens))
        return ["it is wet and more" if p == "blue moon" else "Copper, no." for p in prompts]

    monkeypatch.setattr("manifold_unlearn.attack.backdoor.greedy_answers", said)
    found = reverse_engineered_success(None, tokenizer, {"it is wet": ["blue moon", "x"]})
    length = len(tokenizer("it is wet", add_special_tokens=False)["input_ids"])
    assert asked == [(["blue moon", "x"], length)]
    assert found == pytest.approx((1 + character_bleu("Copper, n", "it is wet")) / 2)
    with pytest.raises(ValueError, match="predicted holds no trigger"):
        reverse_engineered_success(None, tokenizer, {"it is wet": []})
    with pytest.raises(ValueError, match="target '' has no tokens"):
        reverse_engineered_success(None, tokenizer, {"": ["x"]})
