import json

import numpy as np
import pytest

from manifold_unlearn.evaluate.results import Change, Metric


def metric(values, name="probability"):
    return Metric(name, np.asarray(values, dtype=np.float64))


def test_mean_and_interval():
    values = np.random.default_rng(0).normal(0.5, 0.1, 400)
    low, high = metric(values).interval
    assert metric(values).mean == pytest.approx(values.mean())
    assert low < values.mean() < high
    expected = 2 * 1.96 * values.std() / np.sqrt(400)
    assert high - low == pytest.approx(expected, rel=0.1)


def test_the_interval_is_deterministic_and_leaves_the_global_state():
    values = np.random.default_rng(1).random(20)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    assert metric(values).interval == metric(values).interval
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_equal_values_have_no_spread():
    assert metric([0.3] * 5).interval == pytest.approx((0.3, 0.3))


def test_kept_is_the_ratio_of_the_means():
    change = Change(metric([0.8, 0.4]), metric([0.2, 0.1]))
    assert change.kept == pytest.approx(0.25)
    assert change.interval == pytest.approx((0.25, 0.25))  # every pair kept a quarter


def test_items_are_resampled_in_pairs():
    rng = np.random.default_rng(2)
    before = rng.random(50) + 0.1
    paired = Change(metric(before), metric(0.5 * before))
    shuffled = Change(metric(before), metric(0.5 * rng.permutation(before)))
    widths = [np.ptp(change.interval) for change in (paired, shuffled)]
    assert widths[0] < 1e-12 < 0.05 < widths[1]


def test_json_holds_every_value():
    said = json.loads(json.dumps(Change(metric([0.5, 1.0]), metric([0.25, 0.5])).to_json()))
    assert said["before"]["values"] == [0.5, 1.0]
    assert said["after"]["n"] == 2
    assert said["after"]["mean"] == 0.375
    assert said["kept"] == 0.5
    assert said["kept_interval"] == [0.5, 0.5]


@pytest.mark.parametrize("before", [[0.0, 0.0], [0.0, 1.0]])
def test_what_is_kept_of_nothing_is_null(before):
    said = Change(metric(before), metric([0.1, 0.1])).to_json()
    assert said["kept"] is None
    assert said["kept_interval"] is None
    assert json.dumps(said, allow_nan=False)
