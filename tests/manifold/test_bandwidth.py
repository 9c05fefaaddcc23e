import numpy as np
import pytest

from manifold_unlearn.manifold import DiffusionMap, bandwidth_curve, samples
from manifold_unlearn.report import bandwidth_curve as draw


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_curve_is_flat_where_the_bandwidth_is_read_off(noise):
    sample = samples.sphere(2000, n_features=32, noise=noise, random_state=0)
    curve = bandwidth_curve(sample.points)
    first, last = curve.tuned.plateau
    inside = (curve.bandwidths >= first) & (curve.bandwidths <= last)
    assert inside.sum() >= 6
    np.testing.assert_allclose(curve.variance[inside], 1, atol=0.15)
    if noise:
        lift = curve.slope[inside] - curve.variance[inside]
        expected = curve.tuned.squared_noise / (4 * curve.bandwidths[inside])
        np.testing.assert_allclose(lift, expected, rtol=0.3, atol=0.05)
        assert curve.tuned.squared_noise == pytest.approx(2 * 32 * noise**2, rel=0.2)
    else:
        np.testing.assert_allclose(curve.slope[inside], 1, atol=0.15)
    fitted = DiffusionMap(2).fit(sample.points)
    assert curve.tuned.bandwidth == pytest.approx(fitted.bandwidth_)


def test_the_curve_can_be_drawn():
    curve = bandwidth_curve(samples.circle(300, random_state=0).points)
    figure = draw(
        curve.bandwidths,
        curve.slope,
        variance=curve.variance,
        chosen=curve.tuned.bandwidth,
        plateau=curve.tuned.plateau,
        dimension=curve.tuned.intrinsic_dimension,
    )
    assert figure.axes


def test_rows_without_a_curve_are_named():
    with pytest.raises(ValueError, match="all 10 samples are equal"):
        bandwidth_curve(np.ones((10, 2)))
    with pytest.raises(ValueError, match="minimum of 4"):
        bandwidth_curve(np.ones((3, 2)))
