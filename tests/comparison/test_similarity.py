import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import procrustes as scipy_procrustes
from scipy.spatial.distance import pdist
from scipy.stats import pearsonr, spearmanr
from sklearn.neighbors import NearestNeighbors

from manifold_unlearn.comparison.similarity import (
    cka,
    mutual_knn,
    procrustes_distance,
    representational_similarity,
)

RNG = np.random.default_rng(0)
A = RNG.standard_normal((120, 8)) * np.arange(1, 9)
B = np.tanh(A[:, :5] @ RNG.standard_normal((5, 12))) + 0.3 * RNG.standard_normal((120, 12))


def rbf(X, relative=1.0):
    squared = ((X[:, None] - X[None]) ** 2).sum(-1)
    pairs = np.sort(squared[np.triu_indices(len(X), 1)])
    return np.exp(-squared / (relative * pairs[(len(pairs) - 1) // 2]))


def direct_cka(K, L, biased):
    """By the matrices themselves: Kornblith's formula, or Song's estimator of HSIC."""
    n = len(K)
    H = np.eye(n) - 1 / n

    def hsic(P, Q):
        if biased:
            return np.trace(P @ H @ Q @ H)
        P, Q = P - np.diag(np.diag(P)), Q - np.diag(np.diag(Q))
        one = np.ones(n)
        return (
            np.trace(P @ Q)
            + (one @ P @ one) * (one @ Q @ one) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * one @ P @ Q @ one
        )

    return hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L))


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("columns", [8, 3])
def test_cka_is_that_of_the_kernel_matrices(kernel, estimator, columns):
    X = A[:, :columns]
    K, L = (X @ X.T, B @ B.T) if kernel == "linear" else (rbf(X), rbf(B))
    expected = direct_cka(K, L, estimator == "biased")
    for block in (7, 1024):
        found = cka(X, B, kernel=kernel, estimator=estimator, block=block)
        assert found.value == pytest.approx(expected, abs=1e-10)
    if estimator == "biased" and kernel == "linear":
        centered = [Z - Z.mean(0) for Z in (X, B)]
        ratio = np.linalg.norm(centered[0].T @ centered[1]) ** 2 / np.prod(
            [np.linalg.norm(Z.T @ Z) for Z in centered]
        )
        assert found.value == pytest.approx(ratio)


def test_wide_data_go_through_their_products():
    X, Y = RNG.standard_normal((40, 90)), RNG.standard_normal((40, 70))
    Y[:, :30] = X[:, :30]
    for block in (7, 1024):
        found = cka(X, Y, block=block)
        assert found.value == pytest.approx(direct_cka(X @ X.T, Y @ Y.T, False), abs=1e-10)


def test_only_the_unbiased_estimate_of_unrelated_wide_data_is_nothing():
    X, Y = RNG.standard_normal((2, 60, 2000))
    assert cka(X, Y, estimator="biased").value > 0.95
    unbiased = cka(X, Y)
    assert abs(unbiased.value) < unbiased.floor < 0.05
    assert unbiased.p_value > 0.01


@pytest.mark.parametrize("shape", ["line", "heavy"])
def test_floor_and_deviation_of_unrelated_rows_are_exact(shape):
    rng = np.random.default_rng(1)
    n = 30
    X, Y = rng.standard_normal((n, 1)), rng.standard_normal((n, 1))
    if shape == "heavy":
        X, Y = rng.standard_normal((n, 3)) ** 3, rng.standard_normal((n, 2))
    measures = {
        "cka": cka,
        "pearson": lambda a, b: representational_similarity(a, b, correlation="pearson"),
        "spearman": representational_similarity,
    }
    orders = [rng.permutation(n) for _ in range(400)]
    for measure in measures.values():
        floor = measure(X, Y).floor
        null = np.array([measure(X, Y[order]).value for order in orders])
        assert null.mean() == pytest.approx(0, abs=0.1 * floor)
        assert 2 * null.std() == pytest.approx(floor, rel=0.12)
        assert np.mean(null > floor) < 0.085


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_level_of_the_p_value_of_cka(kernel):
    rng = np.random.default_rng(2)
    pairs = rng.standard_normal((250, 2, 50, 2))
    values = np.array([cka(*pair, kernel=kernel).p_value for pair in pairs])
    assert 0.01 <= np.mean(values <= 0.05) <= 0.09
    assert cka(A, B, kernel=kernel).p_value < 1e-6


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from([1e-8, 1.0, 1e8]), st.floats(-100, 100))
def test_motions_of_either_side_and_order_change_nothing(seed, scale, shift):
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.standard_normal((8, 8)))
    order = rng.permutation(len(A))
    X, Y = (scale * (A @ rotation + shift))[order], B[order]
    for measure in (
        lambda a, b: cka(a, b).value,
        lambda a, b: cka(a, b, kernel="rbf").value,
        lambda a, b: mutual_knn(a, b, n_permutations=1).value,
        lambda a, b: representational_similarity(a, b).value,
        procrustes_distance,
    ):
        assert measure(X, Y) == pytest.approx(measure(A, B), abs=1e-6)
        assert measure(B, A) == pytest.approx(measure(A, B), abs=1e-12)


def test_copies_are_alike():
    rotation, _ = np.linalg.qr(RNG.standard_normal((8, 8)))
    copy = 3 * A @ rotation - 7
    for estimator in ("unbiased", "biased"):
        for kernel in ("linear", "rbf"):
            assert cka(A, copy, estimator=estimator, kernel=kernel).value == pytest.approx(1)
    assert mutual_knn(A, copy).value == 1
    assert representational_similarity(A, copy).value == pytest.approx(1)
    assert procrustes_distance(A, copy) == pytest.approx(0, abs=1e-10)
    assert procrustes_distance(A, np.c_[copy, np.zeros((120, 4))]) == pytest.approx(0, abs=1e-10)


def test_an_invertible_map_is_not_a_rotation():
    stretched = A @ np.diag([1, 1, 1, 1, 1, 1, 1, 100.0])
    assert cka(A, stretched).value < 0.9
    assert procrustes_distance(A, stretched) > 0.3


@pytest.mark.parametrize("n_neighbors", [1, 5, 20])
def test_mutual_neighbors_are_those_of_scikit_learn(n_neighbors):
    lists = [
        NearestNeighbors(n_neighbors=n_neighbors).fit(X).kneighbors(return_distance=False)
        for X in (A, B)
    ]
    shared = np.mean([len(set(a) & set(b)) / n_neighbors for a, b in zip(*lists, strict=True)])
    assert mutual_knn(A, B, n_neighbors=n_neighbors).value == pytest.approx(shared)
    scaled = [X / np.linalg.norm(X, axis=1, keepdims=True) for X in (A, B)]
    assert mutual_knn(A, B, n_neighbors=n_neighbors, metric="cosine") == mutual_knn(
        *scaled, n_neighbors=n_neighbors
    )


def test_unrelated_rows_share_their_number_by_chance():
    rng = np.random.default_rng(3)
    X = rng.standard_normal((400, 3))
    pairs = [(X, X[rng.permutation(400)]) for _ in range(20)]
    found = [mutual_knn(*pair, n_neighbors=20, n_permutations=60) for pair in pairs]
    assert np.mean([each.value for each in found]) == pytest.approx(20 / 399, rel=0.05)
    assert 0 < found[0].floor - 20 / 399 < 0.01
    assert np.mean([each.p_value < 0.05 for each in found]) < 0.3
    related = mutual_knn(A, B)
    assert related.value > 2 * related.floor
    assert related.p_value == pytest.approx(1 / 201)


def test_procrustes_is_that_of_scipy():
    X, Y = A[:, :6], B[:, :6]
    disparity = scipy_procrustes(X, Y)[2]  # 1 - s**2 with s the nuclear norm
    assert procrustes_distance(X, Y) == pytest.approx(np.sqrt(2 - 2 * np.sqrt(1 - disparity)))


def test_procrustes_is_a_metric_whatever_the_shapes():
    C = RNG.standard_normal((120, 300))
    nuclear = []
    for X, Y in ((A, B), (B, C), (A, C)):
        P, Q = (Z - Z.mean(0) for Z in (X, Y))
        P, Q = P / np.linalg.norm(P), Q / np.linalg.norm(Q)
        nuclear.append(np.sqrt(2 - 2 * np.linalg.norm(P.T @ Q, "nuc")))
        assert procrustes_distance(X, Y) == pytest.approx(nuclear[-1])
    assert nuclear[2] <= nuclear[0] + nuclear[1]


def test_rsa_is_the_correlation_of_the_distances():
    pairs = pdist(A), pdist(B)
    spearman = representational_similarity(A, B)
    assert spearman.value == pytest.approx(spearmanr(*pairs).statistic)
    pearson = representational_similarity(A, B, correlation="pearson")
    assert pearson.value == pytest.approx(pearsonr(*pairs).statistic)
    assert spearman.value > spearman.floor
    part = representational_similarity(A, B, max_samples=60, random_state=1)
    assert part.value == pytest.approx(spearman.value, abs=0.1)
    assert part.floor > spearman.floor


MEASURES = [cka, mutual_knn, procrustes_distance, representational_similarity]


@pytest.mark.parametrize("measure", MEASURES)
def test_single_and_double_precision_agree(measure):
    def value(X, Y):
        found = measure(X, Y)
        return found if isinstance(found, float) else found.value

    tensors = [torch.tensor(X, dtype=torch.float32) for X in (A, B)]
    assert value(*tensors) == pytest.approx(value(A, B), abs=1e-3)
    half = [tensor.bfloat16() for tensor in tensors]
    assert value(*half) == pytest.approx(value(A, B), abs=0.03)


@pytest.mark.parametrize("measure", [*MEASURES, lambda a, b: cka(a, b, kernel="rbf")])
@pytest.mark.parametrize(
    ("X", "Y"),
    [
        (np.repeat(A, 2, axis=0), np.repeat(B, 2, axis=0)),
        (np.c_[A, np.ones(120)], B),
        (np.r_[A, np.full((1, 8), 1e6)], np.r_[B, B[:1]]),
        (np.outer(A[:, 0], np.ones(4)), B),
        (A + 1e6, B),
        (RNG.standard_normal((5, 50)), RNG.standard_normal((5, 3))),
        (np.r_[np.zeros((90, 8)), A[:30]], B),
    ],
    ids=["pairs", "constant column", "outlier", "rank one", "far", "d > n", "mostly one point"],
)
def test_degenerate_data_give_finite_answers(measure, X, Y):
    if len(X) == 5 and measure is mutual_knn:
        X, Y = np.tile(X, (3, 1)), np.tile(Y, (3, 1))
    found = measure(X, Y)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("X", "Y", "message"),
    [
        (A, B[:100], "A has 120 rows, B has 100: row i of A must belong"),
        (A, np.ones((120, 3)), "all 120 rows of B are equal"),
        (np.full((120, 3), 0.1), B, "all 120 rows of A are equal"),
        (A[:1], B[:1], "have 1 rows; at least"),
        (A, np.where(np.eye(120, 12) > 0, np.nan, B), "B contains NaN or infinity: 12 of 120"),
    ],
)
def test_unusable_sides_are_refused(measure, X, Y, message):
    with pytest.raises(ValueError, match=message):
        measure(X, Y)


@pytest.mark.parametrize(
    ("measure", "X", "options", "message"),
    [
        (cka, A, {"kernel": "poly"}, "kernel='poly' is not known"),
        (cka, A, {"estimator": "best"}, "estimator='best' is not known"),
        (cka, A, {"relative_bandwidth": 0}, "relative_bandwidth=0 must be positive"),
        (cka, np.eye(120), {"kernel": "rbf"}, "the kernel of A does not vary"),
        (mutual_knn, A, {"n_neighbors": 120}, "n_neighbors=120 must lie between 1 and 119"),
        (mutual_knn, A, {"metric": "l1"}, "metric='l1' is not known"),
        (mutual_knn, A * 0 + np.eye(120, 8), {"metric": "cosine"}, "row 8 of A has length 0"),
        (mutual_knn, A, {"n_permutations": 0}, "n_permutations=0 must be at least 1"),
        (representational_similarity, A, {"correlation": "tau"}, "correlation='tau' is not"),
        (representational_similarity, A, {"max_samples": 3}, "max_samples=3 must be at least 4"),
        (representational_similarity, np.eye(120), {}, "rows of A are all equally far apart"),
    ],
)
def test_impossible_requests_are_refused(measure, X, options, message):
    with pytest.raises(ValueError, match=message):
        measure(X, B, **options)
