import numpy as np
import pytest

from manifold_unlearn.manifold import samples

MAKERS = {
    "circle": samples.circle,
    "crowded circle": lambda n, **k: samples.circle(n, density_amplitude=0.8, radius=2.0, **k),
    "sphere": samples.sphere,
    "tilted sphere": lambda n, **k: samples.sphere(n, tilt=1.0, radius=0.5, **k),
    "torus": samples.flat_torus,
    "uneven torus": lambda n, **k: samples.flat_torus(n, radii=(1.0, 0.6), **k),
    "roll": samples.swiss_roll,
    "hypersphere": lambda n, **k: samples.hypersphere(n, dimension=3, radius=2.0, **k),
}


@pytest.mark.parametrize("name", MAKERS)
def test_eigenfunctions_are_orthonormal_under_the_uniform_distribution(name):
    sample = MAKERS[name](40000, random_state=0)
    weights = 1 / sample.density
    weights /= weights.sum()
    gram = sample.eigenfunctions.T @ (weights[:, None] * sample.eigenfunctions)
    np.testing.assert_allclose(gram, np.eye(len(sample.eigenvalues)), atol=0.12)
    assert np.abs(weights @ sample.eigenfunctions).max() < 0.05
    assert (np.diff(sample.eigenvalues) >= 0).all()
    assert sample.eigenvalues[0] > 0


@pytest.mark.parametrize("name", MAKERS)
def test_eigenfunctions_satisfy_the_dirichlet_identity(name):
    """|f(x) - f(y)| / distance is a slope; its mean square in all directions is lambda / d."""
    sample = MAKERS[name](3000, random_state=0)
    distances = sample.geodesic_distances()
    np.fill_diagonal(distances, np.inf)
    scale = np.quantile(distances[distances < np.inf], 0.004)
    first, second = np.nonzero(distances < scale)
    weights = 1 / (sample.density[first] * sample.density[second])
    f = sample.eigenfunctions
    slopes = ((f[first] - f[second]) / distances[first, second][:, None]) ** 2
    energy = (weights[:, None] * slopes).sum(0) / weights.sum()
    expected = sample.eigenvalues / sample.intrinsic_dimension
    np.testing.assert_allclose(energy[:4], expected[:4], rtol=0.15)


@pytest.mark.parametrize("name", MAKERS)
def test_geodesics_are_a_metric_that_chords_approach(name):
    sample = MAKERS[name](400, n_features=20, random_state=0)
    distances = sample.geodesic_distances()
    chords = np.linalg.norm(sample.points[:, None] - sample.points[None], axis=-1)
    assert np.array_equal(distances, distances.T)
    assert (distances >= chords - 1e-7).all()
    near = (distances > 0) & (distances < 0.05 * distances.max())
    assert (distances[near] / chords[near]).max() < 1.05
    detour = distances[:, :20, None] + distances[None, :20, :]
    assert (distances[:, None, :] <= detour + 1e-9).all()
    part = sample.geodesic_distances(np.array([3, 5]), np.array([7]))
    assert np.array_equal(part, distances[[3, 5]][:, [7]])


@pytest.mark.parametrize("name", MAKERS)
def test_embedding_is_an_isometry_with_the_noise_asked_for(name):
    clean = MAKERS[name](500, n_features=30, random_state=4)
    noisy = MAKERS[name](500, n_features=30, random_state=4, noise=0.01)
    identity = clean.isometry @ clean.isometry.T
    np.testing.assert_allclose(identity, np.eye(len(identity)), atol=1e-12)
    flat = clean.points @ clean.isometry.T
    np.testing.assert_allclose(flat @ clean.isometry, clean.points, atol=1e-9)
    assert (noisy.points - clean.points).std() == pytest.approx(0.01, rel=0.05)


def test_density_is_the_density_asked_for():
    sample = samples.circle(200000, density_amplitude=0.8, random_state=0)
    counts, edges = np.histogram(sample.intrinsic_coordinates[:, 0], 20, (0, 2 * np.pi))
    middle = (edges[1:] + edges[:-1]) / 2
    assert counts.max() > 5 * counts.min()
    np.testing.assert_allclose(
        counts / 200000 / (np.pi / 10), (1 + 0.8 * np.cos(middle)) / (2 * np.pi), atol=0.01
    )
    tilted = samples.sphere(50000, tilt=1.0, random_state=0)
    mean = 1 / np.tanh(1) - 1
    assert tilted.intrinsic_coordinates[:, 2].mean() == pytest.approx(mean, abs=0.01)


def test_random_state_decides_and_the_global_generator_is_left_alone():
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (samples.sphere(20, random_state=3).points for _ in range(2))
    other = samples.sphere(20, random_state=4).points
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (samples.circle, {"n_features": 1}, "n_features=1 is too small"),
        (samples.flat_torus, {"n_features": 3}, "needs at least 4"),
        (samples.hypersphere, {"dimension": 0}, "dimension=0 must be at least 1"),
        (samples.hypersphere, {"dimension": 5, "n_features": 5}, "needs at least 6"),
        (samples.linear_subspace, {"dimension": 3, "n_features": 2}, "needs at least 3"),
        (samples.circle, {"density_amplitude": 1.0}, "density_amplitude=1.0"),
    ],
)
def test_impossible_samples_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(10, **options)


def test_linear_subspace_is_flat_and_gaussian():
    sample = samples.linear_subspace(20000, dimension=3, n_features=9, scale=2.0, random_state=0)
    chords = np.linalg.norm(sample.points[:50, None] - sample.points[None, :50], axis=-1)
    part = np.arange(50)
    np.testing.assert_allclose(sample.geodesic_distances(part, part), chords, atol=1e-12)
    np.testing.assert_allclose(sample.eigenfunctions.T @ sample.eigenfunctions / 20000, np.eye(3),
                               atol=0.05)  # fmt: skip
    assert sample.points.var(axis=0).sum() == pytest.approx(12, rel=0.03)
    assert np.log(sample.density).mean() == pytest.approx(
        -1.5 * np.log(2 * np.pi * np.e * 4), abs=0.05
    )
