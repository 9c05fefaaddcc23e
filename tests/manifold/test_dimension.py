import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_unlearn.manifold import samples
from manifold_unlearn.manifold.dimension import (
    dimension_profile,
    estimate_dimension,
    intrinsic_dimension,
)
from manifold_unlearn.manifold.dimension_estimators import gride, gride_log_likelihood

METHODS = ("two_nn", "mle", "gride", "local_pca", "correlation", "bgh")
BASE = samples.sphere(400, n_features=6, random_state=0).points


def distances_of(X):
    squared = ((X[:, None] - X[None]) ** 2).sum(-1)
    np.fill_diagonal(squared, np.inf)
    return np.sort(np.sqrt(squared), axis=1)


@pytest.mark.parametrize("dimension", [2, 5, 10])
def test_spheres_of_any_dimension_are_measured_to_three_tenths(dimension):
    for seed in range(3):
        X = samples.hypersphere(2000, dimension=dimension, n_features=128, random_state=seed).points
        assert abs(intrinsic_dimension(X) - dimension) < 0.3


@pytest.mark.parametrize("dimension", [2, 5, 10])
def test_gaussians_on_a_subspace_are_measured_too(dimension):
    X = samples.linear_subspace(2000, dimension=dimension, n_features=40, random_state=1).points
    assert abs(intrinsic_dimension(X) - dimension) < 0.3


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_two_dimensions(method):
    for X in (BASE, samples.swiss_roll(1500, n_features=10, random_state=0).points):
        assert abs(intrinsic_dimension(X, method) - 2) < 0.35


def test_uncorrected_estimates_are_the_published_ones():
    r = distances_of(BASE)
    n = len(r)
    two_nn = (n - 1) / np.log(r[:, 1] / r[:, 0]).sum()
    assert intrinsic_dimension(BASE, correction=False) == pytest.approx(two_nn)
    found = estimate_dimension(BASE, "mle", n_neighbors=12, correction=False)
    inverse = np.log(r[:, 11:12] / r[:, :11]).mean(1)  # 1 / m of Levina and Bickel, eq. 8
    assert found.value == pytest.approx(1 / inverse.mean(), rel=1e-3)
    np.testing.assert_allclose(found.local, 10 / 11 / inverse, rtol=1e-6)


def test_gride_maximizes_its_likelihood():
    r = distances_of(BASE)[:, :16]
    found = gride(r**2, 8, 16)
    ratios = r[:, 15] / r[:, 7]
    grid = np.linspace(1.5, 2.5, 2001)
    best = grid[np.argmax([gride_log_likelihood(ratios, 8, d) for d in grid])]
    assert found.value == pytest.approx(best, abs=1e-3)


@pytest.mark.parametrize("correction", [True, False])
@pytest.mark.parametrize("method", ["two_nn", "mle", "gride"])
def test_standard_errors_cover_the_truth(method, correction):
    """On a flat torus, where the volume grows almost exactly as it should."""
    z = []
    for seed in range(24):
        X = samples.flat_torus(500, random_state=seed).points
        found = estimate_dimension(X, method, n_neighbors=10, correction=correction)
        z.append((found.value - 2) / found.standard_error)
    assert np.mean(np.abs(z) < 2) >= 0.75
    assert 0.4 < np.std(z) < 1.6


def test_profile_descends_from_the_noise_to_the_manifold():
    noisy = samples.sphere(2000, n_features=20, noise=0.02, random_state=0).points
    profile = dimension_profile(noisy)
    assert profile.dimensions[0] > 3
    assert abs(profile.dimensions[-1] - 2) < 0.4
    assert (np.diff(profile.scales) > 0).all()
    assert (np.diff(profile.standard_errors) < 0).all()


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e6]), st.floats(-10, 10))
def test_rotation_translation_scale_and_order_change_nothing(seed, scale, shift):
    random = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(random.standard_normal((6, 6)))
    moved = scale * (BASE @ rotation + shift)[random.permutation(len(BASE))]
    for method in METHODS:
        before = estimate_dimension(BASE, method, correction=False).value
        after = estimate_dimension(moved, method, correction=False).value
        assert after == pytest.approx(before, rel=0.02)
    assert intrinsic_dimension(moved) == pytest.approx(intrinsic_dimension(BASE), abs=0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_give_floats_and_tensors(dtype):
    X = torch.tensor(BASE, dtype=dtype)
    found = estimate_dimension(X)
    assert type(intrinsic_dimension(X)) is float
    assert found.local.dtype == dtype
    assert found.local.shape == (len(X),)
    double = intrinsic_dimension(X.double().numpy())
    assert found.value == pytest.approx(double, abs=0.02)


def test_rows_that_are_equal_count_once():
    twice = np.concatenate([BASE, BASE])
    assert intrinsic_dimension(twice) == pytest.approx(intrinsic_dimension(BASE), rel=1e-6)
    assert len(estimate_dimension(twice).local) == 800


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "X",
    [
        np.c_[BASE, np.full((400, 2), 7.0)],
        np.outer(np.random.default_rng(0).standard_normal(200), np.ones(9)),
        np.random.default_rng(0).standard_normal((70, 400)),
        np.random.default_rng(0).integers(0, 9, (300, 4)),
        np.concatenate([BASE, np.full((1, 6), 1e6)]),
        np.concatenate([BASE, BASE + 50]),
        np.concatenate([BASE, np.repeat(BASE[:1], 400, axis=0)]),
    ],
    ids=["constant", "rank one", "d > n", "grid", "outlier", "parts", "one row many times"],
)
def test_awkward_data_give_finite_answers(X, method):
    found = estimate_dimension(X, method)
    assert np.isfinite([found.value, found.standard_error, found.scale]).all()
    assert found.value > 0
    assert np.isfinite(found.local).all()


def test_an_outlier_or_a_second_part_does_not_move_the_dimension():
    outlier = np.concatenate([BASE, np.full((1, 6), 1e6)])
    assert abs(intrinsic_dimension(outlier) - 2) < 0.3
    assert abs(intrinsic_dimension(np.concatenate([BASE, BASE + 50])) - 2) < 0.3


@pytest.mark.parametrize(
    ("X", "options", "message"),
    [
        (np.ones((50, 3)), {}, "all 50 samples are equal"),
        (BASE[:4], {}, "at least 5 distinct rows"),
        (BASE[:0], {}, "0 sample"),
        (np.eye(30), {}, "equally far"),
        (BASE, {"method": "danco"}, "method='danco' is not known"),
        (BASE, {"n_neighbors": 3}, "n_neighbors=3 must be at least 4"),
        (np.where(np.eye(400, 6) > 0, np.nan, BASE), {}, "NaN or infinity: 6 of 400 rows"),
    ],
)
def test_impossible_requests_are_refused(X, options, message):
    with pytest.raises(ValueError, match=message):
        intrinsic_dimension(X, **options)


def test_neighbors_are_clamped_with_a_warning():
    with pytest.warns(UserWarning, match="n_neighbors=20 is more than the 9 other"):
        assert np.isfinite(intrinsic_dimension(BASE[:10]))


def test_signature_is_the_contract():
    parameters = inspect.signature(intrinsic_dimension).parameters
    assert list(parameters)[:2] == ["X", "method"]
    assert parameters["method"].default == "two_nn"


NOISY = {
    "sphere": (
        lambda noise, s: samples.sphere(2000, n_features=128, noise=noise, random_state=s),
        2,
    ),
    "circle": (
        lambda noise, s: samples.circle(2000, n_features=64, noise=noise, random_state=s),
        1,
    ),
    "roll": (
        lambda noise, s: samples.swiss_roll(2000, n_features=128, noise=10 * noise, random_state=s),
        2,
    ),
}


@pytest.mark.parametrize("noise", [0.003, 0.01])
@pytest.mark.parametrize("name", NOISY)
def test_slight_noise_in_many_directions_does_not_become_the_dimension(name, noise):
    make, dimension = NOISY[name]
    X = make(noise, 1).points
    assert intrinsic_dimension(X) == pytest.approx(dimension, abs=0.2)
    assert intrinsic_dimension(X, correction=False) > dimension + 0.5
