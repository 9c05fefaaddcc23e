import numpy as np
import pytest
import scipy.linalg
import torch
from cases import ERASERS, two_classes
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge

from manifold_unlearn.erase.moments import Moments, shrink
from manifold_unlearn.erase.subspace import SubspaceEraser

EXACT = {"shrinkage": 0.0}
"""The published formulas use the plain covariance."""


@pytest.fixture(params=ERASERS)
def parameters(request):
    return ERASERS[request.param]


@pytest.fixture(params=[True, False], ids=["affine", "linear"])
def affine(request):
    return request.param


def retain_moments(X, y):
    kept = X[y != 1]
    return kept.mean(0), np.cov(kept.T, ddof=0)


def accuracy(X, y):
    return LogisticRegression(max_iter=2000, C=1e4).fit(X, y).score(X, y)


def separated_only_by_means(n=600, d=10, seed=0):
    """Balanced classes of one covariance, half of them a probe tells apart perfectly."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
    y = np.arange(n) % 2
    X[y == 1] += 6 * rng.normal(size=d)
    return X, y


# --- what erasure means ---------------------------------------------------------------------


@pytest.mark.parametrize("protect_retain", [True, False])
def test_after_leace_a_linear_probe_is_at_chance(protect_retain):
    X, y = separated_only_by_means()
    assert accuracy(X, y) > 0.95
    erased = SubspaceEraser("leace", protect_retain=protect_retain, **EXACT).fit_transform(X, y)
    np.testing.assert_allclose(erased[y == 1].mean(0), erased[y == 0].mean(0), atol=1e-8)
    assert accuracy(erased, y) == pytest.approx(0.5, abs=0.01)
    least_squares = Ridge(1e-9).fit(erased, y).predict(erased)
    np.testing.assert_allclose(least_squares, y.mean(), atol=1e-6)


def test_removing_another_direction_leaves_the_probe():
    """The control of the test above: rank one by itself does not hide the classes."""
    X, y = separated_only_by_means()
    noise = np.random.default_rng(1).integers(0, 2, len(y))
    erased = SubspaceEraser("leace", **EXACT).fit(X, noise).transform(X)
    assert accuracy(erased, y) > 0.9


def test_leace_is_the_published_formula():
    X, y = two_classes()
    centered, z = X - X.mean(0), (y - y.mean())[:, None]
    sxx = centered.T @ centered / len(y)
    sxz = centered.T @ z / len(y)
    inverse = np.linalg.inv(sxx)
    projection = np.eye(12) - sxz @ np.linalg.inv(sxz.T @ inverse @ sxz) @ sxz.T @ inverse
    eraser = SubspaceEraser("leace", protect_retain=False, **EXACT).fit(X, y)
    np.testing.assert_allclose(eraser.matrix_, projection, atol=1e-8)
    np.testing.assert_allclose(eraser.bias_, X.mean(0) - projection @ X.mean(0), atol=1e-8)


def test_every_method_hides_what_it_reads(parameters):
    X, y = two_classes()
    eraser = SubspaceEraser(**parameters).fit(X, y)
    read = X @ eraser.directions_
    assert (read.std(0) > 0.1).all()
    after = eraser.transform(X) @ eraser.directions_
    np.testing.assert_allclose(after, np.broadcast_to(after[0], after.shape), atol=1e-9)
    center = X[y != 1].mean(0) @ eraser.directions_
    np.testing.assert_allclose(after[0], center, atol=1e-9)


def test_no_affine_map_hides_the_read_out_of_retain_rows_at_less_cost(parameters):
    """The LEACE theorem: least change such that ``cov(T(h), A'h) = 0`` on the retain rows."""
    X, y = two_classes()
    eraser = SubspaceEraser(**parameters, **EXACT).fit(X, y)
    kept = X[y != 1]
    center, spread = retain_moments(X, y)
    seen = spread @ eraser.directions_
    np.testing.assert_allclose(eraser.matrix_ @ seen, 0, atol=1e-8)
    moved = np.mean(np.sum((eraser.transform(kept) - kept) ** 2, axis=1))
    blind = np.eye(12) - seen @ np.linalg.pinv(seen)
    rng = np.random.default_rng(0)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        matrix = eraser.matrix_ + size * rng.normal(size=(12, 12)) @ blind
        rival = kept @ matrix.T + eraser.bias_ + size * rng.normal(size=12)
        np.testing.assert_allclose(matrix @ seen, 0, atol=1e-8)
        assert np.mean(np.sum((rival - kept) ** 2, axis=1)) > moved


def test_no_map_comes_to_the_read_out_by_shorter_moves_in_units_of_the_retain_rows(parameters):
    X, y = two_classes()
    eraser = SubspaceEraser(**parameters, **EXACT).fit(X, y)
    A, after = eraser.directions_, eraser.transform(X)
    _, spread = retain_moments(X, y)
    unit = np.linalg.inv(np.linalg.cholesky(spread)).T
    moves = np.linalg.norm((after - X) @ unit, axis=1)
    blind = np.eye(12) - A @ np.linalg.pinv(A)  # A' blind = 0: such a change keeps the read-out
    rng = np.random.default_rng(0)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        rival = after + size * rng.normal(size=X.shape) @ blind
        np.testing.assert_allclose(rival @ A, after @ A, atol=1e-8)
        assert (np.linalg.norm((rival - X) @ unit, axis=1) > moves).all()


def test_without_protection_moves_are_shorter_and_the_read_out_still_correlates():
    X, y = two_classes()
    kept = X[y != 1]
    moved, told = {}, {}
    for protect in (True, False):
        eraser = SubspaceEraser("pca", rank=2, protect_retain=protect, **EXACT).fit(X, y)
        after = eraser.transform(kept)
        moved[protect] = np.mean(np.sum((after - kept) ** 2, axis=1))
        told[protect] = Ridge(1e-9).fit(after, kept @ eraser.directions_)
        told[protect] = told[protect].score(after, kept @ eraser.directions_)
    assert moved[False] < moved[True]
    assert told[False] > 0.3
    assert told[True] == pytest.approx(0, abs=1e-6)
    orthogonal = SubspaceEraser("pca", rank=2, protect_retain=False).fit(X, y).matrix_
    np.testing.assert_allclose(orthogonal, orthogonal.T, atol=1e-10)


# --- laws of every method -------------------------------------------------------------------


@pytest.mark.parametrize("protect_retain", [True, False])
def test_the_map_is_idempotent(parameters, affine, protect_retain):
    X, y = two_classes()
    eraser = SubspaceEraser(**parameters, affine=affine, protect_retain=protect_retain)
    once = eraser.fit(X, y).transform(X)
    assert np.abs(once - X).max() > 0.1
    np.testing.assert_allclose(eraser.transform(once), once, atol=1e-8)


def test_matrix_and_bias_agree_with_transform_and_the_call(parameters, affine):
    X, y = two_classes()
    eraser = SubspaceEraser(**parameters, affine=affine).fit(X, y)
    expected = X @ eraser.matrix_.T + eraser.bias_
    np.testing.assert_allclose(eraser.transform(X), expected, atol=1e-9)
    hidden = torch.from_numpy(X[:6]).reshape(2, 3, 12)
    np.testing.assert_allclose(eraser(hidden).reshape(6, 12), expected[:6], atol=1e-9)
    placed = eraser.to("cpu", torch.float64)
    np.testing.assert_allclose(placed(hidden).reshape(6, 12), expected[:6], atol=1e-9)
    linear = eraser.linear()
    np.testing.assert_allclose(linear(hidden).reshape(6, 12), X[:6] @ eraser.matrix_.T, atol=1e-9)


def test_the_map_takes_away_exactly_its_rank(parameters, affine):
    X, y = two_classes()
    eraser = SubspaceEraser(**parameters, affine=affine).fit(X, y)
    rank = parameters.get("rank", 1)
    assert np.linalg.matrix_rank(np.eye(12) - eraser.matrix_, tol=1e-8) == rank
    assert eraser.directions_.shape == (12, rank)
    assert eraser.contrast_.shape == (rank,)
    np.testing.assert_allclose(np.linalg.norm(eraser.directions_, axis=0), 1)


def test_the_affine_map_keeps_the_retain_mean(parameters):
    X, y = two_classes()
    center, _ = retain_moments(X, y)
    eraser = SubspaceEraser(**parameters).fit(X, y)
    np.testing.assert_allclose(eraser.transform(center[None])[0], center, atol=1e-9)


def test_without_bias_there_is_none(parameters):
    X, y = two_classes()
    eraser = SubspaceEraser(**parameters, affine=False).fit(X, y)
    assert not eraser.bias_.any()
    assert SubspaceEraser(**parameters).fit(X, y).bias_.any()
    if parameters["method"] != "leace":  # which drops the bias and no more
        center, _ = retain_moments(X, y)
        np.testing.assert_allclose(eraser.transform(center[None])[0], center, atol=1e-9)


def test_linear_leace_is_the_affine_one_without_its_bias():
    X, y = two_classes()
    both = [SubspaceEraser("leace", affine=affine).fit(X, y).matrix_ for affine in (True, False)]
    np.testing.assert_array_equal(*both)


def test_fixed_rows_do_not_move(parameters, affine):
    X, y = two_classes()
    rng = np.random.default_rng(3)
    sinks = 300 * rng.normal(size=(2, 12)) + rng.normal(size=12)
    free = SubspaceEraser(**parameters, affine=affine).fit(X, y)
    assert np.abs(free.transform(sinks) - sinks).max() > 1
    held = SubspaceEraser(**parameters, affine=affine).fit(X, y, fixed=sinks)
    assert np.abs(held.transform(X[y == 1]) - X[y == 1]).max() > 0.1
    np.testing.assert_allclose(held.transform(sinks), sinks, atol=1e-7)
    if not affine and parameters["method"] != "leace":  # sinks do not drown the retain mean
        center, _ = retain_moments(X, y)
        np.testing.assert_allclose(held.transform(center[None])[0], center, atol=1e-9)


def test_a_rotation_of_the_data_rotates_the_map(parameters):
    X, y = two_classes()
    Q, _ = np.linalg.qr(np.random.default_rng(5).normal(size=(12, 12)))
    plain, turned = (SubspaceEraser(**parameters).fit(Z, y) for Z in (X, X @ Q.T))
    np.testing.assert_allclose(turned.matrix_, Q @ plain.matrix_ @ Q.T, atol=1e-7)
    np.testing.assert_allclose(turned.bias_, Q @ plain.bias_, atol=1e-6)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-50, 50), method=st.sampled_from(list(ERASERS)))
def test_units_and_origin_do_not_matter(scale, shift, method):
    X, y = two_classes(40, 50, 6)
    plain = SubspaceEraser(**ERASERS[method]).fit(X, y)
    other = SubspaceEraser(**ERASERS[method]).fit(scale * X + shift, y)
    np.testing.assert_allclose(other.matrix_, plain.matrix_, atol=1e-5)
    np.testing.assert_allclose(
        other.transform(scale * X + shift), scale * plain.transform(X) + shift, atol=1e-4 * scale
    )


def test_a_row_of_weight_two_counts_as_two_rows(parameters):
    X, y = two_classes(40, 50, 6)
    weight = np.where(np.arange(90) % 3, 1, 2)
    copied = np.repeat(np.arange(90), weight)
    weighted = SubspaceEraser(**parameters).fit(X, y, sample_weight=weight)
    doubled = SubspaceEraser(**parameters).fit(X[copied], y[copied])
    np.testing.assert_allclose(weighted.matrix_, doubled.matrix_, atol=1e-9)
    np.testing.assert_allclose(weighted.bias_, doubled.bias_, atol=1e-9)
    assert np.abs(SubspaceEraser(**parameters).fit(X, y).matrix_ - doubled.matrix_).max() > 1e-4


# --- which directions each method reads -------------------------------------------------------


def aligned(a, b):
    """Cosine of the angle between two directions."""
    return abs(a @ b) / np.linalg.norm(a) / np.linalg.norm(b)


def test_mean_difference_and_leace_read_the_means():
    X, y = two_classes()
    difference = X[y == 1].mean(0) - X[y == 0].mean(0)
    _, spread = retain_moments(X, y)
    plain = SubspaceEraser("mean_difference", **EXACT).fit(X, y)
    leace = SubspaceEraser("leace", **EXACT).fit(X, y)
    assert aligned(plain.directions_[:, 0], difference) == pytest.approx(1)
    assert aligned(leace.directions_[:, 0], np.linalg.solve(spread, difference)) == pytest.approx(1)
    assert aligned(plain.directions_[:, 0], leace.directions_[:, 0]) < 0.9


def test_pca_reads_the_second_moment_about_the_retain_mean():
    X, y = two_classes()
    shifted = X[y == 1] - X[y != 1].mean(0)
    _, vectors = np.linalg.eigh(shifted.T @ shifted)
    eraser = SubspaceEraser("pca", rank=3).fit(X, y)
    for j in range(3):
        assert aligned(eraser.directions_[:, j], vectors[:, -1 - j]) == pytest.approx(1)


def test_contrastive_reads_scipys_generalized_eigenvectors():
    X, y = two_classes()
    center, spread = retain_moments(X, y)
    shifted = X[y == 1] - center
    values, vectors = scipy.linalg.eigh(shifted.T @ shifted / len(shifted), spread)
    eraser = SubspaceEraser("contrastive", rank=3, **EXACT).fit(X, y)
    for j in range(3):
        assert aligned(eraser.directions_[:, j], vectors[:, -1 - j]) == pytest.approx(1)
    np.testing.assert_allclose(eraser.contrast_, values[::-1][:3], rtol=1e-6)


def test_contrastive_finds_a_planted_direction_that_pca_overlooks():
    rng = np.random.default_rng(0)
    scales = np.array([30.0, 20, 1, 1, 0.5, 0.5])
    X = rng.normal(size=(800, 6)) * scales
    y = np.arange(800) % 2
    X[y == 1, 4] *= 12  # still far less variance than the first two have
    planted = np.eye(6)[4]
    contrastive = SubspaceEraser("contrastive").fit(X, y)
    pca = SubspaceEraser("pca").fit(X, y)
    assert aligned(contrastive.directions_[:, 0], planted) > 0.99
    assert aligned(pca.directions_[:, 0], planted) < 0.1


def test_oas_is_the_default_and_a_number_is_taken_as_it_is():
    X, y = two_classes(10, 8)
    fitted = SubspaceEraser("leace").fit(X, y)
    assert 0 < fitted.shrinkage_ < 1
    by_hand = SubspaceEraser("leace", shrinkage=fitted.shrinkage_).fit(X, y)
    np.testing.assert_array_equal(by_hand.matrix_, fitted.matrix_)
    spread = shrink(Moments.of(torch.from_numpy(X[y == 0])).covariance, 0.25)
    difference = X[y == 1].mean(0) - X[y == 0].mean(0)
    quarter = SubspaceEraser("leace", shrinkage=0.25).fit(X, y)
    expected = np.linalg.solve(spread.numpy(), difference)
    assert aligned(quarter.directions_[:, 0], expected) == pytest.approx(1)


def test_fewer_rows_than_features_still_fit(parameters):
    X, y = two_classes(6, 7, 40)
    eraser = SubspaceEraser(**parameters).fit(X, y)
    assert np.isfinite(eraser.matrix_).all()
    once = eraser.transform(X)
    np.testing.assert_allclose(eraser.transform(once), once, atol=1e-8)


# --- errors -----------------------------------------------------------------------------------


def test_a_rank_above_the_datas_is_refused():
    X, y = two_classes(3, 50)
    with pytest.raises(ValueError, match=r"rank=4 is above the data's: .*finds 3 direction"):
        SubspaceEraser("pca", rank=4).fit(X, y)


def test_a_rank_above_the_methods_is_refused():
    X, y = two_classes()
    with pytest.raises(ValueError, match=r"rank=2 is above .*'leace' finds 1 direction"):
        SubspaceEraser("leace", rank=2).fit(X, y)


@pytest.mark.parametrize("side", ["forget", "retain"])
def test_an_empty_side_is_named(parameters, side):
    X, _ = two_classes()
    y = np.full(len(X), 0 if side == "forget" else 1)
    with pytest.raises(ValueError, match=f"the {side} set is empty"):
        SubspaceEraser(**parameters).fit(X, y)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"method": "magic"}, "method='magic' is not one of mean_difference, pca"),
        ({"rank": 0}, "rank=0 must be an integer of at least 1"),
        ({"rank": 1.5}, "rank=1.5 must be an integer"),
        ({"shrinkage": 1.5}, "shrinkage=1.5 must be 'oas' or lie in"),
    ],
)
def test_a_parameter_out_of_range_is_named(changed, words):
    X, y = two_classes()
    with pytest.raises(ValueError, match=words):
        SubspaceEraser(**changed).fit(X, y)


@pytest.mark.parametrize("method", ["leace", "mean_difference"])
def test_equal_means_are_refused(method):
    rows = np.random.default_rng(0).normal(size=(20, 4))
    X, y = np.concatenate([rows, -rows, rows, -rows]), np.repeat([0, 1], 40)
    with pytest.raises(ValueError, match="which is zero; use method='contrastive'"):
        SubspaceEraser(method).fit(X, y)


def test_too_many_fixed_rows_are_refused():
    X, y = two_classes()
    fixed = np.random.default_rng(0).normal(size=(30, 12))
    with pytest.raises(ValueError, match="12 fixed directions leave nothing of 12 features"):
        SubspaceEraser().fit(X, y, fixed=fixed)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (np.ones(5), r"sample_weight has shape .5,."),
        (np.full(280, -1.0), "must be finite and not negative"),
        (np.full(280, np.nan), "must be finite and not negative"),
        (np.zeros(280), "without weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weight, words):
    X, y = two_classes()
    with pytest.raises(ValueError, match=words):
        SubspaceEraser().fit(X, y, sample_weight=weight)


def test_a_row_that_is_not_finite_is_named():
    X, y = two_classes()
    X[7, 3] = np.inf
    with pytest.raises(ValueError, match="first is row 7"):
        SubspaceEraser().fit(torch.from_numpy(X), y)


def test_no_fixed_rows_are_as_good_as_none():
    X, y = two_classes()
    none = SubspaceEraser().fit(X, y)
    empty = SubspaceEraser().fit(X, y, fixed=X[:0])
    np.testing.assert_array_equal(none.matrix_, empty.matrix_)


def test_fixed_rows_of_another_width_are_refused():
    X, y = two_classes()
    with pytest.raises(ValueError, match=r"fixed has 3 features; X has"):
        SubspaceEraser().fit(X, y, fixed=np.ones((2, 3)))
