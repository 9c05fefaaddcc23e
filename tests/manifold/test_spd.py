import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_unlearn.manifold.spd import spd_distance, spd_mean

FACTORS = np.random.default_rng(0).standard_normal((6, 4, 9))
STACK = FACTORS @ FACTORS.transpose(0, 2, 1)
A, B = STACK[:2]
METRICS = ["affine", "log_euclidean"]


def rotated(values):
    axes, _ = np.linalg.qr(FACTORS[0][:, :4])
    return (axes * np.asarray(values)) @ axes.T


@pytest.mark.parametrize("metric", METRICS)
def test_commuting_matrices_have_closed_forms(metric):
    first, second = np.array([1.0, 2, 3, 4]), np.array([5.0, 1, 3, 0.1])
    found = spd_distance(rotated(first), rotated(second), metric=metric)
    assert found == pytest.approx(np.linalg.norm(np.log(first / second)))
    mean = spd_mean(np.stack([rotated(first), rotated(second)]), weights=[3, 1], metric=metric)
    np.testing.assert_allclose(mean, rotated(first**0.75 * second**0.25), atol=1e-10)
    numbers = np.array([[[2.0]], [[8.0]]])
    assert spd_mean(numbers, metric=metric)[0, 0] == pytest.approx(4)
    assert spd_distance(*numbers, metric=metric) == pytest.approx(np.log(4))


def test_mean_of_two_is_their_geometric_mean():
    root = scipy.linalg.sqrtm(A)
    inverse = np.linalg.inv(root)
    truth = root @ scipy.linalg.sqrtm(inverse @ B @ inverse) @ root
    np.testing.assert_allclose(spd_mean(np.stack([A, B])), truth, rtol=1e-9)
    values = scipy.linalg.eigvalsh(B, A)
    assert spd_distance(A, B) == pytest.approx(np.linalg.norm(np.log(values)))


def test_log_euclidean_is_the_distance_of_logarithms():
    truth = np.linalg.norm(scipy.linalg.logm(A) - scipy.linalg.logm(B))
    assert spd_distance(A, B, metric="log_euclidean") == pytest.approx(truth)
    assert spd_distance(A, B, metric="log_euclidean") <= spd_distance(A, B) + 1e-12


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 2**31))
def test_affine_answers_follow_any_linear_change_of_the_data(seed):
    rng = np.random.default_rng(seed)
    change = rng.standard_normal((4, 4)) + 3 * np.eye(4)
    moved = change @ STACK @ change.T
    np.testing.assert_allclose(spd_distance(moved, moved[0]), spd_distance(STACK, A), atol=1e-7)
    np.testing.assert_allclose(spd_mean(moved), change @ spd_mean(STACK) @ change.T, rtol=1e-6)
    assert spd_distance(A, B, metric="log_euclidean") != pytest.approx(
        spd_distance(*moved[:2], metric="log_euclidean"), rel=1e-6
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("weights", [None, np.arange(1.0, 7.0)])
def test_means_and_distances_are_those_of_geomstats(metric, weights):
    spd = pytest.importorskip("geomstats.geometry.spd_matrices")
    options = {"weights": weights, "metric": metric}
    ours, theirs = spd_mean(STACK, **options), spd_mean(STACK, **options, backend="geomstats")
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    space = spd.SPDMatrices(4, equip=False)
    space.equip_with_metric(
        spd.SPDAffineMetric if metric == "affine" else spd.SPDLogEuclideanMetric
    )
    assert spd_distance(A, B, metric=metric) == pytest.approx(float(space.metric.dist(A, B)))


@pytest.mark.parametrize("metric", METRICS)
def test_the_mean_does_not_swell(metric):
    dets = np.linalg.det(STACK)
    mean = np.linalg.det(spd_mean(STACK, metric=metric))
    assert mean == pytest.approx(np.exp(np.log(dets).mean()))
    assert np.linalg.det(STACK.mean(0)) > 1.5 * mean


def test_far_apart_matrices_still_have_a_stationary_mean():
    far = np.stack([rotated([1e4, 1e-4, 1, 1]), np.diag([1e-4, 1, 1e4, 1.0]), A])
    mean = spd_mean(far)
    assert np.isfinite(mean).all()
    root = np.linalg.inv(scipy.linalg.sqrtm(mean))
    logs = [scipy.linalg.logm(root @ M @ root) for M in far]
    assert np.linalg.norm(np.mean(logs, 0)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tensors_in_tensors_out(dtype):
    stack = torch.tensor(STACK, dtype=dtype)
    for metric in METRICS:
        mean = spd_mean(stack, metric=metric)
        assert mean.dtype == spd_distance(stack, mean, metric=metric).dtype == dtype
        np.testing.assert_allclose(mean, spd_mean(STACK, metric=metric), rtol=1e-3)
    assert isinstance(spd_mean(STACK), np.ndarray)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spd_distance(A, np.diag([1.0, 1, 1, 0])), "B must be symmetric positive definite"),
        (lambda: spd_distance(A + np.triu(A, 1), B), "matrix 0 is not symmetric"),
        (lambda: spd_distance(A, B[:3, :3]), "Give matrices of one size"),
        (lambda: spd_distance(A[:3], B), r"A has shape \(3, 4\)"),
        (lambda: spd_distance(A, B, metric="cosine"), "metric='cosine' is not known"),
        (lambda: spd_distance(A * np.inf, B), "A contains NaN or infinity"),
        (lambda: spd_mean(STACK[:0]), r"matrices have shape \(0, 4, 4\)"),
        (lambda: spd_mean(STACK, weights=np.zeros(6)), "not all zero"),
        (lambda: spd_mean(STACK, backend="jax"), "backend='jax' is not known"),
    ],
)
def test_impossible_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
