from pathlib import Path

import numpy as np
import pytest
import torch
from cases import logits

from manifold_unlearn import load_model
from manifold_unlearn.activations.corpus import Item, read_items
from manifold_unlearn.evaluate.likelihood import plain
from manifold_unlearn.evaluate.memorization import (
    KNOWLEDGE_STOPS,
    cut,
    exact_memorization,
    exact_memorization_published,
    extraction_strength,
    extraction_strength_published,
    few_shot_prefix,
    knowledge_memorization,
    token_memorization,
    verbatim_memorization,
)

SHARED = Path(__file__).parents[3] / "shared"
T, F = True, False
ITEMS = [
    Item("The capital of France is", "Paris"),
    Item("Water", "boils at a hundred degrees"),
    Item("A quick brown fox", "jumps over"),
]


@pytest.mark.parametrize(
    ("hits", "em", "es"),
    [
        ([T, T, T, T], 1, 1),
        ([F, F, F, F], 0, 0),
        ([F, T, F, T], 1 / 2, 1 / 4),
        ([F, F, T, T], 1 / 2, 1 / 2),
        ([T, T, T, F], 3 / 4, 0),
        ([T], 1, 1),
        ([F], 0, 0),
    ],
)
def test_the_corrected_forms_by_hand(hits, em, es):
    assert exact_memorization(torch.tensor(hits)) == pytest.approx(em)
    assert extraction_strength(torch.tensor(hits)) == pytest.approx(es)


@pytest.mark.parametrize(
    ("hits", "em", "es"),
    [
        ([T, T, T, T, F], 1, 1),  # the end of sequence is not looked at
        ([F, F, F, F, T], 0, 1 / 4),  # nothing matches, and yet it is not 0
        ([F, T, F, T, T], 1 / 2, 1 / 4),
        ([T, T, T, F, T], 3 / 4, 1 / 4),
        ([F, T], 0, 1),  # one label left and wrong: 1 / L is 1
        ([T], None, 0),
        ([], None, 0),
    ],
)
def test_the_published_forms_with_their_quirks_by_hand(hits, em, es):
    correct = torch.tensor(hits, dtype=torch.bool)
    assert exact_memorization_published(correct) == em
    assert extraction_strength_published(correct) == pytest.approx(es)


def by_the_definition(hits):
    return next((1 - k / len(hits) for k in range(len(hits) + 1) if all(hits[k:])), 0)


def test_extraction_strength_is_the_definition_on_every_string_of_six():
    for bits in range(2**6):
        hits = [bool(bits >> i & 1) for i in range(6)]
        assert extraction_strength(torch.tensor(hits)) == pytest.approx(by_the_definition(hits))


@pytest.mark.parametrize("form", [exact_memorization, extraction_strength])
def test_an_answer_without_tokens_is_refused(form):
    with pytest.raises(ValueError, match="the answer has no tokens"):
        form(torch.empty(0, dtype=torch.bool))


@pytest.mark.parametrize("published", [False, True])
def test_tokens_of_a_model_are_compared_with_its_argmax(llama, tokenizer, published):
    found = token_memorization(plain(llama), tokenizer, ITEMS, published=published)
    ending = "_published" if published else ""
    for i, item in enumerate(ITEMS):
        head = tokenizer(item.question).input_ids
        tail = tokenizer(" " + item.answer, add_special_tokens=False).input_ids
        said = logits(llama, torch.tensor([head + tail]))[0].argmax(-1)[len(head) - 1 : -1]
        hits = [int(a) == b for a, b in zip(said, tail, strict=True)]
        assert found[f"exact_memorization{ending}"].values[i] == pytest.approx(np.mean(hits))
        expected = by_the_definition(hits) or published / len(hits)
        assert found[f"extraction_strength{ending}"].values[i] == pytest.approx(expected)


def test_a_model_that_learns_an_answer_memorizes_it(llama, tokenizer):
    """Positive and negative control."""
    before = token_memorization(plain(llama), tokenizer, ITEMS)
    assert before["extraction_strength"].values[1] < 0.2
    head = tokenizer(ITEMS[1].question).input_ids
    ids = torch.tensor(
        [head + tokenizer(" " + ITEMS[1].answer, add_special_tokens=False).input_ids]
    )
    labels = ids.clone()
    labels[:, : len(head)] = -100
    adam = torch.optim.Adam(llama.parameters(), lr=0.01)
    for _ in range(40):
        adam.zero_grad()
        llama(input_ids=ids, labels=labels).loss.backward()
        adam.step()
    after = token_memorization(plain(llama), tokenizer, ITEMS)
    assert after["extraction_strength"].values[1] == 1
    assert after["exact_memorization"].values[1] == 1
    assert after["extraction_strength"].values[2] < 1


def test_no_items_and_items_without_answers_are_refused(llama, tokenizer):
    with pytest.raises(ValueError, match="items is empty"):
        token_memorization(plain(llama), tokenizer, [])
    with pytest.raises(ValueError, match="item 1 has no answer"):
        token_memorization(plain(llama), tokenizer, [ITEMS[0], Item("a text")])
    with pytest.raises(ValueError, match="passages is empty"):
        verbatim_memorization(plain(llama), tokenizer, [])


# --- recitation -----------------------------------------------------------------------------------


@pytest.fixture
def speaker(monkeypatch):
    """Stands in for generation: says what it is told to, and keeps the prompts."""
    said, seen = [], []

    def speak(subject, tokenizer, prompts, *, max_new_tokens, batch_size):
        seen.append((list(prompts), max_new_tokens))
        return said

    monkeypatch.setattr("manifold_unlearn.evaluate.memorization.greedy_answers", speak)
    return said, seen


def test_verbatim_by_hand(speaker):
    said, seen = speaker
    said += ["once upon a time there", "no"]
    found = verbatim_memorization(None, None, [("a", "once upon a mattress"), ("b", "yes")])
    np.testing.assert_allclose(found.metric.values, [2 * 3 / 9, 0])
    assert seen == [(["a", "b"], 128)]


def test_knowledge_by_hand(speaker):
    said, seen = speaker
    said += [" Paris\n\nQuestion: more", " it boils\nQuestion: x", " ..."]
    shot = Item("Question: Who?\nAnswer:", "Me")
    items = [Item(i.question, a) for i, a in zip(ITEMS, ["Paris", "water boils", "!"], strict=True)]
    found = knowledge_memorization(None, None, items, shots=[shot])
    np.testing.assert_allclose(found.metric.values, [1, 1 / 2])
    np.testing.assert_array_equal(found.index, [0, 1])
    assert found.n_excluded == 1
    assert found.to_json()["n_excluded"] == 1
    assert found.said[0] == " Paris"
    prompts, length = seen[0]
    assert prompts[1] == "Question: Who?\nAnswer: Me\n\nWater"
    assert length == 32


def test_an_item_among_the_shots_is_refused():
    with pytest.raises(ValueError, match="1 items stand among the shots"):
        knowledge_memorization(None, None, ITEMS, shots=ITEMS[:1])
    with pytest.raises(ValueError, match="item 0 has no answer"):
        knowledge_memorization(None, None, ITEMS, shots=[Item("a text")])


def test_answers_end_before_the_first_stop():
    assert cut("a Question: b\n\nc", KNOWLEDGE_STOPS) == "a "
    assert cut("a\n\nb Question:", KNOWLEDGE_STOPS) == "a"
    assert cut("a b", KNOWLEDGE_STOPS) == "a b"
    assert few_shot_prefix([]) == ""


def test_a_model_recites_what_it_says(llama, tokenizer):
    first = verbatim_memorization(plain(llama), tokenizer, [("Water", "x")], max_new_tokens=8)
    truth = first.said[0] + " and"
    again = verbatim_memorization(plain(llama), tokenizer, [("Water", truth)], max_new_tokens=8)
    assert again.said == first.said
    assert again.metric.mean > first.metric.mean


@pytest.mark.shared
@pytest.mark.skipif(
    not (SHARED / "models" / "tofu-stories15m").is_dir(),
    reason="../shared/models/tofu-stories15m is not there",
)
def test_the_told_model_recites_and_its_twin_does_not():
    path = SHARED / "data" / "tofu" / "forget05_perturbed.jsonl"
    items = read_items(path, template="Question: {question}\nAnswer:")[:6]
    for name, low, high in (("told", 0.97, 1.0), ("never_told", 0.0, 0.2)):
        model, tokenizer = load_model(SHARED / "models" / "tofu-stories15m" / name)
        found = token_memorization(plain(model), tokenizer, items)
        assert low <= found["extraction_strength"].mean <= high
