import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from manifold_unlearn.conformal import conformal_quantile
from manifold_unlearn.erase.evidence import (
    LEAST_THRESHOLD,
    cumulated,
    gate_threshold,
    largest,
    separation,
)
from manifold_unlearn.sequences import padded


def page(ratios, start=0.0):
    """The recursion as it is written."""
    sums = []
    for ratio in ratios:
        start = max(0.0, start + ratio)
        sums.append(start)
    return sums


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    ratios=st.lists(st.floats(-5, 5), min_size=1, max_size=30),
    start=st.floats(0, 8),
    cut=st.integers(0, 30),
)
def test_sums_follow_the_recursion_whole_or_cut_in_two(ratios, start, cut):
    steps = torch.tensor([ratios], dtype=torch.float64)
    present = torch.ones_like(steps, dtype=torch.bool)
    begin = torch.tensor([start], dtype=torch.float64)
    whole = cumulated(steps, begin, present)
    np.testing.assert_allclose(whole[0], page(ratios, start), atol=1e-12)
    cut = min(cut, len(ratios))
    first = cumulated(steps[:, :cut], begin, present[:, :cut])
    end = first[:, -1] if cut else begin
    second = cumulated(steps[:, cut:], end, present[:, cut:])
    np.testing.assert_allclose(torch.cat([first, second], 1), whole, atol=1e-12)


def test_padding_adds_nothing_on_either_side():
    ratios = torch.tensor([[1.0, -0.5, 2.0, -9.0, 1.5]])
    start, alone = torch.zeros(1), torch.ones(1, 5, dtype=torch.bool)
    expected = cumulated(ratios, start, alone)
    noise = torch.full((1, 3), 7.0)
    for side in ("left", "right"):
        order = [noise, ratios] if side == "left" else [ratios, noise]
        shown = [torch.zeros(1, 3, dtype=torch.bool), alone]
        shown = shown if side == "left" else shown[::-1]
        found = cumulated(torch.cat(order, 1), start, torch.cat(shown, 1))
        kept = found[:, 3:] if side == "left" else found[:, :5]
        torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize("sequential", [True, False])
def test_the_most_evidence_of_texts_whose_rows_are_interleaved(sequential):
    rng = np.random.default_rng(0)
    text = rng.choice([7, -2, 40], size=60)
    ratios = rng.normal(size=60)
    layout = padded(torch.from_numpy(text))
    assert layout.labels.tolist() == [-2, 7, 40]
    found = largest(torch.from_numpy(ratios), layout, sequential=sequential)
    for i, label in enumerate(layout.labels.tolist()):
        own = ratios[text == label]
        assert found[i] == pytest.approx(max(page(own)) if sequential else own.max())
    filled = layout.fill(torch.from_numpy(ratios), math.nan)
    np.testing.assert_array_equal(filled[1][: (text == 7).sum()], ratios[text == 7])


@pytest.mark.parametrize("sign", [1, -1])
def test_the_threshold_is_beyond_the_rounding_of_the_quantile(sign):
    maxima = sign * torch.from_numpy(np.random.default_rng(1).gamma(2, size=99)) + 20
    found = gate_threshold(maxima, 0.05)
    quantile = conformal_quantile(maxima, 0.05)
    assert quantile.value * (1 + 5e-5) < found.value < quantile.value * (1 + 5e-4)
    assert found.value == float(torch.tensor(found.value, dtype=torch.float32))
    assert found[1:] == quantile[1:]


@pytest.mark.parametrize("maxima", [torch.zeros(200), torch.full((200,), -3.0)])
def test_without_evidence_the_gate_stays_shut(maxima):
    found = gate_threshold(maxima, 0.01)
    assert found.value > LEAST_THRESHOLD


def test_the_separation_is_the_area_under_the_roc_with_ties():
    rng = np.random.default_rng(2)
    positive, negative = rng.integers(0, 9, 50) + 1.0, rng.integers(0, 9, 80) * 1.0
    expected = roc_auc_score(np.r_[np.ones(50), np.zeros(80)], np.r_[positive, negative])
    found = separation(torch.from_numpy(positive), torch.from_numpy(negative))
    assert found == pytest.approx(expected)
