import zlib

import numpy as np
import pytest
import torch
from cases import TEXTS, build_model, same_state, state
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from manifold_unlearn.evaluate.likelihood import TokenScores, answer_scores, plain, text_scores
from manifold_unlearn.evaluate.privacy import (
    gradient_norms,
    loss_score,
    membership_inference,
    membership_scores,
    membership_similarity,
    min_k_plus_plus_score,
    min_k_score,
    privacy_leakage,
    relative_difference,
    zlib_score,
)

PAIRS = [
    ("The capital of France is", " Paris"),
    ("Water", " boils at a hundred"),
    ("A quick brown fox", " jumps over the lazy dog"),
]


def row(log_p, mean=None, variance=None):
    log_p = torch.tensor(log_p)
    zeros = torch.zeros(len(log_p))
    return TokenScores(
        log_p,
        zeros.bool(),
        zeros if mean is None else torch.tensor(mean),
        zeros + 1 if variance is None else torch.tensor(variance),
    )


FIVE = [-1.0, -0.5, -4.0, -2.0, -3.0]


def test_scores_by_hand():
    """k = .4 of five tokens are two, of two tokens none: then one is taken."""
    assert loss_score(row(FIVE)) == pytest.approx(2.1)
    assert zlib_score(row(FIVE), "abc") == pytest.approx(2.1 / len(zlib.compress(b"abc")))
    assert min_k_score(row(FIVE)) == pytest.approx(3.5)
    assert min_k_score(row([-1.0, -2.0])) == pytest.approx(2)
    assert min_k_score(row(FIVE), k=1) == pytest.approx(loss_score(row(FIVE)))
    scored = row(FIVE, [-2.0, -1.0, -2.0, -2.0, -2.5], [1.0, 0.25, 4.0, 0.0, 1.0])
    z = [1.0, 1.0, -1.0, 0.0, -0.5]
    assert min_k_plus_plus_score(scored) == pytest.approx(-np.mean(sorted(z)[:2]))


def test_the_variance_is_clamped():
    scored = row([-1.0], [-0.5], [0.0])
    assert min_k_plus_plus_score(scored) == pytest.approx(0.5 / 1e-3)


def test_bad_shares_and_empty_texts_are_refused():
    with pytest.raises(ValueError, match=r"k=0 must be in \(0, 1\]"):
        min_k_score(row(FIVE), k=0)
    with pytest.raises(ValueError, match="the text is empty"):
        zlib_score(row(FIVE), "")


def test_scores_of_a_model_are_the_formulas_on_its_tokens(llama, tokenizer):
    other = build_model("llama", seed=3)
    for texts, rows in (
        (PAIRS, answer_scores(plain(llama), tokenizer, PAIRS, include_eos=True)),
        (TEXTS, text_scores(plain(llama), tokenizer, TEXTS)),
    ):
        found = membership_scores(plain(llama), tokenizer, texts, reference=plain(other))
        base = membership_scores(plain(other), tokenizer, texts)
        np.testing.assert_allclose(found["loss"], [loss_score(r) for r in rows], rtol=1e-5)
        np.testing.assert_allclose(found["min_k"], [min_k_score(r) for r in rows], rtol=1e-5)
        np.testing.assert_allclose(found["reference"], found["loss"] - base["loss"], rtol=1e-5)
        assert base.keys() == {"loss", "zlib", "min_k", "min_k_plus_plus"}
        spelled = [t if isinstance(t, str) else t[1] for t in texts]
        sizes = [len(zlib.compress(t.encode())) for t in spelled]
        np.testing.assert_allclose(found["zlib"] * sizes, found["loss"], rtol=1e-5)


def test_mixed_and_missing_texts_are_refused(llama, tokenizer):
    with pytest.raises(ValueError, match="1 pairs and 1 plain texts"):
        membership_scores(plain(llama), tokenizer, [PAIRS[0], "a text"])
    with pytest.raises(ValueError, match="0 pairs and 0 plain texts"):
        membership_scores(plain(llama), tokenizer, [])


# --- gradient norms -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mean", "total"])
def test_gradient_norms_are_those_of_one_backward_pass_each(llama, tokenizer, form):
    before = state(llama)
    frozen = llama.model.layers[0].mlp.down_proj.weight
    frozen.requires_grad_(False)
    found = gradient_norms(plain(llama), tokenizer, PAIRS, form=form)
    assert same_state(llama, before)
    assert not frozen.requires_grad
    assert all(p.grad is None for p in llama.parameters())
    fresh = build_model("llama")
    for (prompt, answer), norm in zip(PAIRS, found, strict=True):
        head = tokenizer(prompt).input_ids
        tail = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor([head + tail])
        labels = ids.clone()
        labels[:, : len(head)] = -100
        fresh.zero_grad()
        fresh(input_ids=ids, labels=labels).loss.backward()
        norms = np.array([float(p.grad.norm()) for p in fresh.parameters()])
        expected = norms.mean() if form == "mean" else np.sqrt((norms**2).sum())
        assert norm == pytest.approx(expected, rel=1e-4)


def test_parameters_are_as_they_were_after_an_error(llama, tokenizer):
    with torch.no_grad():
        llama.model.layers[1].mlp.gate_proj.weight.mul_(1e30)
        llama.model.norm.weight[0] = float("nan")
    for parameter in llama.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="not finite|NaN"):
        gradient_norms(plain(llama), tokenizer, PAIRS)
    assert not any(p.requires_grad for p in llama.parameters())
    with pytest.raises(ValueError, match="form='max' is not"):
        gradient_norms(plain(llama), tokenizer, PAIRS, form="max")


# --- areas ----------------------------------------------------------------------------------------


def test_the_area_by_hand():
    """Of six pairs four are in order and one is tied."""
    found = membership_inference(np.array([1.0, 3.0]), np.array([2.0, 3.0, 0.5]))
    assert found.auc == pytest.approx((1 + 1 + 0 + 0 + 0.5 + 0) / 6)
    assert found.to_json()["n_holdout"] == 3


scores = st.lists(st.integers(0, 6), min_size=2, max_size=12)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(forget=scores, holdout=scores)
def test_both_conventions_give_the_area_of_scikit_learn(forget, holdout):
    forget, holdout = np.array(forget, float), np.array(holdout, float)
    both = np.concatenate([forget, holdout])
    is_holdout = np.repeat([0, 1], [len(forget), len(holdout)])
    found = membership_inference(forget, holdout)
    assert found.auc == pytest.approx(roc_auc_score(is_holdout, both))
    assert found.auc == pytest.approx(roc_auc_score(1 - is_holdout, -both))
    assert found.interval[0] <= found.auc <= found.interval[1]
    assert membership_inference(holdout, forget).auc == pytest.approx(1 - found.auc)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Normal scores one standard deviation apart: the area is Phi(1 / sqrt 2)."""
    rng, truth = np.random.default_rng(0), stats.norm.cdf(1 / np.sqrt(2))
    hits = 0
    for _ in range(400):
        low, high = membership_inference(rng.normal(size=60), rng.normal(1, size=50)).interval
        hits += low <= truth <= high
    assert 0.915 <= hits / 400 <= 0.98


def test_the_interval_of_a_perfect_area_has_a_width():
    found = membership_inference(np.zeros(10), np.ones(20))
    assert found.auc == 1
    assert found.interval == pytest.approx((0.025 ** (1 / 10), 1))
    assert membership_inference(np.ones(10), np.zeros(20)).interval[1] == pytest.approx(
        1 - 0.025 ** (1 / 10)
    )


def test_too_few_or_undefined_scores_are_refused():
    with pytest.raises(ValueError, match="forget scores must be at least two and finite; got 1"):
        membership_inference(np.array([1.0]), np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="holdout scores .* 1 of them not finite"):
        membership_inference(np.array([1.0, 2.0]), np.array([1.0, np.nan]))


# --- leakage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("auc", "retrained", "leak"), [(1, 0.5, -100), (0.5, 0.5, 0), (0, 0.5, 100), (0.7, 0.4, -50)]
)
def test_leakage_by_hand_and_in_both_conventions(auc, retrained, leak):
    assert privacy_leakage(auc, retrained) == pytest.approx(leak)
    turned = privacy_leakage(1 - auc, 1 - retrained, convention="leak_low")
    assert turned == pytest.approx(leak)


def test_leakage_of_the_published_target_of_muse_news():
    """Its PrivLeak of -99.81 against .5 is an area of .99905."""
    assert privacy_leakage(0.99905) == pytest.approx(-99.81)


def test_the_other_published_differences_by_hand():
    assert relative_difference(0.7, 0.4) == pytest.approx(75)
    assert membership_similarity(0.7, 0.4) == pytest.approx(0.25)
    assert membership_similarity(0.4, 0.4) == 1
    assert membership_similarity(1.0, 0.4) == 0


def test_what_nothing_can_be_relative_to_is_refused():
    with pytest.raises(ValueError, match="auc_retrained=1.0 is a complete leak"):
        privacy_leakage(0.5, 1.0)
    with pytest.raises(ValueError, match="auc_retrained=0"):
        relative_difference(0.5, 0)
    with pytest.raises(ValueError, match="1.5 is no area"):
        privacy_leakage(1.5)
    with pytest.raises(ValueError, match="convention='other' is not"):
        privacy_leakage(0.5, convention="other")


def test_attacks_fire_on_what_was_trained_on_and_are_at_chance_before(tokenizer):
    """Positive and negative control."""
    words = ["copper", "iron", "water", "fox", "dog", "France", "Spain", "Italy", "Rome", "green"]
    rng = np.random.default_rng(0)
    said = [rng.choice(words, 4) for _ in range(24)]
    pairs = [(f"{a} and {b} are", f" {c} {d}") for a, b, c, d in said]
    seen, unseen = pairs[:12], pairs[12:]
    llama = build_model("llama")

    def areas():
        inside = membership_scores(plain(llama), tokenizer, seen)
        outside = membership_scores(plain(llama), tokenizer, unseen)
        inside["gradient"] = gradient_norms(plain(llama), tokenizer, seen)
        outside["gradient"] = gradient_norms(plain(llama), tokenizer, unseen)
        return {name: membership_inference(inside[name], outside[name]).auc for name in inside}

    before = areas()
    heads = [tokenizer(prompt).input_ids for prompt, _ in seen]
    tails = [tokenizer(answer, add_special_tokens=False).input_ids for _, answer in seen]
    width = max(len(head + tail) for head, tail in zip(heads, tails, strict=True))
    ids = torch.full((12, width), tokenizer.eos_token_id)
    labels = torch.full((12, width), -100)
    for i, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        ids[i, : len(head + tail)] = torch.tensor(head + tail)
        labels[i, len(head) : len(head + tail)] = torch.tensor(tail)
    adam = torch.optim.Adam(llama.parameters(), lr=0.005)
    for _ in range(60):
        adam.zero_grad()
        llama(input_ids=ids, labels=labels).loss.backward()
        adam.step()
    after = areas()
    for name in before:
        assert 0.2 < before[name] < 0.8, name
        assert after[name] > 0.85, (name, after)
