import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.manifold import Isomap
from sklearn.utils.estimator_checks import parametrize_with_checks

from manifold_unlearn.manifold import samples
from manifold_unlearn.manifold.geodesic import GeodesicMap
from manifold_unlearn.manifold.graph_geodesics import (
    distances_from,
    relaxed_distances,
    symmetric_graph,
)
from manifold_unlearn.manifold.noise_floor import signal_space
from manifold_unlearn.manifold.scaling import classical_scaling
from manifold_unlearn.manifold.tangent_lengths import local_planes, tangent_lengths

METHODS = ["graph", "tangent", "heat"]
CIRCLE = samples.circle(200, n_features=6, random_state=0).points
SPHERE = samples.sphere(600, n_features=5, random_state=0)


def relative_errors(found, exact):
    return np.abs(found - exact)[exact > 0] / exact[exact > 0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: samples.sphere(5000, n_features=128, random_state=0),
        lambda: samples.swiss_roll(5000, n_features=128, random_state=0),
        lambda: samples.swiss_roll(5000, n_features=128, noise=0.1, random_state=0),
    ],
    ids=["sphere", "roll", "noisy roll"],
)
def test_tangent_distances_are_right_to_one_percent(make):
    sample = make()
    fitted = GeodesicMap(method="tangent").fit(sample.points)
    rows = np.arange(0, 5000, 25)
    errors = relative_errors(
        fitted.geodesic_distances(sample.points[rows], sample.points),
        sample.geodesic_distances(rows),
    )
    assert np.median(errors) < 0.006
    assert np.quantile(errors, 0.95) < 0.03


def test_graph_distances_are_those_of_isomap():
    theirs = Isomap(n_neighbors=12).fit(SPHERE.points)
    ours = GeodesicMap().fit(SPHERE.points)
    np.testing.assert_allclose(ours.geodesic_distances(), theirs.dist_matrix_, rtol=1e-5)
    product = np.abs((ours.eigenvalues_ / theirs.kernel_pca_.eigenvalues_) - 1)
    assert product.max() < 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_heat_and_graph_are_near_the_truth(method):
    fitted = GeodesicMap(method=method).fit(SPHERE.points)
    assert np.median(relative_errors(fitted.geodesic_distances(), SPHERE.geodesic_distances())) < (
        0.06
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_landmarks", [None, 60])
def test_transform_of_the_fitted_rows_is_the_embedding(method, n_landmarks):
    X = SPHERE.points
    fitted = GeodesicMap(3, method=method, n_landmarks=n_landmarks).fit(X)
    np.testing.assert_allclose(fitted.transform(X), fitted.embedding_, atol=1e-6)
    np.testing.assert_allclose(fitted.transform(X[::9]), fitted.embedding_[::9], atol=1e-6)
    whole = fitted.geodesic_distances()
    some = fitted.geodesic_distances(X[:20], X)
    np.testing.assert_allclose(some, whole[:20], rtol=1e-5, atol=1e-6)
    assert (np.diag(whole) == 0).all()
    if n_landmarks:
        assert fitted.landmark_distances_.shape == (60, 600)


@pytest.mark.parametrize("method", METHODS)
def test_new_rows_lie_where_they_belong(method):
    sample = samples.swiss_roll(2000, n_features=8, random_state=0)
    fitted = GeodesicMap(method=method, n_landmarks=100).fit(sample.points[:1800])
    new = np.arange(1800, 2000)
    found = fitted.geodesic_distances(sample.points[new[:40]], sample.points[new[40:]])
    exact = sample.geodesic_distances(new[:40], new[40:])
    assert np.median(relative_errors(found, exact)) < (0.01 if method == "tangent" else 0.05)
    assert fitted.stress_ < 0.06
    both = np.concatenate([fitted.embedding_, fitted.transform(sample.points[new])])
    kept = np.linalg.norm(both[new[:40], None] - both[None, new[40:]], axis=2)
    assert np.median(relative_errors(kept, exact)) < 0.06


@pytest.mark.parametrize(("method", "limit"), [("graph", 0.06), ("tangent", 0.01), ("heat", 0.01)])
def test_paths_run_on_the_sphere_and_are_short(method, limit):
    sample = samples.sphere(2000, n_features=5, random_state=0)
    fitted = GeodesicMap(method=method, n_landmarks=50).fit(sample.points)
    path = fitted.geodesic_path(0, sample.points[7], 40)
    steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
    assert path.shape == (40, 5)
    np.testing.assert_allclose(path[[0, -1]], sample.points[[0, 7]], atol=1e-6)
    assert steps.sum() == pytest.approx(sample.geodesic_distances([0], [7])[0, 0], rel=limit)
    assert np.ptp(steps) < 0.05 * steps.mean()
    assert np.abs(np.linalg.norm(path, axis=1) - 1).max() < 0.02


def test_path_between_equal_ends_stays():
    path = GeodesicMap().fit(CIRCLE).geodesic_path(3, 3, 4)
    np.testing.assert_allclose(path, np.repeat(CIRCLE[3:4], 4, 0), atol=1e-9)


@pytest.mark.parametrize("method", ["graph", "tangent"])
@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e6]), st.floats(-10, 10))
def test_rotation_translation_order_and_scale(method, seed, scale, shift):
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    order = rng.permutation(600)
    plain = GeodesicMap(method=method).fit(SPHERE.points).geodesic_distances()
    moved = GeodesicMap(method=method).fit(scale * (SPHERE.points @ rotation + shift)[order])
    np.testing.assert_allclose(
        moved.geodesic_distances() / scale, plain[np.ix_(order, order)], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors_in_tensors_out(method, dtype):
    X = torch.from_numpy(SPHERE.points).to(dtype)
    fitted = GeodesicMap(method=method, n_landmarks=40).fit(X)
    values = [fitted.embedding_, fitted.transform(X), fitted.geodesic_distances(X[:5], X)]
    assert all(isinstance(v, torch.Tensor) and v.dtype == dtype for v in values)
    assert fitted.geodesic_path(0, 1, 5).dtype == dtype
    if dtype == torch.float32:
        double = GeodesicMap(method=method, n_landmarks=40).fit(SPHERE.points)
        np.testing.assert_allclose(
            values[2].numpy(),
            double.geodesic_distances(SPHERE.points[:5], SPHERE.points),
            atol=1e-3,
        )


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_it_answers_the_same(tmp_path, method):
    fitted = GeodesicMap(method=method, n_landmarks=40).fit(SPHERE.points)
    fitted.save(tmp_path / "map")
    loaded = GeodesicMap.load(tmp_path / "map")
    assert loaded.get_params() == fitted.get_params()
    X = SPHERE.points[:7] * 1.001
    assert (loaded.transform(X) == fitted.transform(X)).all()
    assert (loaded.geodesic_distances(X) == fitted.geodesic_distances(X)).all()
    assert (loaded.geodesic_path(1, 2) == fitted.geodesic_path(1, 2)).all()


@pytest.mark.parametrize("method", METHODS)
def test_parts_are_told_and_joined(method):
    X = np.concatenate([CIRCLE, CIRCLE[:150] + 50, CIRCLE[:100] - 50])
    with pytest.warns(UserWarning, match=r"falls into 3 parts \(the largest hold 200, 150, 100"):
        fitted = GeodesicMap(method=method).fit(X)
    distances = fitted.geodesic_distances()
    assert np.isfinite(distances).all()
    assert fitted.n_components_connected_ == 3
    assert np.array_equal(np.bincount(fitted.component_), [200, 150, 100])
    gap = np.linalg.norm(X[:200, None] - X[None, 200:350], axis=2).min()
    limit = 0.02 if method == "heat" else 1e-4  # heat fits the whole, no path
    assert distances[:200, 200:350].min() == pytest.approx(gap, rel=limit)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "X",
    [
        np.concatenate([CIRCLE, CIRCLE]),
        np.concatenate([CIRCLE, np.repeat(CIRCLE[:1], 600, axis=0)]),
        np.c_[CIRCLE, np.full((200, 3), 7.0)],
        np.outer(np.random.default_rng(0).standard_normal(200), np.ones(9)),
        np.random.default_rng(0).standard_normal((70, 400)),
        np.random.default_rng(0).standard_normal((200, 40)),
        np.random.default_rng(0).integers(0, 3, (200, 4)),
        np.concatenate([CIRCLE, np.full((1, 6), 1e6)]),
    ],
    ids=["pairs", "one row", "constant", "rank one", "d > n", "ball", "grid", "outlier"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_degenerate_data_give_finite_answers(X, method):
    fitted = GeodesicMap(method=method).fit(X)
    distances = fitted.geodesic_distances()
    assert np.isfinite(distances).all()
    assert np.isfinite(fitted.embedding_).all()
    assert np.isfinite(fitted.geodesic_path(0, len(X) - 1, 9)).all()
    np.testing.assert_allclose(
        fitted.transform(X), fitted.embedding_, atol=1e-4 * np.abs(fitted.embedding_).max()
    )


def test_duplicates_are_at_distance_zero():
    fitted = GeodesicMap().fit(np.concatenate([CIRCLE, CIRCLE]))
    assert (np.diag(fitted.geodesic_distances()[:200, 200:]) == 0).all()
    np.testing.assert_array_equal(fitted.embedding_[:200], fitted.embedding_[200:])


def test_a_line_has_one_coordinate():
    with pytest.warns(UserWarning, match="the distances embed in 1 coordinates"):
        fitted = GeodesicMap().fit(np.linspace(0, 1, 50)[:, None] * np.ones(3))
    assert (fitted.embedding_[:, 1] == 0).all()


@pytest.mark.parametrize(
    ("X", "options", "message"),
    [
        (np.ones((50, 3)), {}, "all 50 samples are equal"),
        (CIRCLE[:3], {}, "n_components=2 needs at least 4 samples; got n_samples=3"),
        (CIRCLE[:0], {}, "0 sample"),
        (CIRCLE, {"method": "fast"}, "method='fast' is not known"),
        (CIRCLE, {"n_components": 0}, "n_components=0 must be at least 1"),
        (CIRCLE, {"n_neighbors": 0}, "n_neighbors=0 must be at least 1"),
        (CIRCLE, {"n_landmarks": 1}, "n_landmarks=1 must be at least 3"),
        (CIRCLE, {"n_landmarks": 5, "n_components": 6}, "needs at least 7 landmarks; got 5"),
        (np.where(np.eye(200, 6) > 0, np.nan, CIRCLE), {}, "NaN or infinity: 6 of 200 rows"),
    ],
)
def test_impossible_requests_are_refused(X, options, message):
    with pytest.raises(ValueError, match=message):
        GeodesicMap(**options).fit(X)


def test_impossible_paths_are_refused_and_far_rows_told():
    fitted = GeodesicMap().fit(CIRCLE)
    with pytest.raises(ValueError, match="n_points=1 must be at least 2"):
        fitted.geodesic_path(0, 1, 1)
    with pytest.raises(ValueError, match="b=200 is not one of the 200 rows"):
        fitted.geodesic_path(0, 200)
    with pytest.raises(ValueError, match="a has 3 features"):
        fitted.geodesic_path([0.0, 1.0, 2.0], 1)
    with pytest.warns(UserWarning, match="1 of 1 rows lie far"):
        assert np.isfinite(fitted.transform(CIRCLE[:1] * 100)).all()


def test_neighbors_are_clamped_with_a_warning():
    with pytest.warns(UserWarning, match="n_neighbors=12 is more than the 7 other"):
        GeodesicMap().fit(CIRCLE[:8])


def test_relaxation_gives_the_distances_of_dijkstra():
    rng = np.random.default_rng(0)
    ends, lengths = rng.integers(0, 60, (2, 300)), rng.random(300) + 0.1
    graph = symmetric_graph(*torch.from_numpy(ends), torch.from_numpy(lengths), 60)
    sources = np.array([3, 17])
    torch.testing.assert_close(
        relaxed_distances(graph, sources, torch.device("cpu")),
        distances_from(graph, sources, "cpu"),
    )


def test_arcs_of_a_circle_are_exact():
    angles = torch.arange(0, 60, dtype=torch.float64) * 2 * torch.pi / 60
    X = torch.stack([angles.cos(), angles.sin()], 1)
    near = (torch.arange(60)[:, None] + torch.tensor([-2, -1, 1, 2])) % 60
    planes = local_planes(X, near, 1)
    planes = planes._replace(tilt=planes.tilt * 0)
    ahead = type(planes)(*(v.roll(-3, 0) for v in planes))
    found = tangent_lengths(X, planes, X.roll(-3, 0), ahead)
    torch.testing.assert_close(found.values, torch.full((60,), torch.pi / 10, dtype=torch.float64))


def test_noise_is_told_from_decay():
    rng = np.random.default_rng(0)
    noisy = samples.swiss_roll(1000, n_features=64, noise=0.1, random_state=0).points
    assert signal_space(torch.from_numpy(noisy)).basis.shape == (64, 3)
    decaying = rng.standard_normal((1000, 64)) * 0.8 ** np.arange(64)
    space = signal_space(torch.from_numpy(decaying))
    assert space is None or space.basis.shape[1] > 60


@pytest.mark.parametrize("n", [100, 900])
def test_scaling_returns_flat_points(n):
    X = torch.from_numpy(np.random.default_rng(0).standard_normal((n, 3)) * [3, 2, 1])
    distances = torch.cdist(X, X)
    found = classical_scaling(distances, 3).coordinates(distances)
    torch.testing.assert_close(torch.cdist(found, found), distances, rtol=1e-3, atol=1e-3)


def test_signature_is_the_contract():
    defaults = {n: p.default for n, p in inspect.signature(GeodesicMap).parameters.items()}
    assert defaults == {
        "n_components": 2,
        "n_neighbors": 12,
        "method": "graph",
        "n_landmarks": None,
        "device": "auto",
        "random_state": None,
    }
    assert vars(GeodesicMap()) == defaults


@pytest.mark.filterwarnings("ignore::UserWarning")
@parametrize_with_checks([GeodesicMap(method=method) for method in METHODS])
def test_scikit_learn_contract(estimator, check):
    check(estimator)
