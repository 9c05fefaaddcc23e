import numpy as np
import pytest
import torch

from manifold_unlearn.erase import landmark_map as module
from manifold_unlearn.erase.landmark_map import landmark_map, shepard_weights


def drawn(m=30, d=6, k=2, *, seed=0):
    rng = np.random.default_rng(seed)
    z, t = rng.normal(size=(m, d)), rng.normal(size=(m, d)) + 3
    bases = np.linalg.qr(rng.normal(size=(m, d, k)))[0]
    return z, t, bases, rng.normal(size=(40, d))


def by_hand(z, t, bases, row, k):
    """The formula of the docstring for one row, in numpy."""
    distances = np.linalg.norm(row - z, axis=1)
    near = distances.argsort()[:k]
    radius = np.sort(distances)[k] * (1 + 1e-3)
    weights = ((radius - distances[near]) / (radius * distances[near])) ** 2
    weights /= weights.sum()
    if bases is None:
        return row + weights @ (t[near] - z[near])
    along = [bases[j] @ bases[j].T @ (row - z[j]) for j in near]
    return weights @ (t[near] + np.array(along))


@pytest.mark.parametrize("curved", [True, False])
def test_rows_move_as_the_formula_says(curved):
    z, t, bases, rows = drawn()
    bases = bases if curved else None
    made = landmark_map(
        torch.tensor(z), torch.tensor(t), None if bases is None else torch.tensor(bases), 5
    )
    expected = np.stack([by_hand(z, t, bases, row, 5) for row in rows])
    np.testing.assert_allclose(made(torch.tensor(rows)), expected, rtol=1e-9)


@pytest.mark.parametrize("curved", [True, False])
def test_a_landmark_goes_to_its_own_target(curved):
    z, t, bases, _ = drawn()
    frames = torch.tensor(bases) if curved else None
    made = landmark_map(torch.tensor(z), torch.tensor(t), frames, 8)
    np.testing.assert_allclose(made(torch.tensor(z)), t, atol=1e-12)


def test_along_a_tangent_a_row_keeps_its_difference_and_across_it_loses_it():
    z, t = torch.zeros(1, 3), torch.tensor([[5.0, 5.0, 5.0]])
    made = landmark_map(z, t, torch.tensor([[[1.0], [0.0], [0.0]]]), 4)
    moved = made(torch.tensor([[0.3, 0.0, 0.0], [0.0, 0.3, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(moved, torch.tensor([[5.3, 5, 5], [5, 5, 5]]).double())


def test_where_the_neighbors_change_the_map_does_not_jump():
    """Steps a thousand times shorter move the image about as much less."""
    z, t, _, rows = drawn(m=60)
    made = landmark_map(torch.tensor(z), torch.tensor(t), None, 3)
    a, b = torch.tensor(rows[0]), torch.tensor(rows[1])

    def longest_step(n):
        path = made(a + torch.linspace(0, 1, n, dtype=torch.float64)[:, None] * (b - a))
        return float((path[1:] - path[:-1]).norm(dim=1).max())

    coarse, fine = longest_step(100), longest_step(100_000)
    assert fine < coarse / 100
    nearest = torch.cdist(made.landmarks + made.center, torch.stack([a, b])).argmin(0)
    assert nearest[0] != nearest[1]  # the path does cross from one neighborhood to another


def test_fewer_landmarks_than_neighbors_are_all_used():
    z, t, _, rows = drawn(m=3)
    made = landmark_map(torch.tensor(z), torch.tensor(t), None, 16)
    moved = made(torch.tensor(rows))
    assert torch.isfinite(moved).all()
    np.testing.assert_allclose(made(torch.tensor(z)), t, atol=1e-12)


def test_weights_of_equal_distances_are_equal_and_of_zero_distance_all():
    weights = shepard_weights(torch.tensor([[2.0, 2.0, 2.0], [0.0, 1.0, 2.0], [0.0, 0.0, 0.0]]), 2)
    expected = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]])
    torch.testing.assert_close(weights, expected)


def test_rows_are_moved_alike_alone_and_together_and_in_blocks(monkeypatch):
    z, t, bases, rows = drawn()
    made = landmark_map(torch.tensor(z), torch.tensor(t), torch.tensor(bases), 5)
    whole = made(torch.tensor(rows))
    alone = torch.cat([made(torch.tensor(row[None])) for row in rows])
    torch.testing.assert_close(alone, whole, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(module, "_BLOCK", 2000)
    monkeypatch.setattr(module, "_CACHED", 2000)
    torch.testing.assert_close(made(torch.tensor(rows)), whole, rtol=1e-12, atol=1e-12)


def test_single_precision_far_from_the_origin_agrees_with_double():
    z, t, bases, rows = drawn()
    made = landmark_map(torch.tensor(z) + 1e3, torch.tensor(t) + 1e3, torch.tensor(bases), 5)
    exact = made(torch.tensor(rows) + 1e3)
    single = made.to("cpu", torch.bfloat16)((torch.tensor(rows) + 1e3).float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=2e-3)  # 1e3 * 2**-23 * a few


def gathered_bases(move, h):
    """The formula as it is written, with the bases of a row's landmarks gathered for each row."""
    k = move.n_neighbors
    rows = h - move.center
    near = torch.cdist(rows.double(), move.landmarks.double()).topk(k + 1, largest=False).indices
    offsets = rows[:, None] - move.landmarks[near]
    weights, near = shepard_weights(offsets.norm(dim=2), k), near[:, :k]
    if move.bases is None:
        return h + torch.einsum("nj,njd->nd", weights, (move.targets - move.landmarks)[near])
    bases = move.bases[near]
    along = torch.einsum("njdk,njek,nje->njd", bases, bases, offsets[:, :k])
    return move.center + torch.einsum("nj,njd->nd", weights, move.targets[near] + along)


@pytest.mark.parametrize("curved", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("n_rows", [1, 8, 40])
def test_the_order_of_the_products_changes_nothing(curved, dtype, tolerance, n_rows):
    z, t, bases, rows = (torch.tensor(values) for values in drawn(m=300, d=96, k=10))
    made = landmark_map(z, t, bases if curved else None, 16).to("cpu", dtype)
    h = rows[:n_rows].to(dtype)
    moved = made(h)
    assert moved.dtype == dtype
    torch.testing.assert_close(moved, gathered_bases(made, h), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("curved", [True, False])
def test_a_trace_has_no_break_and_holds_for_any_number_of_rows(curved, monkeypatch):
    z, t, bases, rows = (torch.tensor(values) for values in drawn())
    made = landmark_map(z, t, bases if curved else None, 5)
    whole = made(rows)
    monkeypatch.setattr(module, "_CACHED", 2000)  # eager, the rows would go in blocks
    traced = torch.compile(made.__call__, fullgraph=True, backend="eager", dynamic=True)
    for n in (40, 17):
        torch.testing.assert_close(traced(rows[:n]), whole[:n], rtol=1e-12, atol=1e-12)


def test_a_map_made_of_its_arrays_is_the_map():
    z, t, bases, rows = (torch.tensor(values) for values in drawn())
    made = landmark_map(z, t, bases, 5)
    kept = [values.clone(memory_format=torch.contiguous_format) for values in (
        made.center, made.landmarks, made.squared_norms, made.targets, made.bases)]  # fmt: skip
    again = module.LandmarkMap(*kept, n_neighbors=5)
    torch.testing.assert_close(again.bases, bases, rtol=0, atol=0)
    assert torch.equal(again(rows), made(rows))


def test_gradients_pass():
    z, t, bases, rows = drawn()
    made = landmark_map(torch.tensor(z), torch.tensor(t), torch.tensor(bases), 5)
    start = torch.tensor(rows[:4], requires_grad=True)
    assert torch.autograd.gradcheck(made, (start,))
