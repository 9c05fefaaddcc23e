from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
from cases import build_model, build_tokenizer, logits
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.evaluate.likelihood import greedy_answers, plain
from manifold_unlearn.evaluate.sampling import (
    draw,
    leak_at_k,
    sample_answers,
    sampled_leakage,
    uniforms,
)

PROMPTS = ["Water", "The capital of France is", "A quick brown fox jumps over the lazy dog", "x"]


@pytest.fixture(params=["llama", "gpt2", "gemma3"])
def speaker(request):
    return build_model(request.param)


def test_neither_the_batch_nor_the_company_nor_the_number_matters(speaker, tokenizer):
    whole = sample_answers(plain(speaker), tokenizer, PROMPTS, 3, max_new_tokens=6, random_state=4)
    assert [len(texts) for texts in whole] == [3] * 4
    assert len({text for texts in whole for text in texts}) > 6
    for batch_size in (1, 3):
        again = sample_answers(
            plain(speaker),
            build_tokenizer("left"),
            PROMPTS[::-1],
            3,
            max_new_tokens=6,
            random_state=4,
            batch_size=batch_size,
        )
        assert again[::-1] == whole
    more = sample_answers(
        plain(speaker), tokenizer, PROMPTS[1:2], 5, max_new_tokens=6, random_state=4
    )
    assert more[0][:3] == whole[1]


def test_another_seed_gives_other_samples(llama, tokenizer):
    first, second = (
        sample_answers(plain(llama), tokenizer, PROMPTS, 2, max_new_tokens=8, random_state=seed)
        for seed in (0, 1)
    )
    assert first != second


def test_samples_follow_the_random_numbers_step_by_step(llama, tokenizer):
    """One full forward pass a token, and the inverse of the cumulative distribution by hand."""
    texts = sample_answers(
        plain(llama), tokenizer, PROMPTS[:2], 2, max_new_tokens=5, temperature=0.7, random_state=2
    )
    for prompt, found in zip(PROMPTS[:2], texts, strict=True):
        numbers = uniforms(prompt, 2, 5, 2)
        for sample in range(2):
            ids = tokenizer(prompt).input_ids
            n = len(ids)
            for step in range(5):
                p = (logits(llama, torch.tensor([ids]))[0, -1].double() / 0.7).softmax(-1).numpy()
                ids.append(int((p.cumsum() <= numbers[sample, step] * p.sum()).sum()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
            assert tokenizer.decode(ids[n:], skip_special_tokens=True) == found[sample]


def test_a_low_temperature_and_a_low_top_p_are_greedy(llama, tokenizer):
    greedy = greedy_answers(plain(llama), tokenizer, PROMPTS, max_new_tokens=6)
    for settings_ in ({"temperature": 1e-4}, {"top_p": 1e-6}):
        found = sample_answers(plain(llama), tokenizer, PROMPTS, 1, max_new_tokens=6, **settings_)
        assert [texts[0] for texts in found] == greedy


def test_samples_end_with_the_context(tokenizer):
    for name in ("gpt2", "llama"):
        short = build_model(name)
        prompt = "x" * 60
        n = len(tokenizer(prompt).input_ids)
        assert 40 < n <= 64
        (texts,) = sample_answers(plain(short), tokenizer, [prompt], 2, max_new_tokens=99)
        assert all(texts)


def test_drawing_by_hand():
    p = torch.tensor([[0.1, 0.6, 0.3]]).repeat(6, 1)
    u = torch.tensor([0.0, 0.09, 0.11, 0.69, 0.71, 0.999999], dtype=torch.float64)
    assert draw(p.log(), u).tolist() == [0, 0, 1, 1, 2, 2]
    assert draw(p.log(), u, top_p=0.6).tolist() == [1] * 6
    assert draw(p.log(), u, top_p=0.7).tolist() == [1, 1, 1, 2, 2, 2]  # .6 and .3 are left


def test_draws_have_the_frequencies_of_the_distribution():
    p = torch.tensor([0.05, 0.5, 0.15, 0.3])
    n = 20_000
    u = torch.from_numpy(np.random.default_rng(0).random(n))
    found = torch.bincount(draw(p.log().expand(n, -1), u), minlength=4) / n
    torch.testing.assert_close(found, p, atol=0.015, rtol=0)  # four standard errors


def test_random_numbers_grow_without_changing():
    few, many = uniforms("a", 2, 3, 0), uniforms("a", 5, 9, 0)
    np.testing.assert_array_equal(many[:2, :3], few)
    assert not np.isin(uniforms("b", 2, 3, 0), few).any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_samples": 0}, "n_samples=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"top_p": 1.5}, r"top_p=1.5 in \(0, 1\]"),
        ({"prompts": []}, "texts is empty"),
    ],
)
def test_parameters_out_of_range_are_refused(llama, tokenizer, changes, words):
    keywords = {"prompts": PROMPTS, "n_samples": 1} | changes
    with pytest.raises(ValueError, match=words):
        sample_answers(plain(llama), tokenizer, **keywords)


def test_a_model_that_gives_nan_is_refused(llama, tokenizer):
    with torch.no_grad():
        llama.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="log-probabilities are NaN"):
        sample_answers(plain(llama), tokenizer, PROMPTS, 1)


# --- leak@k ---------------------------------------------------------------------------------------


def test_leak_by_hand():
    """Pairs of 0, .5, 1: maxima .5, 1, 1."""
    scores = np.array([[0.5, 1.0, 0.0]])
    np.testing.assert_allclose(leak_at_k(scores, 1), [0.5])
    np.testing.assert_allclose(leak_at_k(scores, 2), [2.5 / 3])
    np.testing.assert_allclose(leak_at_k(scores, 3), [1])


rows = st.lists(st.floats(0, 1), min_size=1, max_size=8)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(row=rows, data=st.data())
def test_leak_is_the_mean_maximum_over_all_subsets(row, data):
    k = data.draw(st.integers(1, len(row)))
    expected = np.mean([max(subset) for subset in combinations(row, k)])
    assert leak_at_k(np.array([row]), k)[0] == pytest.approx(expected, abs=1e-12)
    if k > 1:
        assert leak_at_k(np.array([row]), k)[0] >= leak_at_k(np.array([row]), k - 1)[0] - 1e-12


@pytest.mark.parametrize(("n", "c", "k"), [(10, 3, 4), (200, 1, 100), (1000, 7, 500), (5, 0, 2)])
def test_leak_of_successes_is_pass_at_k(n, c, k):
    scores = np.zeros((1, n))
    scores[0, :c] = 1
    expected = 1 - comb(n - c, k) / comb(n, k)
    assert leak_at_k(scores, k)[0] == pytest.approx(expected, rel=1e-9)


def test_leak_is_unbiased():
    """The expected maximum of 3 uniform draws is 3/4, whatever the number sampled."""
    scores = np.random.default_rng(0).random((4000, 6))
    assert leak_at_k(scores, 3).mean() == pytest.approx(0.75, abs=0.01)
    assert scores[:, :6].max(axis=1).mean() > 0.84  # the plain maximum of what was sampled is not


def test_leak_refuses_what_it_cannot_estimate():
    with pytest.raises(ValueError, match="k=4 must be from 1 to n_samples=3"):
        leak_at_k(np.zeros((2, 3)), 4)
    with pytest.raises(ValueError, match="scores must be finite"):
        leak_at_k(np.array([[np.nan]]), 1)


def test_leakage_finds_what_the_model_says(llama, tokenizer):
    (said,) = sample_answers(plain(llama), tokenizer, ["Water"], 3, max_new_tokens=6)
    exact = lambda text, answer: float(text == answer)  # noqa: E731
    items = [Item("Water", said[1]), Item("Water", "never said")]
    found = sampled_leakage(plain(llama), tokenizer, items, 3, score=exact, max_new_tokens=6)
    assert found.shape == (2, 3)
    assert found[0, 1] == 1
    assert not found[1].any()
    with pytest.raises(ValueError, match="0 items: leakage needs at least one"):
        sampled_leakage(plain(llama), tokenizer, [], 3)
