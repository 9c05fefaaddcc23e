import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_unlearn.manifold import samples
from manifold_unlearn.manifold.grassmann import (
    align_frames,
    subspace_angles,
    subspace_distance,
    subspace_mean,
    subspace_path,
    transport,
)
from manifold_unlearn.manifold.tangent import TangentBundle

RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((2, 9, 3))
NEAR = A + 0.3 * RNG.standard_normal((7, 9, 3))


def tilted(angles, d=8):
    """Two subspaces of R^d at these principal angles."""
    k = len(angles)
    first = np.eye(d)[:, :k]
    second = np.zeros((d, k))
    second[:k], second[k : 2 * k] = np.diag(np.cos(angles)), np.diag(np.sin(angles))
    return first, second


def test_angles_are_scipys_for_any_dimensions():
    np.testing.assert_allclose(subspace_angles(A, B), scipy.linalg.subspace_angles(A, B)[::-1])
    np.testing.assert_allclose(
        subspace_angles(A, B[:, :2]), scipy.linalg.subspace_angles(A, B[:, :2])[::-1]
    )
    np.testing.assert_allclose(subspace_angles(B[:, :2], A), subspace_angles(A, B[:, :2]))


@pytest.mark.parametrize("angles", [[1e-12, 1e-9, 1e-5], [0, 1e-8, np.pi / 2], [0.3, 0.3, 1.5]])
def test_small_and_right_angles_keep_their_accuracy(angles):
    first, second = tilted(angles)
    np.testing.assert_allclose(subspace_angles(first, second), angles, rtol=1e-10, atol=1e-15)


def test_stacks_are_answered_one_by_one():
    stacked = subspace_angles(NEAR, A)
    assert stacked.shape == (7, 3)
    np.testing.assert_allclose(stacked[2], subspace_angles(NEAR[2], A))
    assert subspace_distance(NEAR, A).shape == (7,)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 2**31))
def test_distance_is_a_metric_of_subspaces(seed):
    rng = np.random.default_rng(seed)
    X, Y, Z = rng.standard_normal((3, 7, 2))
    rotation, _ = np.linalg.qr(rng.standard_normal((7, 7)))
    there = subspace_distance(X, Y)
    assert there == pytest.approx(subspace_distance(Y, X))
    assert there == pytest.approx(subspace_distance(rotation @ X, rotation @ Y))
    assert there == pytest.approx(subspace_distance(X @ rng.standard_normal((2, 2)), Y))
    assert there <= subspace_distance(X, Z) + subspace_distance(Z, Y) + 1e-12


def test_distance_is_that_of_geomstats():
    Grassmannian = pytest.importorskip("geomstats.geometry.grassmannian").Grassmannian
    first, second = (np.linalg.qr(M)[0] for M in (A, A + 0.3 * B))
    theirs = Grassmannian(9, 3).metric.dist(first @ first.T, second @ second.T)
    assert subspace_distance(first, second) == pytest.approx(float(theirs) / np.sqrt(2), rel=1e-6)


def test_a_path_is_shortest_and_of_even_speed():
    whole = subspace_distance(A, B)
    path = subspace_path(A, B, [0, 0.25, 0.5, 1])
    np.testing.assert_allclose(
        np.einsum("ndk,ndl->nkl", path, path), np.tile(np.eye(3), (4, 1, 1)), atol=1e-12
    )
    np.testing.assert_allclose(subspace_distance(path, A), whole * np.array([0, 0.25, 0.5, 1]),
                               atol=1e-12)  # fmt: skip
    assert subspace_distance(path[3], B) < 1e-12
    assert subspace_distance(path[1], path[2]) == pytest.approx(whole / 4)


def test_columns_move_in_parallel_along_a_path():
    fine = subspace_path(A, B, np.linspace(0, 1, 2001))
    steps = np.einsum("ndk,ndl->nkl", fine[:-1], np.diff(fine, axis=0))
    assert np.abs(steps).max() < 1e-5 < np.abs(np.diff(fine, axis=0)).max()


def test_mean_of_two_is_the_middle_and_weights_pull():
    middle = subspace_path(A, NEAR[0], [0.5, 0.2])
    pair = np.stack([A, NEAR[0]])
    assert subspace_distance(subspace_mean(pair), middle[0]) < 1e-9
    assert subspace_distance(subspace_mean(pair, weights=[8, 2]), middle[1]) < 1e-9


@pytest.mark.parametrize("weights", [None, np.arange(1.0, 8.0)])
def test_mean_is_that_of_geomstats_and_stationary(weights):
    pytest.importorskip("geomstats")
    ours = subspace_mean(NEAR, weights=weights)
    theirs = subspace_mean(NEAR, weights=weights, backend="geomstats")
    assert subspace_distance(ours, theirs) < 1e-4
    share = np.ones(7) / 7 if weights is None else weights / weights.sum()

    def spread(basis):
        return share @ subspace_distance(NEAR, basis) ** 2

    for direction in np.random.default_rng(1).standard_normal((5, 9, 3)):
        assert spread(ours + 1e-3 * direction) > spread(ours)


def test_mean_tangent_of_a_cap_is_the_plane_at_its_pole():
    sample = samples.sphere(2000, n_features=12, random_state=0)
    cap = sample.points[sample.intrinsic_coordinates[:, 2] > 0.95]
    bases = TangentBundle(2).fit(sample.points).tangent_bases(cap)
    plane = sample.isometry[:2].T
    assert subspace_distance(subspace_mean(bases), plane) < 0.05
    assert np.median(subspace_distance(bases, plane)) > 0.15


def test_transport_around_a_cap_turns_by_its_area():
    """Holonomy of the sphere: around a circle of latitude a vector turns by the solid angle."""
    height = 0.6
    angle = np.linspace(0, 2 * np.pi, 400)
    ring = np.sqrt(1 - height**2)
    points = np.stack([ring * np.cos(angle), ring * np.sin(angle), np.full(400, height)], 1)
    east = np.stack([-np.sin(angle), np.cos(angle), np.zeros(400)], 1)
    frames = np.stack([east, np.cross(points, east)], 2)
    rng = np.random.default_rng(0)
    turn = rng.uniform(0, 2 * np.pi, 400)
    turn[-1] = turn[0]
    spun = np.stack([np.stack([np.cos(turn), np.sin(turn)], 1),
                     np.stack([-np.sin(turn), np.cos(turn)], 1)], 2)  # fmt: skip
    frames = frames @ spun
    vector = frames[0, :, 0]
    total = np.eye(2)
    for step in align_frames(frames[:-1], frames[1:]):
        total = step @ total
    turned = np.arccos(np.trace(total) / 2)
    assert turned == pytest.approx(2 * np.pi * (1 - height) % (2 * np.pi), abs=1e-3)
    for source, target in zip(frames[:-1], frames[1:], strict=True):
        vector = transport(vector, source, target)
    np.testing.assert_allclose(vector, frames[-1] @ total[:, 0], atol=1e-10)
    assert np.linalg.norm(vector) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tensors_in_tensors_out(dtype):
    first, second = torch.tensor(A, dtype=dtype), torch.tensor(B, dtype=dtype)
    stack = torch.tensor(NEAR, dtype=dtype)
    frame = torch.linalg.qr(first).Q
    answers = [
        subspace_angles(first, second),
        subspace_distance(first, second),
        subspace_path(first, second, torch.tensor([0.5])),
        subspace_mean(stack),
        align_frames(frame, torch.linalg.qr(second).Q),
        transport(first[:, 0], frame, torch.linalg.qr(second).Q),
    ]
    assert all(isinstance(a, torch.Tensor) and a.dtype == dtype for a in answers)
    np.testing.assert_allclose(answers[0], subspace_angles(A, B), atol=1e-5)
    assert isinstance(subspace_mean(NEAR), np.ndarray)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: subspace_angles(np.ones((9, 2)), A), "A has dependent columns"),
        (lambda: subspace_angles(A, B[:5]), "A has 9 rows, B has 5"),
        (lambda: subspace_angles(A[:2], B[:2]), r"A has shape \(2, 3\)"),
        (lambda: subspace_angles(A * np.nan, B), "A contains NaN or infinity"),
        (lambda: subspace_distance(A, B[:, :2]), "the same d and k"),
        (lambda: subspace_path(*tilted([0.1, np.pi / 2]), [0.5]), "meet at a right angle"),
        (lambda: subspace_path(NEAR, NEAR, [0.5]), "expected .d, k., one subspace"),
        (lambda: subspace_mean(A), r"bases have shape \(9, 3\)"),
        (lambda: subspace_mean(NEAR[:0]), r"bases have shape \(0, 9, 3\)"),
        (lambda: subspace_mean(NEAR, weights=[1, 2]), r"weights have shape \(2,\); expected \(7,"),
        (lambda: subspace_mean(NEAR, weights=-np.ones(7)), "weights must be finite, not neg"),
        (lambda: subspace_mean(NEAR, backend="jax"), "backend='jax' is not known"),
        (lambda: align_frames(A, B[:, :2]), "the same d and k"),
        (lambda: transport(A[:4, 0], A, B), "vectors have 4 entries; expected 9"),
    ],
)
def test_impossible_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
