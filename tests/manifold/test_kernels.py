import numpy as np
import pytest
import torch

from manifold_unlearn.manifold import samples
from manifold_unlearn.manifold.bandwidth import fit_support, pair_histogram, tune_bandwidth
from manifold_unlearn.manifold.distances import center_of
from manifold_unlearn.manifold.kernels import density_normalized, kernel_graph


def centered(points):
    X = torch.from_numpy(points)
    return X - center_of(X)


def tuned(points, n_neighbors=64, **options):
    return tune_bandwidth(pair_histogram(centered(points)), n_neighbors=n_neighbors, **options)


CASES = {
    "circle": (lambda **k: samples.circle(1500, **k), 0.15),
    "crowded circle": (lambda **k: samples.circle(1500, density_amplitude=0.8, **k), 0.15),
    "sphere": (lambda **k: samples.sphere(1500, tilt=1.0, **k), 0.15),
    "torus": (lambda **k: samples.flat_torus(1500, **k), 0.15),
    "roll": (lambda **k: samples.swiss_roll(1500, **k), 0.2),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_dimension_of_known_manifolds(name, noise):
    make, tolerance = CASES[name]
    sample = make(n_features=64, noise=noise, random_state=0)
    assert tuned(sample.points).intrinsic_dimension == pytest.approx(
        sample.intrinsic_dimension, abs=tolerance
    )


def test_noise_is_recognized_and_does_not_take_the_bandwidth():
    options = {"n_features": 96, "density_amplitude": 0.8, "random_state": 1}
    clean = tuned(samples.circle(2000, **options).points)
    noisy = tuned(samples.circle(2000, noise=1e-3, **options).points)
    assert noisy.squared_noise == pytest.approx(2 * 96e-6, rel=0.15)
    assert clean.squared_noise < 0.1 * noisy.squared_noise
    assert noisy.bandwidth == pytest.approx(clean.bandwidth, rel=0.2)
    assert noisy.bandwidth > 5 * noisy.squared_noise


@pytest.mark.parametrize(("n_samples", "seed"), [(3000, 3), (2000, 1), (2000, 3)])
def test_strong_noise_that_spreads_distances_leaves_the_dimension(n_samples, seed):
    sample = samples.swiss_roll(n_samples, n_features=768, noise=0.1, random_state=seed)
    found = tuned(sample.points)
    assert found.intrinsic_dimension == pytest.approx(2, abs=0.3)
    assert found.squared_noise == pytest.approx(2 * 768 * 0.01, rel=0.1)
    assert found.bandwidth < 1.3  # beyond, the sheets of the roll join


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_bandwidth_scales_with_the_square_of_the_data(factor):
    points = samples.sphere(800, n_features=10, random_state=0).points
    one, other = tuned(points), tuned(points * factor)
    assert other.bandwidth == pytest.approx(one.bandwidth * factor**2, rel=0.02)
    assert other.intrinsic_dimension == pytest.approx(one.intrinsic_dimension, rel=0.01)


def test_bandwidth_does_not_see_order():
    points = samples.sphere(800, n_features=10, random_state=0).points
    shuffled = np.random.default_rng(0).permutation(points)
    assert tuned(shuffled).bandwidth == pytest.approx(tuned(points).bandwidth, rel=1e-9)


def test_equal_rows_have_no_bandwidth():
    with pytest.raises(ValueError, match="all 30 samples are equal"):
        pair_histogram(torch.full((30, 4), 0.1, dtype=torch.float64))


def test_graph_is_the_gaussian_kernel_on_a_fixed_radius():
    points = samples.circle(600, n_features=6, density_amplitude=0.8, random_state=0).points
    X = centered(points)
    chosen = tuned(points, n_neighbors=8)
    graph = kernel_graph(X, chosen, n_neighbors=8)
    exponent = torch.cdist(X, X).square().numpy() / (4 * chosen.bandwidth)
    dense = graph.matrix.toarray()
    assert np.array_equal(dense, dense.T)
    assert (dense.diagonal() == 1).all()
    near = exponent <= chosen.cutoff - 1e-6
    np.testing.assert_allclose(dense[near], np.exp(-exponent)[near], rtol=1e-6)
    stored = dense > 0
    np.testing.assert_allclose(dense[stored], np.exp(-exponent)[stored], rtol=1e-6)
    lost = np.exp(-exponent)[~stored].sum() / np.exp(-exponent).sum()
    assert lost < 2e-3


def test_sparse_rows_reach_their_nearest_neighbors():
    X = centered(np.array([0.0, 0.1, 0.2, 0.3, 2.0])[:, None])
    chosen = tuned(X.numpy(), n_neighbors=3, bandwidth=0.08)
    graph = kernel_graph(X, chosen._replace(cutoff=7.0), n_neighbors=3)
    assert graph.matrix[4, 3] == pytest.approx(np.exp(-(1.7**2) / 0.32))
    assert graph.matrix[4, 2] == pytest.approx(np.exp(-(1.8**2) / 0.32))
    assert graph.matrix[4, 1] == 0


def test_truncated_kernel_warns_with_the_neighbors_that_would_do():
    points = samples.circle(6000, random_state=0).points
    X = centered(points)
    histogram = pair_histogram(X)
    wide = tune_bandwidth(histogram, n_neighbors=4, bandwidth=0.5)
    with pytest.warns(UserWarning, match=r"truncates the kernel.*n_neighbors=375 would do"):
        cut = fit_support(histogram, wide, n_samples=6000, n_neighbors=4)
    assert cut.cutoff < wide.cutoff
    assert fit_support(histogram, wide, n_samples=6000, n_neighbors=375) == wide


def test_normalization_divides_by_the_densities():
    points = samples.circle(300, density_amplitude=0.5, random_state=0).points
    graph = kernel_graph(centered(points), tuned(points), n_neighbors=64)
    dense = graph.matrix.toarray()
    q = dense.sum(1)
    for alpha in (0.0, 0.5, 1.0, -0.3):
        normalized, weights, sums = density_normalized(graph.matrix, alpha, None, 1.0)
        np.testing.assert_allclose(weights, q**-alpha)
        np.testing.assert_allclose(sums, q)
        np.testing.assert_allclose(normalized.toarray(), dense / np.outer(q, q) ** alpha)
