import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_unlearn.manifold.partition import (
    ask,
    build_index,
    leaf_order,
    partition,
    principal_frame,
    rows_of,
    squared_gaps,
)


def cloud(n_samples, n_features, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((n_samples, n_features)) ** 3)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(3, 64), st.booleans())
def test_gaps_are_below_all_distances_and_leaves_hold_every_row_once(
    n_samples, n_features, rows_per_leaf, single
):
    X = cloud(n_samples, n_features).to(torch.float32 if single else torch.float64)
    frame = principal_frame(X)
    leaves = partition(X, frame, rows_per_leaf)
    sizes = np.diff(leaves.starts)
    assert sorted(leaves.order.tolist()) == list(range(n_samples))
    assert sizes.max() <= rows_per_leaf
    assert sizes.max() - sizes.min() <= 1
    leaf = torch.repeat_interleave(torch.from_numpy(sizes))
    rows = X[leaves.order].double()
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    gaps = squared_gaps(leaves, leaves)
    assert (gaps[leaf][:, leaf] <= distances + 1e-12).all()


def test_gaps_between_far_leaves_are_most_of_the_distance():
    X = cloud(400, 3) * 0.01
    X[200:] += 10
    leaves = partition(X, principal_frame(X), 200)
    assert squared_gaps(leaves, leaves)[0, 1] > 0.9 * 300


def test_boxes_hold_for_rows_that_ask_from_elsewhere():
    X, Q = cloud(300, 30), 2 * cloud(80, 30, seed=1) + 1
    searched = ask(Q, build_index(X, rows_per_leaf=20))
    starts = (searched.asking_leaves.starts, searched.known.leaves.starts)
    leaf_Q, leaf_X = (torch.repeat_interleave(torch.tensor(s).diff()) for s in starts)
    distances = torch.cdist(searched.asking, searched.known.rows).square()
    assert (searched.gaps[leaf_Q][:, leaf_X] <= distances + 1e-9).all()


def test_leaf_order_is_kept_when_sorted_again():
    X = cloud(1000, 5)
    rows = X[leaf_order(X)]
    index = build_index(rows, rows_per_leaf=32, in_order=True)
    assert index.rows is rows
    assert torch.equal(index.leaves.order, torch.arange(1000))
    gaps = squared_gaps(index.leaves, index.leaves)
    assert (gaps > 0).double().mean() > 0.8


def test_adjoining_leaves_are_a_slice():
    X = cloud(100, 2)
    leaves = partition(X, principal_frame(X), 10)
    assert rows_of(leaves, torch.tensor([3, 2])) == slice(leaves.starts[2], leaves.starts[4])
    apart = rows_of(leaves, torch.tensor([5, 1]))
    assert apart.tolist() == [
        *range(leaves.starts[1], leaves.starts[2]),
        *range(leaves.starts[5], leaves.starts[6]),
    ]


@pytest.mark.parametrize("n_features", [3, 40])
def test_equal_rows_have_a_frame(n_features):
    frame = principal_frame(torch.ones(50, n_features))
    assert torch.isfinite(frame.axes).all()
