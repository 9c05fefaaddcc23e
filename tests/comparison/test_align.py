import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import Ridge, RidgeCV

from manifold_unlearn.comparison.align import ManifoldAlignment, align_manifolds
from manifold_unlearn.manifold import DiffusionMap, samples

METHODS = ["procrustes", "cca", "alternating_diffusion", "gromov_wasserstein"]
RNG = np.random.default_rng(0)
A = RNG.standard_normal((150, 5)) * [3, 2, 1, 1, 0.5]


def rotation(n_features, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n_features, n_features)))[0]


def explained(embedding, functions):
    """Part of the functions' variance that is linear in the embedding."""
    design = np.c_[np.ones(len(embedding)), embedding]
    rest = functions - design @ np.linalg.lstsq(design, functions, rcond=None)[0]
    return 1 - (rest**2).sum() / ((functions - functions.mean(0)) ** 2).sum()


def circle(angle, radius=1.0):
    return radius * np.c_[np.cos(angle), np.sin(angle)]


# procrustes


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from([1e-6, 0.3, 1.0, 1e6]), st.floats(-1e3, 1e3))
def test_a_planted_rotation_scale_and_shift_are_recovered(seed, scale, shift):
    turn = rotation(5, seed)
    B = scale * A @ turn + shift
    found = align_manifolds(A, B)
    assert found.scale == pytest.approx(scale, rel=1e-8)
    np.testing.assert_allclose(found.matrix / scale, turn, atol=1e-8)
    np.testing.assert_allclose(found.offset, shift, atol=1e-8 * max(scale, abs(shift), 1))
    np.testing.assert_allclose(found.transform(A), B, atol=1e-8 * max(scale, abs(shift), 1))
    assert found.score == pytest.approx(1, abs=1e-8)
    new = np.random.default_rng(seed).standard_normal((7, 5))
    np.testing.assert_allclose(found.inverse_transform(found.transform(new)), new, atol=1e-7)


def test_it_is_the_least_squares_rigid_map():
    B = 2 * A @ rotation(5) + 0.5 * RNG.standard_normal((150, 5))
    found = align_manifolds(A, B)
    best = found.residual
    for _ in range(50):
        turn = rotation(5, RNG.integers(2**31))
        blend, _, v = np.linalg.svd(found.matrix / found.scale + 0.05 * turn)
        moved = found.scale * (1 + 0.02 * RNG.standard_normal()) * A @ (blend @ v)
        moved += B.mean(0) - moved.mean(0)
        assert np.sqrt(((moved - B) ** 2).sum(1).mean()) > best
    rest = found.transform(A) - B
    assert best == pytest.approx(np.sqrt((rest**2).sum(1).mean()))
    assert found.score == pytest.approx(1 - (rest**2).sum() / ((B - B.mean(0)) ** 2).sum())


def test_scale_and_reflection_may_be_forbidden():
    mirror = rotation(5)
    mirror[:, 0] *= -np.sign(np.linalg.det(mirror))
    B = 3 * A @ mirror
    assert align_manifolds(A, B).score == pytest.approx(1)
    proper = align_manifolds(A, B, reflection=False)
    assert np.linalg.det(proper.matrix) > 0
    assert 0.9 < proper.score < 0.999  # the thinnest direction is lost
    rigid = align_manifolds(A, B, scale=False)
    assert rigid.scale == 1
    np.testing.assert_allclose(rigid.matrix, mirror, atol=1e-8)


def test_a_smaller_space_is_turned_into_a_larger_one():
    wide = A @ rotation(9)[:5] + 1
    found = align_manifolds(A, wide)
    np.testing.assert_allclose(found.transform(A), wide, atol=1e-10)
    np.testing.assert_allclose(found.inverse_transform(wide), A, atol=1e-10)
    back = align_manifolds(wide, A)
    np.testing.assert_allclose(back.transform(wide), A, atol=1e-10)
    with pytest.raises(ValueError, match="from 9 to 5 dimensions has no inverse"):
        back.inverse_transform(A)


# cca


def planted(correlations, n_samples=20_000, seed=0):
    """Views whose canonical correlations are known."""
    rng = np.random.default_rng(seed)
    k = len(correlations)
    shared, own, noise = rng.standard_normal((3, n_samples, k))
    rho = np.sqrt(np.asarray(correlations))
    a, b = (rho * shared + np.sqrt(1 - rho**2) * rest for rest in (own, noise))
    pads = rng.standard_normal((2, n_samples, 3))
    mix = rng.standard_normal((2, k + 3, k + 3))
    return np.c_[a, pads[0]] @ mix[0] + 4, np.c_[b, pads[1]] @ mix[1], shared


@pytest.mark.parametrize("regularization", [0.0, "auto"])
def test_planted_canonical_correlations_are_recovered(regularization):
    X, Y, _ = planted([0.9, 0.6, 0.3])
    found = align_manifolds(X, Y, "cca", regularization=regularization)
    np.testing.assert_allclose(found.correlations[:3], [0.9, 0.6, 0.3], atol=0.02)
    assert (found.correlations[3:] < 0.05).all()
    z_a, z_b = found.shared(X), found.shared(Y, "B")
    np.testing.assert_allclose(z_a.std(0), 1)
    pairs = [np.corrcoef(a, b)[0, 1] for a, b in zip(z_a.T, z_b.T, strict=True)]
    np.testing.assert_allclose(pairs, found.correlations, atol=1e-10)


def test_correlations_are_those_of_the_matrix_formula_and_of_scikit_learn():
    X, Y, _ = planted([0.8, 0.5], n_samples=300)
    found = align_manifolds(X, Y, "cca", regularization=0.0)
    C, D = X - X.mean(0), Y - Y.mean(0)
    product = np.linalg.solve(C.T @ C, C.T @ D) @ np.linalg.solve(D.T @ D, D.T @ C)
    formula = np.sqrt(np.sort(np.linalg.eigvals(product).real)[::-1])
    np.testing.assert_allclose(found.correlations, formula, atol=1e-10)
    theirs = CCA(2, max_iter=5000, tol=1e-12).fit(X, Y)
    u, v = theirs.transform(X, Y)
    expected = [np.corrcoef(u[:, i], v[:, i])[0, 1] for i in range(2)]
    np.testing.assert_allclose(found.correlations[:2], expected, atol=1e-6)


def test_with_all_coordinates_and_no_shrinkage_it_is_least_squares():
    X, Y, _ = planted([0.8, 0.5], n_samples=300)
    found = align_manifolds(X, Y, "cca", regularization=0.0)
    design = np.c_[np.ones(300), X]
    fitted = design @ np.linalg.lstsq(design, Y, rcond=None)[0]
    np.testing.assert_allclose(found.transform(X), fitted, atol=1e-8)
    back = np.c_[np.ones(300), Y]
    inverse = back @ np.linalg.lstsq(back, X, rcond=None)[0]
    np.testing.assert_allclose(found.inverse_transform(Y), inverse, atol=1e-8)


def test_a_ridge_is_that_of_scikit_learn():
    X, Y, _ = planted([0.8, 0.5], n_samples=60)
    found = align_manifolds(X, Y, "cca", regularization=0.3)
    penalty = 0.3 * X.var(0).mean() * 60
    np.testing.assert_allclose(found.transform(X), Ridge(penalty).fit(X, Y).predict(X), atol=1e-10)


def test_regularization_predicts_new_rows_of_wide_data_better():
    X, Y, _ = planted([0.9, 0.9], n_samples=400, seed=1)
    X = np.c_[X, RNG.standard_normal((400, 95))]
    train, new = slice(0, 110), slice(110, 400)
    errors = []
    for regularization in (0.0, "auto"):
        found = align_manifolds(X[train], Y[train], "cca", regularization=regularization)
        errors.append(((found.transform(X[new]) - Y[new]) ** 2).mean() / Y[new].var(0).mean())
    assert errors[1] < 1 < errors[0]  # one is the error of the mean
    theirs = RidgeCV(np.logspace(-3, 5, 40)).fit(X[train], Y[train]).predict(X[new])
    assert errors[1] < 1.05 * ((theirs - Y[new]) ** 2).mean() / Y[new].var(0).mean()


def test_few_coordinates_are_the_first_of_all():
    X, Y, shared = planted([0.95, 0.6, 0.3])
    all_of_them = align_manifolds(X, Y, "cca")
    two = align_manifolds(X, Y, "cca", n_components=2)
    np.testing.assert_allclose(two.shared(X), all_of_them.shared(X)[:, :2], atol=1e-10)
    assert explained(two.shared(X)[:, :1], shared[:, :1]) > 0.9


# alternating diffusion


def two_views(n_samples, seed=0, curve=circle):
    """A common angle, and in each view a larger circle of its own."""
    rng = np.random.default_rng(seed)
    common, own, other = rng.uniform(0, 2 * np.pi, (3, n_samples))
    first = np.c_[circle(common), circle(own, 2.0)]
    second = np.c_[curve(common), circle(other, 2.0)]
    turns = rotation(10, seed)[:4], rotation(7, seed + 1)[: second.shape[1]]
    return first @ turns[0], second @ turns[1], circle(common)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_common_angle_is_recovered_where_either_view_alone_fails(seed):
    X, Y, common = two_views(1300, seed)
    train, new = slice(0, 1000), slice(1000, 1300)
    for view in (X, Y):
        assert explained(DiffusionMap(2).fit_transform(view[train]), common[train]) < 0.05
    found = align_manifolds(X[train], Y[train], "alternating_diffusion")
    for rows in (train, new):
        assert explained(found.shared(X[rows])[:, :2], common[rows]) > 0.98
        assert explained(found.shared(Y[rows], "B")[:, :2], common[rows]) > 0.98
    assert (np.diff(found.correlations) <= 1e-12).all()
    assert 0.5 < found.correlations[1] < 1


def test_it_sees_what_no_linear_map_shares():
    def harmonics(angle):
        return np.c_[circle(2 * angle), circle(3 * angle)]

    X, Y, common = two_views(1200, 2, harmonics)
    linear = align_manifolds(X, Y, "cca", regularization=0.0)
    assert linear.correlations[0] < 0.2
    found = align_manifolds(X, Y, "alternating_diffusion")
    assert explained(found.shared(X)[:, :2], common) > 0.95


def test_the_map_is_the_mean_given_the_common_part():
    X, Y, common = two_views(1500, 3)
    found = align_manifolds(X[:1200], Y[:1200], "alternating_diffusion")
    mean = common @ rotation(7, 4)[:2]  # the nuisance circle averages out
    error = ((found.transform(X[1200:]) - mean[1200:]) ** 2).mean() / mean.var(0).mean()
    assert error < 0.2
    own = ((Y[1200:] - mean[1200:]) ** 2).mean() / mean.var(0).mean()
    assert own > 1


def test_fitted_rows_keep_their_coordinates():
    X, Y, _ = two_views(300)
    found = align_manifolds(X, Y, "alternating_diffusion")
    np.testing.assert_allclose(found.shared(X).std(0), 1, atol=1e-8)
    assert np.abs(found.shared(X).mean(0)).max() < 1e-8
    part = found.shared(X[::7])
    np.testing.assert_allclose(part, found.shared(X)[::7], atol=1e-10)


def test_landmarks_place_the_rest():
    X, Y, common = two_views(1500)
    found = align_manifolds(X, Y, "alternating_diffusion", n_landmarks=800)
    assert len(found.rows_A) == 800
    assert explained(found.shared(X)[:, :2], common) > 0.95


# gromov-wasserstein


def test_an_unpaired_copy_is_found_and_mapped_back():
    order = RNG.permutation(150)
    B = (1.0 * A @ rotation(5) + 2)[order]
    found = align_manifolds(A, B, "gromov_wasserstein")
    np.testing.assert_array_equal(order[found.correspondence], np.arange(150))
    assert found.distance == pytest.approx(0, abs=1e-6)
    assert found.scale == pytest.approx(1)
    new = RNG.standard_normal((5, 5))
    np.testing.assert_allclose(found.transform(new), new @ rotation(5) + 2, atol=1e-8)
    np.testing.assert_allclose(found.inverse_transform(found.transform(new)), new, atol=1e-8)


def test_a_cloud_in_another_space_is_found():
    order = RNG.permutation(150)
    B = (A @ rotation(8)[:5])[order] + 0.02 * RNG.standard_normal((150, 8))
    found = align_manifolds(A, B, "gromov_wasserstein")
    assert (order[found.correspondence] == np.arange(150)).mean() > 0.9
    assert found.score > 0.99


def test_given_distances_and_local_means_bend_the_roll_flat():
    roll = samples.swiss_roll(260, random_state=0)
    flat = roll.intrinsic_coordinates
    order = RNG.permutation(200)
    within = roll.geodesic_distances(np.arange(200), np.arange(200))
    found = align_manifolds(
        roll.points[:200],
        flat[:200][order],
        "gromov_wasserstein",
        distances=(within, within[order][:, order]),
        barycentric=True,
    )
    np.testing.assert_array_equal(order[found.correspondence], np.arange(200))
    error = np.abs(found.transform(roll.points[200:]) - flat[200:]).mean()
    assert error < 3  # the rectangle is 90 by 21
    rigid = align_manifolds(roll.points[:200], flat[:200], "procrustes")
    assert np.abs(rigid.transform(roll.points[200:]) - flat[200:]).mean() > 5


# all


def views(method):
    if method == "alternating_diffusion":
        X, Y, _ = two_views(200)
        return X, Y
    if method == "cca":
        X, Y, _ = planted([0.9, 0.5], n_samples=200)
        return X, Y
    return A, A @ rotation(8)[:5]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_saved_and_loaded_it_answers_the_same(tmp_path, method, kind):
    X, Y = views(method)
    X, Y = (torch.tensor(X), torch.tensor(Y)) if kind == "torch" else (X, Y)
    found = align_manifolds(X, Y, method)
    found.save(tmp_path / "map")
    loaded = ManifoldAlignment.load(tmp_path / "map")
    assert type(loaded.rows_A) is type(found.rows_A)
    assert (loaded.transform(X) == found.transform(X)).all()
    assert (loaded.inverse_transform(Y) == found.inverse_transform(Y)).all()
    for name in ("method", "score", "residual", "n_features", "scale", "distance"):
        assert getattr(loaded, name) == getattr(found, name)
    for name in ("matrix", "correlations", "coupling", "correspondence"):
        value = getattr(found, name)
        assert value is None or (getattr(loaded, name) == value).all()
    if method in ("cca", "alternating_diffusion"):
        assert (loaded.shared(Y, "B") == found.shared(Y, "B")).all()
    manifest = json.loads((tmp_path / "map" / "artifact.json").read_text())
    assert manifest["kind"] == "ManifoldAlignment"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tensors_in_tensors_out(method, dtype):
    X, Y = (torch.tensor(side, dtype=dtype) for side in views(method))
    found = align_manifolds(X, Y, method)
    out = found.transform(X)
    assert (out.dtype, out.device) == (dtype, X.device)
    plain = align_manifolds(*views(method), method)
    assert isinstance(plain.transform(X.numpy()), np.ndarray)
    np.testing.assert_allclose(out, plain.transform(X.double().numpy()), atol=2e-2)
    assert found.score == pytest.approx(plain.score, abs=1e-3)
    for name in ("matrix", "offset", "correlations", "coupling"):
        value = getattr(found, name)
        assert value is None or value.dtype == dtype


@pytest.mark.parametrize("method", METHODS)
def test_it_is_repeatable(method):
    X, Y = views(method)
    first, second = (align_manifolds(X, Y, method, n_landmarks=100) for _ in range(2))
    np.testing.assert_array_equal(first.transform(X), second.transform(X))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("X", "Y"),
    [
        (np.repeat(A, 2, axis=0), np.repeat(A[:, :3], 2, axis=0)),
        (np.c_[A, np.ones(150)], A),
        (np.r_[A, np.full((1, 5), 1e6)], np.r_[A, A[:1]]),
        (np.outer(np.arange(60.0), np.ones(4)), A[:60]),
        (RNG.standard_normal((30, 90)), RNG.standard_normal((30, 80))),
        (np.r_[np.zeros((100, 5)), A[:50]], A),
        (A + 1e6, A),
        (A[:12], A[:12]),
    ],
    ids=["pairs", "constant", "outlier", "rank one", "d > n", "mostly one", "far", "few"],
)
def test_degenerate_data_give_finite_maps(method, X, Y):
    found = align_manifolds(X, Y, method)
    assert np.isfinite(found.transform(X)).all()
    assert np.isfinite([found.score, found.residual]).all()
    if method in ("cca", "alternating_diffusion"):
        assert np.isfinite(found.shared(X)).all()
        assert np.isfinite(found.inverse_transform(Y)).all()


def test_neighbors_are_clamped_with_a_warning():
    with pytest.warns(UserWarning, match="n_neighbors=16 is more than the 11 other rows"):
        align_manifolds(A[:12], A[:12], "alternating_diffusion", n_neighbors=16)


@pytest.mark.parametrize(
    ("X", "Y", "method", "options", "message"),
    [
        (A, A, "icp", {}, "method='icp' is not known"),
        (A, A[:99], "procrustes", {}, "A has 150 rows, B has 99: row i of A must belong"),
        (A, A[:99], "cca", {}, "A has 150 rows, B has 99"),
        (A[:2], A[:2], "procrustes", {}, "have 2 rows; at least 3"),
        (A[:2], A, "gromov_wasserstein", {}, "minimum of 3"),
        (A, np.ones((150, 2)), "cca", {}, "all 150 rows of B are equal"),
        (A, np.ones((90, 2)), "gromov_wasserstein", {}, "all 90 rows of B are equal"),
        (A, A, "cca", {"n_components": 6}, "n_components=6 is more than the 5 directions"),
        (A, A, "cca", {"n_components": 0}, "n_components=0 must be at least 1"),
        (A, A, "cca", {"regularization": -1.0}, "regularization=-1.0 must be finite and not neg"),
        (A, A, "cca", {"regularization": "cv"}, "regularization='cv' must be finite"),
        (A[:9], A[:9], "alternating_diffusion", {}, "n_components=8 needs at least 10 rows"),
        (A, A, "alternating_diffusion", {"n_neighbors": 0}, "n_neighbors=0 must be at least 1"),
        (A, A, "gromov_wasserstein", {"n_neighbors": 0}, "n_neighbors=0 must be at least 1"),
        (A, A, "gromov_wasserstein", {"n_landmarks": 2}, "n_landmarks=2 must be at least 4"),
        (
            A,
            A,
            "gromov_wasserstein",
            {"distances": (np.eye(3), np.eye(3))},
            "distances within A have 3 rows, A has 150",
        ),
        (np.where(np.eye(150, 5) > 0, np.nan, A), A, "procrustes", {}, "NaN or infinity: 5 of"),
    ],
)
def test_impossible_requests_are_refused(X, Y, method, options, message):
    with pytest.raises(ValueError, match=message):
        align_manifolds(X, Y, method, **options)


def test_what_the_method_has_not_is_refused():
    found = align_manifolds(A, A)
    with pytest.raises(ValueError, match="method='procrustes' has no shared coordinates"):
        found.shared(A)
    with pytest.raises(ValueError, match="X has 3 columns, A has 5"):
        found.transform(A[:, :3])
    with pytest.raises(ValueError, match="side='C' is not known"):
        found.shared(A, "C")
