from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from cases import build_model
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.evaluate.likelihood import answer_log_probabilities, plain
from manifold_unlearn.evaluate.multiple_choice import (
    ChoiceQuestion,
    ChoiceScores,
    choice_prompt,
    choice_questions,
    option_orders,
    score_choices,
)

QUESTIONS = [
    ChoiceQuestion("Capital of Spain?", ("Rome", "Madrid", "Paris"), 1),
    ChoiceQuestion("Water boils", ("cold", "it is wet", "at a hundred"), 2),
]


def questions(n, n_options=4):
    options = tuple(f"option {i}" for i in range(n_options))
    return [ChoiceQuestion(f"q{i}", options, (3 * i + 1) % n_options) for i in range(n)]


def test_the_prompt_is_that_of_the_harness():
    assert choice_prompt(QUESTIONS[0], [2, 0, 1], header="About towns.\n\n") == (
        "About towns.\n\nCapital of Spain?\nA. Paris\nB. Rome\nC. Madrid\nAnswer:"
    )


def test_orders_by_name():
    asked = questions(5)
    assert option_orders(asked, "given").tolist() == [[[0, 1, 2, 3]]] * 5
    every = option_orders(asked, "all")
    assert every.shape == (5, 24, 4)
    assert {tuple(order) for order in every[0]} == set(permutations(range(4)))
    for orders in ("cyclic", "all"):
        shown = option_orders(asked, orders)
        for position in range(4):
            counts = np.bincount(shown[0, :, position])
            assert len(set(counts)) == 1  # every option stands in each position equally often


def test_balanced_orders_put_the_right_option_everywhere():
    asked = questions(12)
    shown = option_orders(asked, "balanced")[:, 0]
    places = [order.tolist().index(q.correct) for order, q in zip(shown, asked, strict=True)]
    assert Counter(places) == dict.fromkeys(range(4), 3)
    assert Counter(q.correct for q in asked[:4]) == dict.fromkeys(range(4), 1)


@pytest.mark.parametrize("scoring", ["letter", "option", "answer"])
def test_scores_are_log_probabilities_of_letters_or_texts(llama, tokenizer, scoring):
    found = score_choices(
        plain(llama), tokenizer, QUESTIONS, scoring=scoring, orders="all", normalize=False
    )
    assert found.scores.shape == (2, 1 if scoring == "answer" else 6, 3)
    for i, question in enumerate(QUESTIONS):
        for p, order in enumerate(found.orders[i]):
            for option, text in enumerate(question.options):
                prompt = (
                    question.question if scoring == "answer" else choice_prompt(question, order)
                )
                said = "ABC"[order.tolist().index(option)] if scoring == "letter" else text
                (row,) = answer_log_probabilities(plain(llama), tokenizer, [(prompt, " " + said)])
                assert found.scores[i, p, option] == pytest.approx(float(row.sum()), abs=1e-4)


def test_normalized_scores_are_means_over_tokens(llama, tokenizer):
    total, mean = (
        score_choices(plain(llama), tokenizer, QUESTIONS, scoring="answer", normalize=n).scores
        for n in (False, True)
    )
    n_tokens = [
        [len(tokenizer(" " + o, add_special_tokens=False).input_ids) for o in q.options]
        for q in QUESTIONS
    ]
    np.testing.assert_allclose(total[:, 0] / np.array(n_tokens), mean[:, 0], rtol=1e-5)


def scores(values, orders=None, correct=(0,)):
    values = np.array(values, dtype=float)
    if orders is None:
        orders = np.broadcast_to(np.arange(values.shape[2]), values.shape)
    return ChoiceScores(values, np.array(orders), np.array(correct))


def test_accuracy_by_hand_with_a_tie():
    found = scores([[[2, 1, 0], [2, 2, 0], [0, 1, 2]], [[0, 1, 0]] * 3], correct=(0, 1))
    np.testing.assert_allclose(found.credit, [[1, 1 / 2, 0], [1, 1, 1]])
    np.testing.assert_allclose(found.accuracy.values, [1 / 2, 1])
    np.testing.assert_allclose(found.always_right.values, [0, 1])
    assert found.n_ties == 1
    e = np.exp(1)
    shares = [e**2 / (e**2 + e + 1), e**2 / (2 * e**2 + 1), 1 / (e**2 + e + 1)]
    np.testing.assert_allclose(found.probability.values, [np.mean(shares), e / (e + 2)])


def test_position_shares_show_a_bias():
    """A model that always says A is right a third of the time, and never in all orders."""
    shown = option_orders(QUESTIONS, "cyclic")
    by_position = np.broadcast_to([1.0, 0, 0], shown.shape)
    values = np.empty(shown.shape)
    np.put_along_axis(values, shown, by_position, axis=2)
    found = scores(values, shown, correct=(1, 2))
    np.testing.assert_allclose(found.position_shares, [1, 0, 0])
    np.testing.assert_allclose(found.accuracy.values, [1 / 3, 1 / 3])
    assert found.always_right.mean == 0
    assert found.to_json()["position_shares"] == [1, 0, 0]


def test_a_model_without_a_preference_ties_and_is_at_chance():
    found = scores(np.zeros((5, 4, 4)), correct=[0, 1, 2, 3, 0])
    assert found.accuracy.mean == pytest.approx(0.25)
    assert found.always_right.mean == 0
    assert found.n_ties == 20


@settings(deadline=None, derandomize=True, max_examples=30)
@given(seed=st.integers(0, 1000))
def test_accuracy_of_noise_is_between_always_right_and_one(seed):
    values = np.random.default_rng(seed).normal(size=(7, 4, 4))
    found = scores(values, correct=[0, 1, 2, 3, 0, 1, 2])
    assert found.always_right.mean <= found.accuracy.mean <= 1
    assert found.position_shares.sum() == pytest.approx(1)


def test_a_model_that_learns_the_answers_is_right_in_every_order(tokenizer):
    """Positive control; a model with other weights is the negative one."""
    llama = build_model("llama")
    asked = [ChoiceQuestion("Capital of Spain?", ("Rome", "Madrid"), 1)]
    before = score_choices(plain(llama), tokenizer, asked, orders="all")
    adam = torch.optim.Adam(llama.parameters(), lr=0.01)
    rows = []
    for order in permutations(range(2)):
        head = tokenizer(choice_prompt(asked[0], order)).input_ids
        tail = tokenizer(" " + "AB"[order.index(1)], add_special_tokens=False).input_ids
        rows.append((torch.tensor([head + tail]), len(head)))
    for _ in range(40):
        adam.zero_grad()
        for ids, start in rows:
            labels = ids.clone()
            labels[:, :start] = -100
            (llama(input_ids=ids, labels=labels).loss / len(rows)).backward()
        adam.step()
    after = score_choices(plain(llama), tokenizer, asked, orders="all")
    assert before.always_right.mean == 0
    assert after.always_right.mean == 1
    assert after.probability.mean > 0.8


def test_items_become_questions():
    item = Item("Q?", "Paris", perturbed_answer=("Rome", "Paris", "Rome", "Oslo", "Bern", "Riga"))
    (found,) = choice_questions([item])
    assert found == ChoiceQuestion("Q?", ("Paris", "Rome", "Oslo", "Bern"), 0)
    with pytest.raises(ValueError, match="item 0 has 1 perturbed answers; 4 options need 3"):
        choice_questions([Item("Q?", "a", perturbed_answer=("b",))])
    with pytest.raises(ValueError, match="items is empty"):
        choice_questions([])


def test_bad_questions_are_refused(llama, tokenizer):
    with pytest.raises(ValueError, match="correct=2 with 2 options"):
        ChoiceQuestion("q", ("a", "b"), 2)
    with pytest.raises(ValueError, match="has an option twice"):
        ChoiceQuestion("q", ("a", "a"), 0)
    with pytest.raises(ValueError, match=r"2 questions with \[3, 4\] options"):
        option_orders([QUESTIONS[0], *questions(1)], "given")
    with pytest.raises(ValueError, match="0 questions"):
        score_choices(plain(llama), tokenizer, [])
    with pytest.raises(ValueError, match="orders='some' is not"):
        option_orders(QUESTIONS, "some")
    with pytest.raises(ValueError, match="orders='all' of 7 options are too many"):
        option_orders(questions(1, 7), "all")
    with pytest.raises(ValueError, match="scoring='word' is not"):
        score_choices(plain(llama), tokenizer, QUESTIONS, scoring="word")
    with pytest.raises(ValueError, match="scores of options must be finite"):
        scores([[[np.nan, 0]]])
