import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from manifold_unlearn.evaluate.meta import (
    auc,
    faithfulness,
    meta_score,
    quantization_robustness,
    relearning_robustness,
    robustness,
)

ORACLE = Path(__file__).parents[3] / "shared" / "data" / "oracle" / "meta_eval.json"


def test_the_area_counts_a_tie_as_half():
    """Pairs: 3 > 1, 3 > 2, 2 > 1, 2 = 2."""
    assert auc([3, 2], [1, 2]) == 3.5 / 4
    assert auc([1.0], [1.0]) == 0.5


def test_the_area_is_that_of_sklearn_with_ties():
    draw = np.random.default_rng(0)
    told, never = draw.integers(2, 9, 30), draw.integers(0, 7, 25)
    truth = [1] * 30 + [0] * 25
    expected = roc_auc_score(truth, [*told, *never])
    found = faithfulness(told, never)
    assert found.auc == pytest.approx(expected, abs=1e-12)
    assert faithfulness(-told, -never, knowledge_is="low").auc == pytest.approx(expected)
    assert faithfulness(told, never, knowledge_is="low").auc == pytest.approx(1 - expected)
    assert (found.mean_with, found.mean_without) == (told.mean(), never.mean())


def test_a_metric_that_sees_knowledge_and_one_that_sees_nothing():
    draw = np.random.default_rng(1)
    told, never = draw.normal(size=(2, 30))
    assert faithfulness(told + 10, never).interval == pytest.approx((1, 1))
    low, high = faithfulness(told, never).interval
    assert low < 0.5 < high


def test_the_interval_is_that_of_resampled_models():
    """Against a bootstrap written out, other draws: percentiles agree to their own error."""
    draw = np.random.default_rng(2)
    told, never = draw.normal(0.8, 1, 20), draw.normal(0, 1, 30)
    areas = [np.mean(draw.choice(told, 20)[:, None] > draw.choice(never, 30)) for _ in range(1500)]
    np.testing.assert_allclose(
        faithfulness(told, never).interval, np.percentile(areas, [2.5, 97.5]), atol=0.02
    )


def test_relearning_by_hand():
    """The retrained gains .2; models gain .2, .4, 0, -.2, .1."""
    before = [0.1, 0.1, 0.3, 0.3, 0.0]
    after = [0.3, 0.5, 0.3, 0.1, 0.1]
    symmetric = relearning_robustness(before, after, 0.2, 0.4)
    np.testing.assert_allclose(symmetric, [1, 2 / 3, 0, 0, 2 / 3])
    one = relearning_robustness(before, after, 0.2, 0.4, form="one_directional")
    np.testing.assert_allclose(one, [1, 0.5, 1, 1, 1])
    np.testing.assert_array_equal(relearning_robustness([0.5], [0.5], 0.2, 0.2), 1)
    gone = relearning_robustness([0.1], [0.5], 0.4, 0.2, form="one_directional")
    np.testing.assert_array_equal(gone, 0)


def test_quantization_by_hand():
    before, after = [0.2, 0.2, 0.4, 0.0], [0.2, 0.6, 0.2, 0.0]
    np.testing.assert_allclose(quantization_robustness(before, after), [1, 0.5, 2 / 3, 1])
    one = quantization_robustness(before, after, form="one_directional")
    np.testing.assert_allclose(one, [1, 1 / 3, 1, 1])


def test_robustness_is_the_harmonic_mean_of_the_means():
    found = robustness(np.array([0.2, 0.4]), np.array([0.5, 0.7, 0.9]))
    assert (found.relearning, found.quantization) == pytest.approx((0.3, 0.7))
    assert found.score == pytest.approx(0.42)
    assert found.interval[0] < 0.42 < found.interval[1]
    assert robustness(np.zeros(2), np.ones(2)).score == 0
    assert robustness(np.zeros(2), np.zeros(2)).interval == (0, 0)
    assert meta_score(0.971, 0.9325) == pytest.approx(2 * 0.971 * 0.9325 / 1.9035)
    assert json.loads(json.dumps(found.to_json()))["score"] == found.score


@pytest.mark.shared
@pytest.mark.skipif(not ORACLE.is_file(), reason="needs the published results in ../shared")
def test_published_robustness_follows_from_its_parts():
    """Parts and aggregate are published to 4 digits: the aggregate of some parts that round to
    those printed must round to the aggregate printed."""
    published = json.loads(ORACLE.read_text(encoding="utf-8"))["robustness"]
    assert len(published) == 22
    half = 0.5e-4
    for name, parts in published.items():
        R, Q = parts["relearning"], parts["quantization"]
        low, high = (robustness(np.array([R + d]), np.array([Q + d])).score for d in (-half, half))
        assert low - half - 1e-6 <= parts["agg"] <= high + half + 1e-6, name
        assert robustness(np.array([R]), np.array([Q])).score == pytest.approx(
            2 * R * Q / (R + Q), abs=1e-12
        )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: faithfulness([], [1.0]), r"with_knowledge has shape \(0,\)"),
        (lambda: faithfulness([1.0], [1.0, np.nan]), "NaN or infinity, the first for model 1"),
        (lambda: faithfulness([1.0], [1.0], knowledge_is="up"), "is not 'high' or 'low'"),
        (lambda: quantization_robustness([1.0], [1.0, 2.0]), "of 1 models, after of 2"),
        (lambda: quantization_robustness([1.0], [1.0], form="both"), "form='both' is not"),
        (lambda: relearning_robustness([1.0], [1.0], 0, 1, form="both"), "form='both' is not"),
        (lambda: relearning_robustness([1.0], [1.0], 0, np.inf), "retrained_after holds NaN"),
        (lambda: robustness(np.array([]), np.ones(1)), "relearning has shape"),
    ],
)
def test_what_cannot_be_judged_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
