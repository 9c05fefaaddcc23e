"""What is asked, to the letter; on a model that knows, see test_prompt_controls.py."""

import numpy as np
import pytest
from cases import CONTEXT

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.attack.prompts import (
    few_shot_attack,
    framing_attack,
    paraphrase_attack,
    prefill_attack,
    probability,
    recall,
)
from manifold_unlearn.evaluate import answer_log_probabilities, plain

ITEMS = [
    Item("The capital of France is", "Paris", ("France has", "In France it is")),
    Item("Iron", "rusts when it is wet.", ("It is iron that",)),
    Item("Water:", "boils"),
]
SHOTS = [Item(f"Q{i}", f"a{i}") for i in range(4)]


class Asked:
    """A measure that keeps what it was asked and answers as told."""

    def __init__(self, answer=lambda pair: 0.0):
        self.calls = []
        self.answer = answer

    def __call__(self, subject, tokenizer, pairs):
        self.calls.append(list(pairs))
        return np.array([self.answer(pair) for pair in pairs])


def test_the_two_measures_by_their_formulas(llama, tokenizer):
    pairs = [item.pair for item in ITEMS]
    p = probability(plain(llama), tokenizer, pairs)
    scored = answer_log_probabilities(plain(llama), tokenizer, pairs)
    assert p == pytest.approx([np.exp(row.numpy().mean()) for row in scored])


def test_recall_is_that_of_the_greedy_continuation(llama, tokenizer, monkeypatch):
    asked = {}

    def said(subject, tokenizer, prompts, *, max_new_tokens):
        asked.update(prompts=prompts, max_new_tokens=max_new_tokens)
        return ["It rusts, is wet", ""]

    monkeypatch.setattr("manifold_unlearn.attack.prompts.greedy_answers", said)
    found = recall(plain(llama), tokenizer, [("Iron", " rusts when it is wet."), ("Water", " x")])
    assert found.tolist() == [3 / 5, 0]  # "rusts", "is", "wet" in this order
    length = len(tokenizer(" rusts when it is wet.", add_special_tokens=False)["input_ids"])
    assert asked == {"prompts": ["Iron", "Water"], "max_new_tokens": length + -(-length // 4)}


def test_prefilling_hands_over_whole_tokens_and_never_all(llama, tokenizer):
    measure = Asked()
    curve = prefill_attack(plain(llama), tokenizer, ITEMS, tokens=(0, 1, 2, 40), measure=measure)
    assert measure.calls[0] == [item.pair for item in ITEMS]
    for call, n in zip(measure.calls, (0, 1, 2, 40), strict=True):
        for (prompt, wanted), item in zip(call, ITEMS, strict=True):
            assert prompt + wanted == item.text
            given = prompt[len(item.question) :]
            ids = tokenizer(item.pair[1], add_special_tokens=False)["input_ids"]
            assert any(letter.isalnum() for letter in wanted)
            assert given == tokenizer.decode(ids[: min(n, len(ids))])[: len(given)]
            assert len(tokenizer(given, add_special_tokens=False)["input_ids"]) <= n
    assert curve.unit == "tokens" and curve.spent.tolist() == [0, 1, 2, 40]
    assert curve.details["n_cut_short"][0] == 0 and curve.details["n_cut_short"][-1] == 3
    assert len(measure.calls[-1][1][1]) > 1  # a full stop alone would be nothing to recall


def test_an_affirmative_prefix_gives_nothing_of_the_answer_away(llama, tokenizer):
    measure = Asked()
    prefill_attack(
        plain(llama), tokenizer, ITEMS, tokens=(0, 99), prefix=" Sure, it is", measure=measure
    )
    assert measure.calls[0] == [item.pair for item in ITEMS]
    assert measure.calls[1] == [(i.question + " Sure, it is", i.pair[1]) for i in ITEMS]


def test_shots_come_first_and_more_keep_the_ones_before(llama, tokenizer):
    measure = Asked()
    curve = few_shot_attack(
        plain(llama), tokenizer, ITEMS[:1], SHOTS, n_shots=(0, 1, 2), separator=";", measure=measure
    )
    none, one, two = (call[0][0] for call in measure.calls)
    assert none == ITEMS[0].question
    assert one.endswith(";" + none) and two.startswith(one[: -len(none)])
    assert sum(f"Q{i} a{i};" in two for i in range(4)) == 2
    assert curve.details["mean_shots"] == [0, 1, 2]
    again = Asked()
    few_shot_attack(
        plain(llama), tokenizer, ITEMS[:1], SHOTS, n_shots=(0, 1, 2), separator=";", measure=again
    )
    assert again.calls == measure.calls


def test_shots_that_the_context_cannot_hold_are_left_out_and_counted(llama, tokenizer):
    long = [Item("word " * 8 + str(i), "x") for i in range(4)]
    curve = few_shot_attack(plain(llama), tokenizer, ITEMS, long, n_shots=(0, 1, 4))
    assert curve.details["mean_shots"][-1] < 4
    longest = Asked()
    few_shot_attack(plain(llama), tokenizer, ITEMS, long, n_shots=(4,), measure=longest)
    assert max(len(tokenizer(p)["input_ids"]) for p, _ in longest.calls[0]) < CONTEXT


def test_paraphrases_keep_the_best_so_far_and_the_mean_of_each(llama, tokenizer):
    known = {"France has": 0.5, "In France it is": 0.25, "It is iron that": 1.0, "Iron": 0.125}
    measure = Asked(lambda pair: known.get(pair[0], 0.0))
    curve = paraphrase_attack(plain(llama), tokenizer, ITEMS[:2], measure=measure)
    assert curve.values.tolist() == [[0, 0.125], [0.5, 1.0], [0.5, 1.0]]
    assert curve.details["mean_by_prompt"] == [0.75, 0.25]
    assert curve.details["n_reworded"] == 0
    assert curve.spent.tolist() == [0, 1, 2]
    assert measure.calls[1][0] == ("France has", " Paris")


def test_an_item_without_paraphrases_is_reworded_by_rule_and_counted(llama, tokenizer):
    measure = Asked()
    curve = paraphrase_attack(plain(llama), tokenizer, ITEMS, n_prompts=1, measure=measure)
    assert curve.details["n_reworded"] == 1
    assert len(curve.spent) == 2 and measure.calls[1][2] == ("Please answer.\nWater:", " boils")


def test_framings_are_tried_in_order(llama, tokenizer):
    measure = Asked(lambda pair: float(pair[0].startswith("Play:")))
    framings = {"none": "{prompt}", "play": "Play: {prompt}"}
    curve = framing_attack(plain(llama), tokenizer, ITEMS, framings=framings, measure=measure)
    assert curve.values.mean(axis=1).tolist() == [0, 0, 1]
    assert curve.details["mean_by_framing"] == {"none": 0.0, "play": 1.0}
    assert curve.details["n_unframed"] == 0


def test_a_framing_that_does_not_fit_is_left_off_and_counted(llama, tokenizer):
    measure = Asked()
    framings = {"long": "word " * CONTEXT + "{prompt}"}
    curve = framing_attack(plain(llama), tokenizer, ITEMS, framings=framings, measure=measure)
    assert measure.calls[1] == measure.calls[0]
    assert curve.details["n_unframed"] == 3


@pytest.mark.parametrize("attack", [prefill_attack, paraphrase_attack, framing_attack])
def test_nothing_to_ask_is_an_error(llama, tokenizer, attack):
    with pytest.raises(ValueError, match="items is empty"):
        attack(plain(llama), tokenizer, [])
    with pytest.raises(ValueError, match=r"item 1 \('a text'\) has no answer"):
        attack(plain(llama), tokenizer, [ITEMS[0], Item("a text")])


def test_what_cannot_be_tried_is_an_error(llama, tokenizer):
    subject = plain(llama)
    with pytest.raises(ValueError, match=r"tokens=\(2, 1\) must ascend"):
        prefill_attack(subject, tokenizer, ITEMS, tokens=(2, 1))
    with pytest.raises(ValueError, match="4 shots for n_shots=5; give more"):
        few_shot_attack(subject, tokenizer, ITEMS, SHOTS, n_shots=(5,))
    with pytest.raises(ValueError, match="1 items are among the shots: 'Iron rusts"):
        few_shot_attack(subject, tokenizer, ITEMS, [*SHOTS, ITEMS[1]])
    with pytest.raises(ValueError, match="n_prompts=0 must be at least 1"):
        paraphrase_attack(subject, tokenizer, ITEMS, n_prompts=0)
    with pytest.raises(ValueError, match="framings is empty"):
        framing_attack(subject, tokenizer, ITEMS, framings={})
