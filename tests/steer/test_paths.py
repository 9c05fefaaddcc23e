import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from manifold_unlearn.steer.paths import ManifoldPath, chord, principal_subspace

RANDOM = np.random.default_rng(0)
START, END = RANDOM.standard_normal((2, 6))


def corner(**changes):
    """An L of lengths 3 and 1 in the plane."""
    kept = {
        "points": torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 1.0]]),
        "times": torch.tensor([0.0, 0.5, 1.0]),
        "kind": "spline",
        "mean": torch.tensor([1.0, 1.0]),
        "basis": torch.tensor([[1.0], [0.0]]),
    }
    return ManifoldPath(**(kept | changes))


def test_a_path_tells_its_length_and_its_coordinates():
    path = corner()
    assert path.n_waypoints == 3
    assert path.length == pytest.approx(4.0)
    assert path.distortion == pytest.approx(4.0 / np.sqrt(10))
    torch.testing.assert_close(path.coordinates, torch.tensor([[-1.0], [2.0], [2.0]]))


def test_doubles_become_float32():
    path = corner(points=torch.zeros(3, 2).double() + torch.arange(3)[:, None])
    assert {part.dtype for part in (path.points, path.times, path.mean)} == {torch.float32}


def test_resampling_spaces_evenly_along_the_length():
    found = corner().resampled(9)
    steps = (found.points[1:] - found.points[:-1]).norm(dim=1)
    torch.testing.assert_close(steps, torch.full((8,), 0.5))
    torch.testing.assert_close(found.times, torch.linspace(0, 1, 9))
    torch.testing.assert_close(found.points[[0, 6, -1]], corner().points)


def test_at_interpolates_in_time():
    path = corner(times=torch.tensor([0.0, 0.2, 1.0]))
    torch.testing.assert_close(path.at(0.1), torch.tensor([1.5, 0.0]))
    found = path.at(np.array([0.0, 0.6, 1.0]))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [3.0, 0.5], [3.0, 1.0]]))


def test_reversing_twice_changes_nothing():
    path = corner(times=torch.tensor([0.0, 0.25, 1.0]))
    back = path.reversed()
    torch.testing.assert_close(back.times, torch.tensor([0.0, 0.75, 1.0]))
    torch.testing.assert_close(back.at(0.75), path.at(0.25))
    torch.testing.assert_close(back.reversed().points, path.points)


def test_a_path_saved_is_the_path_loaded(tmp_path):
    path = corner()
    path.save(tmp_path / "path")
    again = ManifoldPath.load(tmp_path / "path")
    assert again.kind == "spline"
    for name in ("points", "times", "mean", "basis"):
        assert torch.equal(getattr(again, name), getattr(path, name))


@pytest.mark.parametrize("kind", [np.float32, np.float64, "torch"])
def test_the_chord_is_straight_and_evenly_spaced(kind):
    start, end = (
        (torch.tensor(START), torch.tensor(END))
        if kind == "torch"
        else (START.astype(kind), END.astype(kind))
    )
    path = chord(start, end, 5)
    expected = START + np.linspace(0, 1, 5)[:, None] * (END - START)
    np.testing.assert_allclose(path.points, expected, atol=1e-6)
    assert path.kind == "chord"
    assert path.distortion == pytest.approx(1)
    span = np.linalg.norm(END - START) / 2
    np.testing.assert_allclose(path.coordinates[[0, -1], 0], [-span, span], rtol=1e-5)


def test_a_chord_between_sets_joins_their_means():
    rows = RANDOM.standard_normal((2, 7, 6))
    path = chord(rows[0], rows[1], 2)
    np.testing.assert_allclose(path.points, rows.mean(1), atol=1e-6)


def test_the_chord_of_a_path_keeps_ends_and_subspace():
    path = corner()
    line = path.chord()
    torch.testing.assert_close(line.points[[0, -1]], path.points[[0, -1]])
    torch.testing.assert_close(line.points[1], torch.tensor([1.5, 0.5]))
    assert torch.equal(line.basis, path.basis) and line.kind == "chord"


def test_principal_subspace_is_that_of_scikit_learn():
    X = RANDOM.standard_normal((40, 8)) * np.array([9, 5, 3, 1, 1, 0.5, 0.1, 0.1]) + 4
    found, theirs = principal_subspace(X, 3), PCA(3).fit(X)
    np.testing.assert_allclose(found.mean, X.mean(0))
    np.testing.assert_allclose(
        np.abs(theirs.components_ @ found.basis.numpy()), np.eye(3), atol=1e-9
    )
    wide = principal_subspace(X[:6, :], 5).basis
    product = np.abs(PCA(5).fit(X[:6]).components_ @ wide.numpy())
    np.testing.assert_allclose(product, np.eye(5), atol=1e-7)
    share = np.cumsum(PCA().fit(X).explained_variance_ratio_)
    assert principal_subspace(X, 0.9).basis.shape[1] == int((share < 0.9).sum()) + 1
    assert principal_subspace(X[:4], 50).basis.shape == (8, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"points": torch.zeros(1, 2)}, "at least 2 waypoints"),
        ({"times": torch.tensor([0.0, 1.0])}, "do not fit"),
        ({"times": torch.tensor([0.0, 0.0, 1.0])}, "must increase from 0 to 1"),
        ({"times": torch.tensor([0.1, 0.5, 1.0])}, "must increase from 0 to 1"),
        ({"basis": torch.ones(2, 2)}, "orthonormal columns"),
        ({"mean": torch.tensor([float("nan"), 0.0])}, "mean contains NaN"),
    ],
)
def test_a_path_that_is_none_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        corner(**changes)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: chord(START, START, 5), "the same point"),
        (lambda: chord(START, END[:3], 5), "start has 6 features, end has 3"),
        (lambda: chord(START, END, 1), "n_waypoints=1 must be an integer of at least 2"),
        (lambda: chord(START, END, 2.5), "n_waypoints=2.5 must be an integer"),
        (lambda: chord(START[None, None], END, 3), "a point"),
        (lambda: chord(START * np.nan, END, 3), "start contains NaN"),
        (lambda: corner().at(1.5), r"must lie in \[0, 1\]"),
        (lambda: corner().at(float("nan")), r"must lie in \[0, 1\]"),
        (lambda: corner().resampled(1), "n_waypoints=1"),
        (lambda: corner(points=torch.ones(3, 2)).resampled(4), "length 0"),
        (lambda: principal_subspace(np.ones((4, 3))), "all 4 rows are equal"),
        (lambda: principal_subspace(np.eye(3), 0), "n_components=0 must be positive"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
