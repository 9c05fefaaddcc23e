import numpy as np
import pytest
import torch
from cases import build_model

from manifold_unlearn.evaluate.fluency import n_gram_entropy, reference_fluency, repetition
from manifold_unlearn.evaluate.likelihood import (
    answer_log_probabilities,
    greedy_answers,
    plain,
)

PROMPTS = ["Water", "The capital of France is", "A quick brown fox"]


def test_entropy_by_hand():
    """a b a b c: bigrams ab ab ba bc, trigrams aba bab abc; (2/3 * 1.5 + 4/3 * log2 3) / 2."""
    assert n_gram_entropy("a b a b c") == pytest.approx((1.0 + 4 / 3 * np.log2(3)) / 2)
    assert n_gram_entropy("a a a a a a") == 0
    assert n_gram_entropy("") == 0
    assert n_gram_entropy("one two") == 0


def test_entropy_of_distinct_words_is_the_logarithm_of_their_number():
    text = " ".join(f"w{i}" for i in range(18))
    assert n_gram_entropy(text) == pytest.approx((2 / 3 * np.log2(17) + 4 / 3 * np.log2(16)) / 2)


def test_repetition_by_hand():
    assert repetition("a b c d e") == 0
    assert repetition("a b a b a b", n=2) == pytest.approx(1 - 2 / 5)
    assert repetition("a a a a a a a") == pytest.approx(1 - 1 / 4)
    assert repetition("a b") == 0
    assert repetition("мир мир мир", n=1) == 0
    assert repetition("мир мир мир", n=1, words="unicode") == pytest.approx(2 / 3)


def test_the_reference_is_as_fluent_as_itself(llama, tokenizer):
    said = greedy_answers(plain(llama), tokenizer, PROMPTS, max_new_tokens=6)
    found = reference_fluency(plain(llama), tokenizer, PROMPTS, said, said)
    expected = [float(not text.strip()) or 1 - repetition(text) for text in said]
    np.testing.assert_allclose(found.values, expected)


def test_fluency_by_hand(llama, tokenizer):
    said = [" of a", "", " and it is"]
    other = [" is", " x", " and"]
    found = reference_fluency(plain(llama), tokenizer, PROMPTS, said, other)
    for i in (0, 2):
        pairs = [(PROMPTS[i], said[i]), (PROMPTS[i], other[i])]
        a, b = (
            np.exp(row.double().numpy().mean())
            for row in answer_log_probabilities(plain(llama), tokenizer, pairs)
        )
        assert found.values[i] == pytest.approx(min(a / b, 1), rel=1e-5)
    assert found.values[1] == 0
    silent = reference_fluency(plain(llama), tokenizer, PROMPTS[:1], [" "], [""])
    assert silent.mean == 1


def test_another_model_is_less_fluent(llama, tokenizer):
    """Negative control: what a stranger says is unlikely to a reference that learned a language."""
    ids = tokenizer("the dog jumps over the lazy fox. " * 4, return_tensors="pt").input_ids
    adam = torch.optim.Adam(llama.parameters(), lr=0.01)
    for _ in range(40):
        adam.zero_grad()
        llama(input_ids=ids, labels=ids).loss.backward()
        adam.step()
    reference, stranger = plain(llama), plain(build_model("llama", seed=7))
    prompts = ["the dog jumps", "over the lazy", "fox. the dog"]
    own, strange = (
        greedy_answers(subject, tokenizer, prompts, max_new_tokens=8)
        for subject in (reference, stranger)
    )
    assert reference_fluency(reference, tokenizer, prompts, own, own).mean > 0.9
    assert reference_fluency(reference, tokenizer, prompts, strange, own).mean < 0.1


def test_answers_must_be_paired(llama, tokenizer):
    with pytest.raises(ValueError, match="0 prompts, 0 and 0 answers"):
        reference_fluency(plain(llama), tokenizer, [], [], [])
    with pytest.raises(ValueError, match="1 prompts, 2 and 1 answers"):
        reference_fluency(plain(llama), tokenizer, ["a"], ["b", "c"], ["d"])


def test_garbage_longer_than_the_context_is_cut(llama, tokenizer):
    found = reference_fluency(plain(llama), tokenizer, ["Water"], ["q" * 99], [" is"])
    assert 0 <= found.mean <= 1
    with pytest.raises(ValueError, match="tokens; the model takes 64"):
        answer_log_probabilities(plain(llama), tokenizer, [("Water", "q" * 99)])
