from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_unlearn.evaluate.metrics import (
    answer_probability,
    answer_rank,
    forget_quality,
    harmonic_mean,
    perplexity,
    rouge_l_recall,
    truth_ratio,
    truth_ratio_preference,
    truth_ratio_symmetric,
)


def logs(*probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_probability_is_the_geometric_mean_over_tokens():
    found = answer_probability([logs(0.5, 0.125), logs(0.3)])
    np.testing.assert_allclose(found, [0.25, 0.3])
    assert found.dtype == np.float64


def test_perplexity_is_over_tokens_not_over_texts():
    """-(log 1/2 + log 1/8 + log 1/4) / 3 = log 4."""
    assert perplexity([logs(0.5, 0.125), logs(0.25)]) == pytest.approx(4.0)
    assert perplexity([logs(0.5, 0.5, 0.5), logs(0.125)]) == pytest.approx(64 ** (1 / 4))


def test_perplexity_of_even_odds_is_the_vocabulary():
    assert perplexity([logs(*[1 / 300] * 7)]) == pytest.approx(300)


def test_rank_counts_the_alternatives_as_probable():
    assert answer_rank(0.5, [0.1, 0.2]) == 1
    assert answer_rank(0.5, [0.1, 0.7, 0.6]) == 3
    assert answer_rank(0.5, [0.5]) == 2
    assert answer_rank(0.5, []) == 1


def test_truth_ratio_by_hand():
    """Geometric mean of 0.1 and 0.4 is 0.2."""
    assert truth_ratio(0.8, [0.1, 0.4]) == pytest.approx(0.25)
    assert truth_ratio(0.1, [0.1, 0.4]) == pytest.approx(2)
    assert truth_ratio(0.3, [0.3]) == pytest.approx(1)


def test_truth_ratio_stays_finite_at_zero_probabilities():
    assert np.isfinite(truth_ratio(0.0, [1.0]))
    assert truth_ratio(1.0, [0.0]) > 0


def test_truth_ratio_needs_a_wrong_answer():
    with pytest.raises(ValueError, match="needs at least one perturbed_answer"):
        truth_ratio(0.5, [])


def test_the_two_published_forms():
    ratios = np.array([0.25, 1.0, 4.0])
    np.testing.assert_allclose(truth_ratio_symmetric(ratios), [0.25, 1, 0.25])
    np.testing.assert_allclose(truth_ratio_preference(ratios), [0.75, 0, 0])


@pytest.mark.parametrize(
    ("said", "wanted", "recall"),
    [
        ("the cat sat", "the cat sat on the mat", 3 / 6),
        ("mat the on sat cat the", "the cat sat", 2 / 3),
        ("It is Paris, of course!", "paris", 1),
        ("", "paris", 0),
        ("x-ray 2nd", "X ray, 2nd", 1),
        ("a b a c", "a c a b", 2 / 4),
    ],
)
def test_rouge_by_hand(said, wanted, recall):
    assert rouge_l_recall(said, wanted) == pytest.approx(recall)


def brute_force(a, b):
    """Longest common subsequence by its recursion."""

    @cache
    def longest(i, j):
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return longest(0, 0)


words = st.lists(st.sampled_from(["ab", "cd", "e", "ab3"]), max_size=9)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(said=words, wanted=words.filter(bool))
def test_rouge_is_the_longest_common_subsequence(said, wanted):
    expected = brute_force(tuple(said), tuple(wanted)) / len(wanted)
    assert rouge_l_recall(" ".join(said), ", ".join(wanted)) == pytest.approx(expected)


def test_a_stemmer_is_used_on_longer_words_only():
    stem = lambda word: word.rstrip("s")  # noqa: E731
    assert rouge_l_recall("cats and his", "cat and hi") == pytest.approx(1 / 3)
    assert rouge_l_recall("cats and his", "cat and hi", stem=stem) == pytest.approx(2 / 3)


def test_a_reference_without_words_is_refused():
    with pytest.raises(ValueError, match="reference answer '...' has no words"):
        rouge_l_recall("x", "...")


def test_forget_quality_of_a_model_with_itself():
    ratios = np.linspace(0.1, 3, 40)
    same = forget_quality(ratios, ratios)
    assert (same["ks_statistic"], same["wasserstein"]) == (0, 0)
    assert same["p_value"] == pytest.approx(1)


def test_forget_quality_by_hand():
    """1 / (1 + r) is 1/2 against 1/4 everywhere; the distributions do not overlap."""
    apart = forget_quality(np.ones(30), np.full(30, 3.0))
    assert apart["ks_statistic"] == 1
    assert apart["wasserstein"] == pytest.approx(0.25)
    assert apart["p_value"] < 1e-10


def test_harmonic_mean_by_hand():
    assert harmonic_mean([1, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert harmonic_mean([1, 0, 0.5]) == 0
