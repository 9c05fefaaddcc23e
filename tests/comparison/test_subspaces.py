import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_unlearn.comparison import subspaces
from manifold_unlearn.comparison.subspaces import (
    grassmann_distance,
    principal_angles,
    principal_axes,
)
from manifold_unlearn.manifold import samples


def rotated_clouds(angles, n_features=20, n_samples=200, seed=0):
    """Clouds that fill two subspaces at these principal angles."""
    rng = np.random.default_rng(seed)
    k = len(angles)
    frame, _ = np.linalg.qr(rng.standard_normal((n_features, 2 * k)))
    first = frame[:, :k]
    second = first * np.cos(angles) + frame[:, k:] * np.sin(angles)
    draw = rng.standard_normal((2, n_samples, k))
    return draw[0] @ first.T + 3, draw[1] @ second.T - 1


@pytest.mark.parametrize(
    "angles",
    [[1e-9, 1e-7, 1e-4], [0.1, 0.7, 1.5], [0.0, 0.3, np.pi / 2], [np.pi / 2, np.pi / 2]],
    ids=["tiny", "middle", "mixed", "right"],
)
def test_angles_are_those_the_subspaces_were_rotated_by(angles):
    A, B = rotated_clouds(np.array(angles))
    found = principal_angles(A, B)
    np.testing.assert_allclose(found, angles, rtol=1e-5, atol=2e-14)
    assert grassmann_distance(A, B) == pytest.approx(np.linalg.norm(angles), rel=1e-5)


def test_angles_are_those_of_scipy():
    A, B = rotated_clouds(np.array([0.2, 0.9]), seed=1)
    bases = [np.linalg.svd(X - X.mean(0))[2][:2].T for X in (A, B)]
    np.testing.assert_allclose(principal_angles(A, B), scipy.linalg.subspace_angles(*bases)[::-1])


@pytest.mark.parametrize("angles", [[1e-3, 0.02], [0.1, 0.7, 1.5], [0.4] * 8])
def test_the_geodesic_is_that_of_geomstats(angles):
    A, B = rotated_clouds(np.array(angles), n_features=40)
    theirs = grassmann_distance(A, B, backend="geomstats")
    assert theirs == pytest.approx(grassmann_distance(A, B), rel=1e-6)
    assert theirs == pytest.approx(np.linalg.norm(angles), rel=1e-6)


def test_a_whole_space_is_at_no_distance_from_itself():
    A, B = np.random.default_rng(0).standard_normal((2, 50, 3))
    for backend in ("torch", "geomstats"):
        assert grassmann_distance(A, B, dimension=3, backend=backend) == pytest.approx(0, abs=1e-7)


def test_a_missing_dimension_counts_as_a_right_angle():
    A, B = rotated_clouds(np.array([0.0, 0.3, 0.5]))
    plane = B - (B - B.mean(0)) @ np.outer(*[np.linalg.svd(B - B.mean(0))[2][2]] * 2)
    angles = principal_angles(A, plane)
    assert angles.shape == (2,)
    expected = np.sqrt((angles**2).sum() + (np.pi / 2) ** 2)
    assert grassmann_distance(A, plane) == pytest.approx(expected)
    assert grassmann_distance(plane, A) == pytest.approx(expected)
    np.testing.assert_allclose(principal_angles(A, plane, dimension=(3, 2)), angles)


@pytest.mark.parametrize("noise", [0.0, 0.02])
@pytest.mark.parametrize(
    ("make", "dimension"), [(samples.circle, 2), (samples.sphere, 3), (samples.flat_torus, 4)]
)
def test_the_automatic_dimension_is_that_of_the_linear_span(make, dimension, noise):
    X = make(800, n_features=60, noise=noise, random_state=0).points
    axes = principal_axes(torch.tensor(X))
    assert (axes.dimension, axes.clear) == (dimension, True)


def test_spectra_without_a_gap_are_cut_alike(monkeypatch):
    rng = np.random.default_rng(0)
    power = rng.standard_normal((800, 100)) / np.arange(1, 101) ** 0.5
    A, B = power[:400], power[400:] + 0.1 * rng.standard_normal((400, 100))
    axes = [principal_axes(torch.tensor(X)) for X in (A, B)]
    variances = np.linalg.eigvalsh(np.cov(A.T))
    assert axes[0].dimension == round(variances.sum() ** 2 / (variances**2).sum())
    assert not axes[0].clear
    assert axes[1].dimension > axes[0].dimension
    assert len(principal_angles(A, B)) == axes[0].dimension
    assert grassmann_distance(A, B) < np.pi / 2 * np.sqrt(axes[0].dimension)
    monkeypatch.setattr(subspaces, "_EXACT", 50)
    monkeypatch.setattr(subspaces, "_SKETCH", 40)
    sketched = principal_axes(torch.tensor(A))
    assert sketched.dimension == pytest.approx(axes[0].dimension, abs=1)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from([1e-8, 1.0, 1e8]), st.floats(-10, 10))
def test_motions_and_order_change_nothing(seed, scale, shift):
    rng = np.random.default_rng(seed)
    A, B = rotated_clouds(np.array([0.05, 0.6]), n_features=8)
    rotation, _ = np.linalg.qr(rng.standard_normal((8, 8)))
    moved = [scale * (rng.permutation(X) @ rotation + shift) for X in (A, B)]
    np.testing.assert_allclose(principal_angles(*moved), [0.05, 0.6], atol=1e-7)


def test_wide_and_large_data_give_the_same_subspace(monkeypatch):
    rng = np.random.default_rng(0)
    A, B = rotated_clouds(np.array([0.1, 0.4, 1.2]), n_features=300, n_samples=120)
    A, B = (X + 1e-3 * rng.standard_normal(X.shape) for X in (A, B))
    exact = principal_angles(A, B)
    np.testing.assert_allclose(exact, [0.1, 0.4, 1.2], atol=0.01)
    monkeypatch.setattr(subspaces, "_EXACT", 100)
    monkeypatch.setattr(subspaces, "_SKETCH", 20)
    np.testing.assert_allclose(principal_angles(A, B), exact, atol=1e-8)
    with pytest.raises(ValueError, match="1 and 20, the directions .* or that are computed"):
        principal_angles(A, B, dimension=21)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tensors_in_tensors_out(dtype):
    A, B = (torch.tensor(X, dtype=dtype) for X in rotated_clouds(np.array([0.1, 0.5])))
    found = principal_angles(A, B)
    assert (found.dtype, found.device) == (dtype, A.device)
    np.testing.assert_allclose(found, [0.1, 0.5], atol=1e-5)


CLOUD = rotated_clouds(np.array([0.1, 0.5]))[0]


def test_without_geomstats_the_mend_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "geomstats.geometry.grassmannian", None)
    with pytest.raises(ImportError, match="pip install geomstats"):
        grassmann_distance(CLOUD, CLOUD, backend="geomstats")


@pytest.mark.parametrize(
    ("X", "Y", "options", "message"),
    [
        (CLOUD, np.ones((9, 20)), {}, "B: all 9 rows are equal and span no subspace"),
        (CLOUD, np.full((9, 20), 0.1), {}, "B: all 9 rows are equal"),
        (CLOUD, CLOUD[:1], {}, "minimum of 2"),
        (CLOUD, CLOUD[:, :5], {}, "A has 20 features, B has 5"),
        (CLOUD, CLOUD, {"dimension": 3}, "dimension=3 must lie between 1 and 2"),
        (CLOUD, CLOUD, {"dimension": 0}, "dimension=0 must lie between 1 and 2"),
        (CLOUD, CLOUD, {"dimension": "all"}, "dimension='all' must lie between 1 and 2"),
        (CLOUD, CLOUD, {"backend": "jax"}, "backend='jax' is not known"),
        (CLOUD, CLOUD, {"backend": "geomstats", "dimension": (1, 2)}, "dimensions 1 and 2"),
        (
            *rotated_clouds(np.array([0.1, np.pi / 2])),
            {"backend": "geomstats"},
            "meet at a right angle",
        ),
    ],
)
def test_impossible_requests_are_refused(X, Y, options, message):
    with pytest.raises(ValueError, match=message):
        grassmann_distance(X, Y, **options)
