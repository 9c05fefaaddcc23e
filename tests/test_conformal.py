import numpy as np
import pytest
import torch

from manifold_unlearn.conformal import conformal_quantile


@pytest.mark.parametrize(("n", "rate"), [(99, 0.01), (100, 0.1), (1000, 0.05), (19, 0.05)])
def test_the_quantile_is_the_least_value_that_keeps_the_rate(n, rate):
    values = torch.from_numpy(np.random.default_rng(1).normal(size=n))
    found = conformal_quantile(values, rate)
    assert found.promised_rate <= rate + 1e-12
    above = (values > found.value).sum().item()
    assert found.promised_rate == pytest.approx((above + 1) / (n + 1))
    assert (above + 2) / (n + 1) > rate  # the value below would not do
    assert n >= found.n_needed == round(1 / rate) - 1


def test_too_few_values_promise_what_they_can():
    found = conformal_quantile(torch.arange(1.0, 21), 0.01)
    assert found == (20, pytest.approx(1 / 21), 99)


def test_a_further_value_is_above_as_seldom_as_promised():
    """Over many draws the rate of a 100th value is at most 5 %, and near it."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(4000, 100, generator=draw)
    above = [float(row[-1]) > conformal_quantile(row[:-1], 0.05).value for row in values.unbind()]
    assert 0.04 < np.mean(above) < 0.06
