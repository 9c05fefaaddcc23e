import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull, Delaunay

from manifold_unlearn.manifold import DiffusionMap, samples
from manifold_unlearn.manifold.metric import (
    metric_distances,
    pullback_metric,
    pushforward_metric,
    simplex_volumes,
)
from manifold_unlearn.manifold.tangent import TangentBundle

SPHERE = samples.sphere(2000, n_features=16, radius=2.0, random_state=0)
ROLL = samples.swiss_roll(2500, n_features=16, random_state=0)
SHEET = ROLL.intrinsic_coordinates


def bent_sheet():
    """The rectangle of the roll, squeezed unevenly."""
    x, y = (SHEET / np.ptp(SHEET, axis=0)).T
    return np.stack([x + 0.3 * x**2, y - 0.2 * x * y], 1)


# pushforward


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_circle_has_its_length_in_a_diffusion_map(noise):
    sample = samples.circle(
        2000, n_features=16, radius=3.0, density_amplitude=0.5, noise=3 * noise, random_state=0
    )
    fitted = DiffusionMap(2).fit(sample.points)
    found = pushforward_metric(
        sample.points, fitted.embedding_, intrinsic_dimension=1, bandwidth=fitted.bandwidth_
    )
    ring = np.argsort(sample.intrinsic_coordinates[:, 0])[::25]  # steps wider than the noise
    edges = np.stack([ring, np.roll(ring, -1)], 1)
    length = simplex_volumes(fitted.embedding_, found.metric, edges).sum()
    assert length == pytest.approx(6 * np.pi, rel=0.04)
    plain = np.tile(np.eye(2), (2000, 1, 1))
    assert simplex_volumes(fitted.embedding_, plain, edges).sum() < 0.6 * length


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_sphere_has_its_area_in_a_diffusion_map(noise):
    sample = samples.sphere(2000, n_features=16, radius=2.0, noise=2 * noise, random_state=0)
    fitted = DiffusionMap(3).fit(sample.points)
    found = pushforward_metric(
        sample.points, fitted.embedding_, intrinsic_dimension=2, bandwidth=fitted.bandwidth_
    )
    triangles = ConvexHull(fitted.embedding_).simplices
    area = simplex_volumes(fitted.embedding_, found.metric, triangles).sum()
    assert area == pytest.approx(16 * np.pi, rel=0.03)


def test_an_unrolled_roll_has_its_area_and_volume_form():
    flat = bent_sheet()
    found = pushforward_metric(ROLL.points, flat, intrinsic_dimension=2)
    triangles = Delaunay(SHEET).simplices
    true = simplex_volumes(SHEET, np.tile(np.eye(2), (len(SHEET), 1, 1)), triangles)
    measured = simplex_volumes(flat, found.metric, triangles)
    assert measured.sum() == pytest.approx(true.sum(), rel=0.05)
    x, _ = (SHEET / np.ptp(SHEET, axis=0)).T
    jacobian = (1 + 0.6 * x) * (1 - 0.2 * x) / np.ptp(SHEET, axis=0).prod()
    inside = (np.abs(SHEET[:, 0] - 45) < 38) & (np.abs(SHEET[:, 1] - 10.5) < 7)
    assert np.median((found.volume * jacobian)[inside]) == pytest.approx(1, abs=0.04)


def test_distances_in_the_embedding_are_those_of_the_data():
    flat = bent_sheet()
    found = pushforward_metric(ROLL.points, flat, intrinsic_dimension=2)
    sources = np.arange(40)
    true = ROLL.geodesic_distances(sources)
    far = true > 20
    measured = metric_distances(flat, found.metric, sources, n_neighbors=24)
    assert np.median(np.abs(measured[far] / true[far] - 1)) < 0.06
    plain = metric_distances(flat, np.tile(np.eye(2), (len(flat), 1, 1)), sources)
    scaled = plain * np.median(true[far] / plain[far])
    assert np.median(np.abs(scaled[far] / true[far] - 1)) > 0.1


@settings(max_examples=3, deadline=None, derandomize=True)
@given(st.integers(0, 2**31))
def test_a_linear_map_of_the_embedding_changes_no_length(seed):
    rng = np.random.default_rng(seed)
    linear = rng.standard_normal((3, 3)) + 2 * np.eye(3)
    U = SPHERE.intrinsic_coordinates
    options = {"intrinsic_dimension": 2, "bandwidth": 0.05}
    one = pushforward_metric(SPHERE.points, U, **options)
    other = pushforward_metric(SPHERE.points, U @ linear + 5, **options)
    np.testing.assert_allclose(
        other.cometric, linear.T @ one.cometric @ linear, atol=1e-8 * np.abs(linear).max() ** 2
    )
    tangent = TangentBundle(2).fit(U).tangent_bases(U)
    pushed = np.einsum("nka,nkl,nlb->nab", tangent, one.metric, tangent)
    assert np.median(np.abs(np.linalg.eigvalsh(pushed) / 4 - 1)) < 0.15


def test_scale_of_the_data_is_the_scale_of_lengths():
    U = SPHERE.intrinsic_coordinates
    one = pushforward_metric(SPHERE.points, U, intrinsic_dimension=2, bandwidth=0.05)
    big = pushforward_metric(1e4 * SPHERE.points, U, intrinsic_dimension=2, bandwidth=0.05e8)
    np.testing.assert_allclose(big.metric, 1e8 * one.metric, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tensors_in_tensors_out(dtype):
    X = torch.tensor(SPHERE.points[:500], dtype=dtype)
    U = torch.tensor(SPHERE.intrinsic_coordinates[:500], dtype=dtype)
    found = pushforward_metric(X, U, intrinsic_dimension=2)
    assert all(part.dtype == dtype for part in found)
    lengths = simplex_volumes(U, found.metric, torch.tensor([[0, 1], [1, 2]]))
    distances = metric_distances(U, found.metric, torch.tensor([0]))
    assert (lengths.dtype, distances.dtype) == (dtype, dtype)
    same = pushforward_metric(X.double().numpy(), U.double().numpy(), intrinsic_dimension=2)
    np.testing.assert_allclose(found.cometric, same.cometric, atol=1e-3)


def test_repeated_and_constant_columns_give_finite_metrics():
    U = np.c_[SPHERE.intrinsic_coordinates, SPHERE.intrinsic_coordinates[:, :1], np.ones(2000)]
    found = pushforward_metric(SPHERE.points, U, intrinsic_dimension=2)
    assert all(np.isfinite(part).all() for part in found)
    assert np.linalg.matrix_rank(found.metric, tol=1e-8).max() == 2
    twice = np.concatenate([SPHERE.points[:300]] * 2)
    again = pushforward_metric(twice, twice, intrinsic_dimension=2)
    assert all(np.isfinite(part).all() for part in again)


# simplices


def test_volumes_are_those_of_flat_simplices():
    points = np.array([[0.0, 0, 0], [3, 0, 0], [0, 4, 0], [0, 0, 5]])
    plain = np.tile(np.eye(3), (4, 1, 1))
    assert simplex_volumes(points, plain, np.array([[1, 2]])) == pytest.approx(5)
    assert simplex_volumes(points, plain, np.array([[0, 1, 2]])) == pytest.approx(6)
    assert simplex_volumes(points, 4 * plain, np.array([[0, 1, 2, 3]])) == pytest.approx(80)
    assert metric_distances(points, plain, np.array([1]))[0, 2] == pytest.approx(5)


# pullback


def test_pullback_of_spherical_coordinates_is_the_sphere_metric():
    def sphere(angles):
        theta, phi = angles.T
        ring = 2 * theta.sin()
        return torch.stack([ring * phi.cos(), ring * phi.sin(), 2 * theta.cos()], 1)

    angles = np.random.default_rng(0).uniform(0.2, 2.9, (100, 2))
    found = pullback_metric(sphere, angles)
    truth = np.zeros((100, 2, 2))
    truth[:, 0, 0], truth[:, 1, 1] = 4, 4 * np.sin(angles[:, 0]) ** 2
    np.testing.assert_allclose(found, truth, atol=1e-12)


@pytest.mark.parametrize("width", [2, 9])
def test_pullback_of_a_network_is_that_of_autograd(width):
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in [(5, 7), (7, width)]
    )

    def network(rows):
        return torch.tanh(rows @ first) @ second

    X = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    found = pullback_metric(network, X)
    directions = torch.randn(6, 5, 3, generator=generator, dtype=torch.float64)
    along = pullback_metric(network, X, tangents=directions)
    for row in range(6):
        J = torch.autograd.functional.jacobian(lambda x: network(x[None])[0], X[row])
        torch.testing.assert_close(found[row], J.T @ J)
        part = J @ directions[row]
        torch.testing.assert_close(along[row], part.T @ part)


def test_pullback_along_tangents_measures_a_curve():
    """A circle pushed through a linear layer: lengths from tangents are those of the image."""
    sample = samples.circle(600, random_state=0)
    layer = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    bases = TangentBundle(1).fit(sample.points).tangent_bases(sample.points)
    speed = np.sqrt(pullback_metric(lambda x: x @ layer, sample.points, tangents=bases))[:, 0, 0]
    truth = np.hypot(3 * sample.points[:, 1], sample.points[:, 0])
    np.testing.assert_allclose(speed, truth, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: pushforward_metric(SPHERE.points, SHEET, intrinsic_dimension=2),
            "embedding has 2500 rows, X has 2000",
        ),
        (
            lambda: pushforward_metric(ROLL.points, SHEET, intrinsic_dimension=3),
            "intrinsic_dimension=3 must lie between 1 and 2",
        ),
        (
            lambda: pushforward_metric(
                np.full((9, 2), np.nan), np.ones((9, 2)), intrinsic_dimension=1
            ),
            "NaN or infinity: 9 of 9 rows",
        ),
        (
            lambda: pushforward_metric(np.ones((9, 2)), np.ones((9, 2)), intrinsic_dimension=1),
            "all 9 samples are equal",
        ),
        (
            lambda: simplex_volumes(SHEET, np.ones((3, 2, 2)), np.array([[0, 1]])),
            r"metric has shape \(3, 2, 2\); expected \(2500, 2, 2\)",
        ),
        (
            lambda: simplex_volumes(SHEET, np.ones((2500, 2, 2)), np.arange(4)[None]),
            r"simplices have shape \(1, 4\)",
        ),
        (
            lambda: simplex_volumes(SHEET, np.ones((2500, 2, 2)), np.array([[0, 2500]])),
            "simplices name rows 0 to 2500",
        ),
        (
            lambda: pullback_metric(lambda x: x.sum(1), SHEET),
            r"function returned \(2500,\) for 2500 rows",
        ),
        (
            lambda: pullback_metric(lambda x: x, SHEET, tangents=np.ones((2, 2, 1))),
            r"tangents have shape \(2, 2, 1\)",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_impossible_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
