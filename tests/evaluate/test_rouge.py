from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_unlearn.evaluate.rouge import (
    longest_common_subsequence,
    rouge_l,
    rouge_l_f1,
    rouge_l_recall,
    split_words,
)


@pytest.mark.parametrize(
    ("said", "wanted", "f1"),
    [
        ("the cat sat", "the cat sat on the mat", 2 * 3 / 9),
        ("mat the on sat cat the", "the cat sat", 2 * 2 / 9),
        ("It is Paris, of course!", "paris", 2 / 6),
        ("", "paris", 0),
        ("Paris", "paris", 1),
    ],
)
def test_f1_by_hand(said, wanted, f1):
    """2 LCS / (words said + words wanted)."""
    assert rouge_l_f1(said, wanted) == pytest.approx(f1)


def brute_force(a, b):
    @cache
    def longest(i, j):
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return longest(0, 0)


words = st.lists(st.sampled_from("abcd"), max_size=70)


short = st.lists(st.sampled_from(["ab", "cd", "e", "ab3"]), max_size=9)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(a=words, b=words)
def test_the_longest_common_subsequence_is_that_of_its_recursion(a, b):
    """Longer than 64 words too, where machine words end."""
    assert longest_common_subsequence(a, b) == brute_force(tuple(a), tuple(b))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(said=words.filter(bool), wanted=words.filter(bool))
def test_f1_is_symmetric_and_between_recall_and_precision(said, wanted):
    said, wanted = " ".join(said), " ".join(wanted)
    f1, recall, precision = (
        rouge_l_f1(said, wanted),
        rouge_l_recall(said, wanted),
        rouge_l_recall(wanted, said),
    )
    assert f1 == pytest.approx(rouge_l_f1(wanted, said))
    assert min(recall, precision) - 1e-12 <= f1 <= max(recall, precision) + 1e-12


def test_references_without_words_are_left_out_and_counted():
    found = rouge_l(["x y", "Paris", "x"], ["...", "Paris", "Москва"])
    np.testing.assert_array_equal(found.index, [1])
    np.testing.assert_allclose(found.values, [1])
    assert found.n_excluded == 2


def test_words_of_any_script_by_name():
    found = rouge_l(["в Москве", "北京", "नमस्ते"], ["в Москва", "北京市", "नमस्ते"], words="unicode")
    np.testing.assert_allclose(found.values, [1 / 2, 2 / 3, 1])
    assert found.n_excluded == 0
    assert split_words("Zoë's café_bar, 2nd", "unicode") == ["zoë", "s", "café", "bar", "2nd"]
    assert split_words("Zoë's café_bar, 2nd") == ["zo", "s", "caf", "bar", "2nd"]


def test_f1_form_and_recall_form():
    said, wanted = ["the cat sat here now"], ["the cat"]
    assert rouge_l(said, wanted).values[0] == 1
    assert rouge_l(said, wanted, form="f1").values[0] == pytest.approx(4 / 7)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="none of 2 references has words in ascii counting"):
        rouge_l(["a", "b"], ["...", "ж"])
    with pytest.raises(ValueError, match="1 answers for 2 references"):
        rouge_l(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="words='latin' is not"):
        rouge_l_recall("a", "a", words="latin")


def test_parity_with_the_rouge_package_and_its_stemmer():
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    from nltk.stem.porter import PorterStemmer

    theirs = scorer.RougeScorer(["rougeL"], use_stemmer=True)
    stem = PorterStemmer().stem
    pairs = [
        ("The cats were running quickly", "A cat runs quick, the cats ran"),
        ("Paris, France's capital — 2nd of many", "the capital of france is paris"),
        ("", "something here"),
        ("one two three four five " * 20, "five four three two one " * 20),
    ]
    for said, wanted in pairs:
        expected = theirs.score(wanted, said)["rougeL"]
        assert rouge_l_recall(said, wanted, stem=stem) == pytest.approx(expected.recall)
        assert rouge_l_f1(said, wanted, stem=stem) == pytest.approx(expected.fmeasure)


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


@settings(deadline=None, derandomize=True, max_examples=60)
@given(said=short, wanted=short.filter(bool))
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
