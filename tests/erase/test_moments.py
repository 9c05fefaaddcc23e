import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import OAS

from manifold_unlearn.erase.moments import Moments, oas_shrinkage, shrink


def rows(n, d, seed=0, center=100.0):
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, d, generator=draw, dtype=torch.float64)
        @ torch.diag(torch.linspace(0.1, 3, d, dtype=torch.float64))
        + center
    )


@settings(deadline=None, derandomize=True, max_examples=25)
@given(cut=st.lists(st.integers(1, 39), max_size=5), weighted=st.booleans())
def test_any_split_of_the_rows_gives_the_same_moments(cut, weighted):
    X = rows(40, 5)
    w = torch.linspace(0.5, 3, 40) if weighted else torch.ones(40)
    whole = Moments.of(X, w)
    edges = [0, *sorted(set(cut)), 40]
    parts = [Moments.of(X[a:b], w[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert merged.count == pytest.approx(whole.count)
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.scatter, whole.scatter, rtol=1e-9, atol=1e-9)


def test_moments_are_numpys():
    X = rows(30, 4)
    w = np.linspace(0.2, 2, 30)
    moments = Moments.of(X, torch.from_numpy(w))
    assert moments.count == pytest.approx(w.sum())
    np.testing.assert_allclose(moments.mean, np.average(X.numpy(), axis=0, weights=w))
    expected = np.cov(X.numpy().T, aweights=w, ddof=0)
    np.testing.assert_allclose(moments.covariance, expected)


def test_a_weight_is_a_number_of_copies():
    X = rows(3, 2)
    copies = torch.cat([X, X[:1], X[:1]])
    a, b = Moments.of(X, torch.tensor([3.0, 1, 1])), Moments.of(copies)
    torch.testing.assert_close(a.scatter, b.scatter)
    torch.testing.assert_close(a.mean, b.mean)
    assert a.count == b.count == 5


def test_float32_rows_far_from_zero_keep_their_spread():
    """The naive ``E x**2 - (E x)**2`` in float32 has nothing left here."""
    X = rows(500, 3, center=1e4)
    moments = Moments.of(X.float())
    np.testing.assert_allclose(moments.covariance.diagonal(), X.var(0, correction=0), rtol=2e-2)
    assert moments.covariance.dtype == torch.float64


def test_second_moment_about_a_point():
    X, point = rows(20, 3), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    expected = (X - point).T @ (X - point) / 20
    torch.testing.assert_close(Moments.of(X).about(point), expected)


def test_shrinkage_is_the_published_formula():
    """Equation 23 of the paper, on the eigenvalues."""
    n, p = 50, 5
    covariance = Moments.of(rows(n, p)).covariance
    values = np.linalg.eigvalsh(covariance)
    squares, square = (values**2).sum(), values.sum() ** 2
    expected = ((1 - 2 / p) * squares + square) / ((n + 1 - 2 / p) * (squares - square / p))
    assert 0 < expected < 1
    assert oas_shrinkage(covariance, n) == pytest.approx(expected)


def test_in_many_dimensions_it_is_scikit_learns():
    """Which leaves out the terms in 2/p."""
    X = rows(150, 60)
    moments = Moments.of(X)
    fitted = OAS().fit(X.numpy())
    assert 0.05 < fitted.shrinkage_ < 0.9
    weight = oas_shrinkage(moments.covariance, moments.count)
    assert weight == pytest.approx(fitted.shrinkage_, rel=2 / 60)
    np.testing.assert_allclose(
        shrink(moments.covariance, fitted.shrinkage_), fitted.covariance_, rtol=1e-8, atol=1e-12
    )


def test_isotropic_and_constant_rows_shrink_all_the_way():
    assert oas_shrinkage(torch.eye(4), 100) == 1.0
    assert torch.equal(shrink(torch.zeros(3, 3), 0.3), torch.eye(3))


def test_no_shrinkage_still_is_not_singular():
    flat = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert float(torch.linalg.det(shrink(flat, 0.0))) > 0
