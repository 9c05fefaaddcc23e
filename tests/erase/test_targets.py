from itertools import permutations

import numpy as np
import pytest
import torch

from manifold_unlearn.erase import targets as module
from manifold_unlearn.erase.aim import Aim, label_free, semantic_choice
from manifold_unlearn.erase.swap import diffusion_targets
from manifold_unlearn.erase.targets import flat_charts, tangent_targets, transport_targets
from manifold_unlearn.erase.walk import geodesic_targets
from manifold_unlearn.manifold import samples
from manifold_unlearn.manifold.charts import surface_charts


def tensor(values):
    return torch.tensor(np.asarray(values), dtype=torch.float64)


# --- tangent ----------------------------------------------------------------------------------


def test_on_a_sphere_the_foot_is_the_radial_projection_and_the_base_its_tangent_plane():
    sphere = samples.sphere(1500, n_features=8, radius=2.0, random_state=0)
    points = tensor(sphere.points)
    landmarks = 1.3 * points[:100]
    found = tangent_targets(landmarks, Aim(points, None), dimension="auto", n_neighbors=24)
    off = (found.points - points[:100]).norm(dim=1)
    assert float(off.max()) < 0.02  # of a radius of 2; landmarks began 0.6 off
    radial = points[:100] / 2
    assert found.bases.shape == (100, 8, 2)
    assert float((found.bases.mT @ radial[:, :, None]).abs().max()) < 0.02
    identity = torch.eye(2, dtype=torch.float64).expand(100, 2, 2)
    torch.testing.assert_close(found.bases.mT @ found.bases, identity)


def test_a_flat_chart_is_the_principal_plane_of_the_neighbors():
    rng = np.random.default_rng(0)
    rows, point = rng.normal(size=(12, 5)) * [9, 5, 1, 1, 1] + 2, rng.normal(size=5)
    found = flat_charts(tensor([point]), tensor(rows), torch.arange(12)[None], 2)
    mean = rows.mean(0)
    plane = np.linalg.svd(rows - mean)[2][:2].T
    expected = mean + plane @ plane.T @ (point - mean)
    np.testing.assert_allclose(found.points[0], expected, atol=1e-10)
    basis = found.bases[0].numpy()
    np.testing.assert_allclose(basis @ basis.T, plane @ plane.T, atol=1e-10)


def test_neighbors_without_spread_make_a_chart_that_is_a_point():
    rows = tensor(np.ones((6, 3)))
    found = flat_charts(tensor([[4.0, 5, 6]]), rows, torch.arange(6)[None], 2)
    torch.testing.assert_close(found.points, rows[:1])
    assert not found.bases.any()


@pytest.mark.parametrize("n_rows", [1, 2, 5, 39])
def test_few_rows_make_flat_charts(n_rows):
    rng = np.random.default_rng(1)
    rows, landmarks = tensor(rng.normal(size=(n_rows, 4))), tensor(rng.normal(size=(7, 4)))
    found = tangent_targets(landmarks, Aim(rows, None), dimension="auto", n_neighbors=16)
    assert torch.isfinite(found.points).all()
    if n_rows == 1:
        torch.testing.assert_close(found.points, rows.expand(7, 4))
    else:
        assert float((found.points - rows.mean(0)).norm()) < float(
            (landmarks - rows.mean(0)).norm()
        )


def searched(monkeypatch, landmarks, rows, **options):
    """Targets, with how many landmarks were looked for a foot in turn and how many found one."""
    looked = []

    def recorded(points, *args, **kwargs):
        charts = surface_charts(points, *args, **kwargs)
        looked.append((len(points), int(charts.settled.sum())))
        return charts

    monkeypatch.setattr(module, "surface_charts", recorded)
    return tangent_targets(landmarks, Aim(rows, None), n_neighbors=16, **options), looked


def test_where_noise_hides_the_surface_few_are_looked_for_and_all_go_to_flat_charts(monkeypatch):
    rng = np.random.default_rng(0)
    rows, landmarks = tensor(rng.normal(size=(120, 30))), tensor(rng.normal(size=(80, 30)) + 1)
    found, looked = searched(monkeypatch, landmarks, rows, dimension=2)
    assert looked == [(32, 0)]
    near = torch.cdist(landmarks, rows).topk(16, largest=False).indices
    flat = flat_charts(landmarks, rows, near, 2)
    torch.testing.assert_close(found.points, flat.points)
    planes, expected = (bases @ bases.mT for bases in (found.bases, flat.bases))
    torch.testing.assert_close(planes, expected)


def test_where_some_find_a_foot_all_are_looked_for(monkeypatch):
    rng = np.random.default_rng(0)
    rows, landmarks = tensor(rng.normal(size=(120, 30))), tensor(rng.normal(size=(80, 30)) + 1)
    found, looked = searched(monkeypatch, landmarks, rows, dimension="auto")
    assert [n for n, _ in looked] == [32, 80]
    assert 0 < looked[1][1] < 80
    assert torch.isfinite(found.points).all()
    assert found.bases.flatten(1).any(1).all()


def test_with_pairs_the_foot_is_the_pair():
    rng = np.random.default_rng(0)
    rows, landmarks = tensor(rng.normal(size=(60, 4))), tensor(rng.normal(size=(60, 4)) + 5)
    aim = Aim(rows, torch.arange(60)[:, None])
    found = tangent_targets(landmarks, aim, dimension=2, n_neighbors=8)
    torch.testing.assert_close(found.points, rows)
    torch.testing.assert_close(transport_targets(landmarks, aim).points, rows)


# --- transport --------------------------------------------------------------------------------


def test_the_assignment_is_the_cheapest_of_all():
    rng = np.random.default_rng(3)
    landmarks, rows = rng.normal(size=(6, 3)), rng.normal(size=(6, 3)) + 1
    found = transport_targets(tensor(landmarks), Aim(tensor(rows), None)).points.numpy()
    costs = [((landmarks - rows[list(p)]) ** 2).sum() for p in permutations(range(6))]
    assert ((landmarks - found) ** 2).sum() == pytest.approx(min(costs))
    nearest = ((landmarks[:, None] - rows) ** 2).sum(2).argmin(1)
    assert len(set(nearest)) < 6  # plain nearest rows would take some twice


@pytest.mark.parametrize(("m", "n"), [(4, 9), (9, 4), (8, 4), (3, 1)])
def test_no_row_is_taken_more_often_than_need_be_and_none_is_a_mean(m, n):
    rng = np.random.default_rng(m)
    landmarks, rows = tensor(rng.normal(size=(m, 2))), tensor(rng.normal(size=(n, 2)))
    found = transport_targets(landmarks, Aim(rows, None)).points
    taken = (found[:, None] == rows).all(2)
    assert (taken.sum(1) == 1).all()
    assert int(taken.sum(0).max()) == -(-m // n)


# --- semantic ---------------------------------------------------------------------------------


def twins(n=80, d=6, seed=0):
    """Rows of one meaning each, retain and forget, the forget ones far away along one axis."""
    rng = np.random.default_rng(seed)
    meaning = rng.normal(size=(n, d)) * [0, 3, 2, 2, 1, 1]
    shift = np.zeros(d)
    shift[0] = 30
    retain = meaning + 0.01 * rng.normal(size=(n, d))
    return tensor(meaning + shift + 0.01 * rng.normal(size=(n, d))), tensor(retain)


def test_semantic_neighbors_are_alike_but_for_the_label():
    forget, retain = twins()
    leaning = retain.clone()
    leaning[:, 1] += 25 * (torch.arange(80) % 2)  # nearer to the forget rows, but of other meaning
    choice = semantic_choice(forget, retain, 4)
    assert choice.shape == (80, 4)
    assert (choice[:, 0] == torch.arange(80)).double().mean() > 0.95
    both = torch.cat([forget, retain])
    plain = label_free(both, torch.arange(160) < 80)
    torch.testing.assert_close(plain[:80].mean(0), plain[80:].mean(0), atol=1e-2, rtol=0)
    assert float((both[:80].mean(0) - both[80:].mean(0)).norm()) > 25


def test_rows_that_no_linear_read_out_tells_apart_are_left_as_they_are():
    rows = tensor(np.random.default_rng(0).normal(size=(20, 3)))
    both = torch.cat([rows, rows])
    assert label_free(both, torch.arange(40) < 20) is both


def test_semantic_targets_lie_among_the_semantic_neighbors():
    forget, retain = twins()
    aim = Aim(retain, semantic_choice(forget, retain, 4))
    by_tangent = tangent_targets(forget, aim, dimension=1, n_neighbors=4).points
    by_transport = transport_targets(forget, aim).points
    for points in (by_tangent, by_transport):
        assert float(points[:, 0].abs().max()) < 5  # across: gone to the retain side, 30 away
    torch.testing.assert_close(by_transport, retain)
    mixed = (by_tangent - forget)[:, 1:].norm(dim=1).mean()
    apart = (retain.flip(0) - forget)[:, 1:].norm(dim=1).mean()
    assert float(mixed) < 0.5 * float(apart)


# --- geodesic ---------------------------------------------------------------------------------


def arc(start, stop, n):
    angle = np.linspace(start, stop, n)
    return np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1)


def test_the_walk_follows_the_arc_and_stops_where_the_odds_turn():
    """Forget on the first half of a circle's arc, retain behind; the odds turn at 100 degrees."""
    turn = np.deg2rad(100)
    landmarks, rows = tensor(arc(0, np.deg2rad(80), 80)), tensor(arc(np.deg2rad(81), np.pi, 99))

    def log_ratio(points):
        return turn - torch.atan2(points[:, 1], points[:, 0])

    paired = Aim(rows, torch.full((80, 1), 98))
    found = geodesic_targets(landmarks, paired, log_ratio).points.numpy()
    np.testing.assert_allclose(np.arctan2(found[:, 1], found[:, 0]), turn, atol=2e-3)
    # along the arc: the chord to the goal passes 0.34 off the circle at 100 degrees or before
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=5e-3)


def test_where_the_odds_never_turn_the_walk_ends_at_the_nearest_row_along_the_graph():
    landmarks, rows = tensor(arc(0, 1.0, 60)), tensor(arc(1.02, 3.0, 100))
    found = geodesic_targets(landmarks, Aim(rows, None), lambda points: points[:, 0] * 0 + 1)
    torch.testing.assert_close(found.points, rows[:1].expand(60, 3))


def test_rows_that_are_retain_already_stay():
    landmarks, rows = tensor(arc(0, 1.0, 60)), tensor(arc(1.02, 3.0, 100))
    found = geodesic_targets(landmarks, Aim(rows, None), lambda points: points[:, 0] * 0 - 1)
    torch.testing.assert_close(found.points, landmarks)


def test_sides_that_no_edge_joins_are_joined():
    rng = np.random.default_rng(0)
    landmarks, rows = tensor(rng.normal(size=(40, 3))), tensor(rng.normal(size=(40, 3)) + 90)
    found = geodesic_targets(landmarks, Aim(rows, None), lambda points: 45 - points[:, 0])
    np.testing.assert_allclose(found.points[:, 0], 45, atol=1e-6)


# --- diffusion --------------------------------------------------------------------------------


def test_the_swap_crosses_to_retain_and_keeps_the_place_along_the_manifold():
    """A strip: across it lies the label, along it everything else."""
    rng = np.random.default_rng(0)
    along = rng.uniform(0, 3, size=(600, 1))
    across = np.r_[rng.uniform(2.6, 3.6, 300), rng.uniform(0, 1, 300)][:, None]
    rows = tensor(np.hstack([along, across, 0.2 * along**2, 0.01 * rng.normal(size=(600, 2))]))
    found = diffusion_targets(rows[:300], Aim(rows[300:], None), n_neighbors=16).points
    assert (rows[:300, 1] > 2).all()
    assert (found[:, 1] < 1.5).double().mean() > 0.9
    kept = np.corrcoef(found[:, 0], along[:300, 0])[0, 1]
    assert kept > 0.9
    # rows moved to a mean of retain would not keep their place
    assert float((found[:, 0] - torch.tensor(along[:300, 0])).abs().median()) < 0.3


def test_the_swap_says_how_many_rows_it_needs():
    rows = tensor(np.eye(4))
    with pytest.raises(ValueError, match=r"mode='diffusion' needs at least 6 .* got 4"):
        diffusion_targets(rows[:2], Aim(rows[2:], None), n_neighbors=2)
