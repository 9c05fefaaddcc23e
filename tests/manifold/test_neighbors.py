import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from manifold_unlearn.manifold.distances import center_of
from manifold_unlearn.manifold.neighbors import (
    approximate_neighbors,
    choose_method,
    nearest_neighbors,
)
from manifold_unlearn.manifold.partition import build_index
from manifold_unlearn.manifold.radius import Pairs, pairs_within, radius_neighbors
from manifold_unlearn.manifold.search import exact_neighbors


def cloud(n_samples=300, n_features=12, seed=0):
    return np.random.default_rng(seed).standard_normal((n_samples, n_features))


def test_matches_brute_force_of_scikit_learn():
    X = cloud()
    found = nearest_neighbors(X, 10)
    distances, indices = NearestNeighbors(n_neighbors=10).fit(X).kneighbors()
    assert np.array_equal(found.indices, indices)
    np.testing.assert_allclose(found.squared_distances, distances**2, rtol=1e-12)


def test_searches_another_set():
    X, Y = cloud(50), cloud(200, seed=1)
    found = nearest_neighbors(X, 5, Y)
    distances, indices = NearestNeighbors(n_neighbors=5).fit(Y).kneighbors(X)
    assert np.array_equal(found.indices, indices)
    np.testing.assert_allclose(found.squared_distances, distances**2, rtol=1e-12)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(20, 400), st.integers(20, 400), st.integers(1, 20), st.booleans())
def test_answer_does_not_depend_on_blocks(rows_per_leaf, block_columns, k, double):
    X = cloud().astype(np.float64 if double else np.float32)
    whole = nearest_neighbors(X, k)
    parts = nearest_neighbors(X, k, rows_per_leaf=rows_per_leaf, block_columns=block_columns)
    rtol = 1e-12 if double else 3e-6
    np.testing.assert_allclose(parts.squared_distances, whole.squared_distances, rtol=rtol)
    assert np.array_equal(parts.indices, whole.indices)


def test_duplicates_are_at_exactly_zero():
    X = cloud(100).astype(np.float32)
    found = nearest_neighbors(np.concatenate([X, X]), 1)
    assert (found.squared_distances == 0).all()
    assert np.array_equal(found.indices[:, 0], np.r_[np.arange(100, 200), np.arange(100)])


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_small_distances_survive_far_from_the_origin_and_far_outliers(offset):
    rng = np.random.default_rng(0)
    line = np.zeros((200, 8), dtype=np.float32)
    line[:, 0] = offset
    line[:, 1] = rng.permutation(200) / 64  # exact in single precision
    X = np.concatenate([line, np.full((1, 8), 1e7, dtype=np.float32)])
    found = nearest_neighbors(X, 2)
    expected = np.sort(np.abs(line[:, 1][:, None] - line[:, 1]), axis=1)[:, 1:3] ** 2
    np.testing.assert_allclose(found.squared_distances[:200], expected, rtol=1e-6)


def test_far_clusters_in_single_precision_are_exact():
    rng = np.random.default_rng(0)
    centers = 1e4 * rng.standard_normal((20, 1, 16))
    X = (centers + rng.standard_normal((20, 40, 16))).reshape(-1, 16).astype(np.float32)
    found = nearest_neighbors(X, 6)
    exact = nearest_neighbors(X.astype(np.float64), 6)
    assert np.array_equal(found.indices, exact.indices)
    np.testing.assert_allclose(found.squared_distances, exact.squared_distances, rtol=1e-5)


def test_gives_tensors_for_tensors_and_widens_half_precision():
    X = torch.from_numpy(cloud()).to(torch.bfloat16)
    found = nearest_neighbors(X, 4)
    assert found.squared_distances.dtype == torch.bfloat16
    assert torch.equal(found.indices, nearest_neighbors(X.float(), 4).indices)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k=0 must lie between 1 and 19"),
        ({"k": 20}, "k=20 must lie between 1 and 19"),
        ({"k": 2, "neighbors": "annoy"}, "neighbors='annoy' is not known"),
        ({"k": 2, "Y": np.zeros((5, 3))}, "Y has 3 features, X has 4"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        nearest_neighbors(cloud(20, 4), **arguments)


def test_rows_that_are_not_finite_are_named():
    X = cloud(20, 4)
    X[7, 2] = np.nan
    with pytest.raises(ValueError, match="the first is row 7"):
        nearest_neighbors(X, 2)


@pytest.mark.parametrize("rows_per_leaf", [7, 64, 1000])
@pytest.mark.parametrize("scaled", [False, True])
def test_radius_pairs_match_all_distances(rows_per_leaf, scaled):
    X = torch.from_numpy(cloud(150, 5))
    X = X - center_of(X)
    scale = torch.linspace(0.5, 2, 150, dtype=X.dtype) if scaled else None
    found = radius_neighbors(build_index(X, scale, rows_per_leaf=rows_per_leaf), 4.0)
    expected = torch.cdist(X, X).square()
    if scale is not None:
        expected = expected / (scale[:, None] * scale)
    inside = (expected <= 4.0).triu(1)
    dense = torch.zeros_like(expected)
    dense[found.rows, found.columns] = found.squared_distances
    assert len(found.rows) == int(inside.sum()) > 100
    torch.testing.assert_close(dense, expected * inside, rtol=1e-9, atol=1e-12)


def test_radius_pairs_of_far_rows_are_exact():
    X = torch.from_numpy(cloud(100, 3)).float() * 0.01
    X[50:] += 1e4
    X = torch.cat([X, torch.full((1, 3), 1e8)])
    found, exact = (
        Pairs(*(part[(pairs.rows * len(X) + pairs.columns).argsort()] for part in pairs))
        for pairs in (radius_neighbors(build_index(rows), 1e-4) for rows in (X, X.double()))
    )
    assert torch.equal(found.rows, exact.rows)
    assert torch.equal(found.columns, exact.columns)
    torch.testing.assert_close(
        found.squared_distances.double(), exact.squared_distances, rtol=1e-4, atol=1e-9
    )


def test_pairs_within_reach_of_either_match_all_distances():
    X, Q = (torch.from_numpy(cloud(n, 5, seed)) for n, seed in ((200, 0), (90, 1)))
    reach_X, reach_Q = torch.linspace(0, 6, 200).double(), torch.linspace(5, 0, 90).double()
    scale_X, scale_Q = torch.linspace(1, 2, 200).double(), torch.linspace(0.5, 1, 90).double()
    index = build_index(X, scale_X, rows_per_leaf=16)
    found = pairs_within(Q, index, reach_Q, reach_X, scale_Q=scale_Q)
    expected = torch.cdist(Q, X).square() / (scale_Q[:, None] * scale_X)
    inside = expected <= torch.maximum(reach_Q[:, None], reach_X)
    dense = torch.zeros_like(expected)
    dense[found.rows, found.columns] = found.squared_distances
    assert len(found.rows) == int(inside.sum()) > 500
    torch.testing.assert_close(dense, expected * inside, rtol=1e-9, atol=1e-9)


def test_scaled_neighbors_match_all_distances():
    X = torch.from_numpy(cloud(400, 6))
    scale = torch.linspace(0.5, 2, 400).double()
    index = build_index(X, scale, rows_per_leaf=16)
    distances, at = exact_neighbors(X, index, 7, scale_A=scale)
    expected = torch.cdist(X, X).square() / (scale[:, None] * scale)
    nearest = expected.topk(7, dim=1, largest=False)
    torch.testing.assert_close(distances, nearest.values, rtol=1e-9, atol=1e-12)
    assert torch.equal(at, nearest.indices)


@pytest.mark.parametrize("n_features", [3, 40])
def test_leaves_left_out_hold_no_neighbor(n_features):
    """Thin data: most leaves are left out, and the answer is that of all distances."""
    rng = np.random.default_rng(0)
    curve = np.linspace(0, 30, 6000)[:, None]
    X = np.concatenate([np.sin(curve), np.cos(curve), curve], 1) @ rng.standard_normal(
        (3, n_features)
    )
    rng.shuffle(X)
    found = nearest_neighbors(X.astype(np.float32), 12, rows_per_leaf=64)
    expected = nearest_neighbors(X[:300], 13, X)
    np.testing.assert_allclose(
        found.squared_distances[:300], expected.squared_distances[:, 1:], rtol=2e-2, atol=1e-6
    )


@pytest.mark.parametrize(
    "method", ["half", "faiss", pytest.param("pynndescent", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("other", [False, True])
def test_approximate_searches_say_what_they_miss(method, other):
    if method != "half":
        pytest.importorskip(method)
    X = cloud(2500, 10)
    Y = cloud(1500, 10, seed=1) if other else None
    found = approximate_neighbors(X, 10, Y, neighbors=method, random_state=0)
    exact = nearest_neighbors(X, 10, Y)
    hits = [
        len(set(a) & set(b)) for a, b in zip(found.neighbors.indices, exact.indices, strict=True)
    ]
    assert found.method == method
    assert found.recall == pytest.approx(np.mean(hits) / 10, abs=0.03)
    assert found.recall > 0.9
    if not other:
        assert (found.neighbors.indices != np.arange(2500)[:, None]).all()
    at = found.neighbors.indices[:, 3]
    searched = X if Y is None else Y
    np.testing.assert_allclose(
        found.neighbors.squared_distances[:, 3], ((X - searched[at]) ** 2).sum(1), rtol=1e-9
    )
    assert (np.diff(found.neighbors.squared_distances, axis=1) >= 0).all()


def test_auto_is_exact_until_it_costs_minutes():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_method(100_000, 100_000, 768, cpu) == "exact"
    assert choose_method(1_000_000, 1_000_000, 768, gpu) == "exact"
    large = choose_method(1_000_000, 1_000_000, 768, cpu)
    assert large in ("pynndescent", "faiss", "exact")
    found = approximate_neighbors(cloud(), 3)
    assert (found.method, found.recall) == ("exact", 1.0)


@pytest.mark.parametrize("method", ["pynndescent", "faiss"])
def test_a_library_that_is_missing_is_named(method, monkeypatch):
    monkeypatch.setitem(sys.modules, method, None)
    with pytest.raises(ImportError, match=r"pip install manifold-unlearn\[approximate\]"):
        nearest_neighbors(cloud(50, 3), 2, neighbors=method)
