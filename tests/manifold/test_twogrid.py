import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

from manifold_unlearn.manifold import samples
from manifold_unlearn.manifold.distances import center_of
from manifold_unlearn.manifold.kernels import density_normalized, two_sided
from manifold_unlearn.manifold.markov import gaussian_operator
from manifold_unlearn.manifold.partition import leaf_order
from manifold_unlearn.manifold.spectral import markov_eigenpairs, product
from manifold_unlearn.manifold.twogrid import coarse_grid, leading_eigenpairs


def chain(points, n_neighbors=64):
    """Symmetric conjugate of the Markov matrix, and the root of its stationary distribution."""
    X = torch.from_numpy(points)
    X = X - center_of(X)
    X = X[leaf_order(X)]
    operator = gaussian_operator(X, n_neighbors=n_neighbors)
    normalized, _, _ = density_normalized(operator.graph.matrix, 1.0, None, 1.0)
    root = np.sqrt(np.asarray(normalized.sum(axis=1)).ravel())
    return two_sided(normalized, 1 / root, 1 / root), root


ROLL = samples.swiss_roll(4000, n_features=8, random_state=0).points


def test_agrees_with_arpack_in_a_fraction_of_the_products():
    symmetric, root = chain(ROLL)
    calls = []

    def apply(V):
        calls.append(V.shape[1])
        return product(symmetric, "cpu")(V)

    cell = np.arange(4000) * 512 // 4000
    grid = coarse_grid(symmetric, root, cell, 17, "cpu")
    start = grid.prolong(grid.vectors)
    found = leading_eigenpairs(apply, start, 11, grid.precondition, tol=1e-7)
    assert found.converged
    exact = scipy.sparse.linalg.eigsh(symmetric, 11, which="LA", tol=1e-12)[0][::-1]
    gap = 1 - exact[-1]
    np.testing.assert_allclose(found.values.numpy(), exact, atol=1e-9 * gap)
    assert len(calls) < 35
    vectors = found.vectors.numpy()
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(11), atol=1e-6)
    residual = symmetric @ vectors - vectors * found.values.numpy()
    assert np.linalg.norm(residual, axis=0).max() < 2e-7 * gap


def test_the_coarse_grid_carries_the_trivial_function_and_inverts():
    symmetric, root = chain(ROLL[:1000])
    cell = np.arange(1000) * 100 // 1000
    grid = coarse_grid(symmetric, root, cell, 8, "cpu")
    trivial = torch.from_numpy(root / np.linalg.norm(root))[:, None]
    torch.testing.assert_close(grid.prolong(grid.restrict(trivial)), trivial)
    coarse = torch.from_numpy(np.random.default_rng(0).standard_normal((100, 3)))
    torch.testing.assert_close(grid.restrict(grid.prolong(coarse)), coarse)
    fine = grid.prolong(coarse - grid.vectors[:, :1] @ (grid.vectors[:, :1].T @ coarse))
    image = grid.restrict(fine - product(symmetric, "cpu")(fine))
    torch.testing.assert_close(grid.inverse @ image, grid.restrict(fine), rtol=1e-6, atol=1e-6)


def test_repeated_eigenvalues_are_all_found():
    angles = 2 * np.pi * np.arange(3500) / 3500
    symmetric, root = chain(np.stack([np.cos(angles), np.sin(angles)], 1))
    found = markov_eigenpairs(symmetric, root, 6)
    pairs = found.eigenvalues.reshape(3, 2)
    rates = 1 - pairs
    np.testing.assert_allclose(rates[:, 0], rates[:, 1], rtol=1e-6)
    np.testing.assert_allclose(rates[:, 0] / rates[0, 0], [1, 4, 9], rtol=0.01)


def test_a_mode_within_one_cell_is_not_missed():
    """A knot of rows, hardly tied to the rest, has an eigenvalue near 1 that no cell shows."""
    symmetric, _ = chain(samples.circle(4000, n_features=3, random_state=0).points)
    kernel = scipy.sparse.lil_matrix(symmetric)
    knot = np.arange(2000, 2006)
    outside = np.setdiff1d(np.arange(4000), knot)
    kernel[np.ix_(knot, outside)] = 0
    kernel[np.ix_(outside, knot)] = 0
    kernel[np.ix_(knot, knot)] = 1.0
    kernel[2000, 1999] = kernel[1999, 2000] = 1e-4
    kernel = kernel.tocsr()
    root = np.sqrt(np.asarray(kernel.sum(axis=1)).ravel())
    conjugate = two_sided(kernel, 1 / root, 1 / root)
    exact = scipy.sparse.linalg.eigsh(conjugate, 5, sigma=1 + 1e-6)[0][::-1]
    found = markov_eigenpairs(conjugate, root, 4)
    np.testing.assert_allclose(found.eigenvalues, np.sort(exact)[::-1][1:5], atol=1e-8)


@pytest.mark.parametrize("n_components", [1, 40])
def test_few_and_many_components(n_components):
    symmetric, root = chain(ROLL[:3200], n_neighbors=16)
    found = markov_eigenpairs(symmetric, root, n_components)
    exact = scipy.sparse.linalg.eigsh(symmetric, n_components + 1, which="LA")[0]
    np.testing.assert_allclose(found.eigenvalues, np.sort(exact)[::-1][1:], atol=1e-7)
