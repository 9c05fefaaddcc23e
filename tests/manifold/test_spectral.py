import numpy as np
import pytest
import scipy.linalg
import scipy.sparse
import torch

from manifold_unlearn.manifold.spectral import block_eigenpairs, fix_signs, markov_eigenpairs


def markov(kernel):
    """Symmetric conjugate of a kernel's Markov matrix, and the root of its degrees."""
    root = np.sqrt(kernel.sum(1))
    return scipy.sparse.csr_matrix(kernel / np.outer(root, root)), root


def ring(n_samples, width=20.0):
    """Kernel of equidistant points on a circle: eigenvalues come in exact pairs."""
    steps = np.arange(n_samples)
    gap = np.minimum(steps, n_samples - steps) / n_samples
    row = np.exp(-((gap * n_samples) ** 2) / width)
    row[row < 1e-6] = 0
    return np.stack([np.roll(row, shift) for shift in steps])


def cloud_kernel(n_samples, seed=0):
    X = np.random.default_rng(seed).standard_normal((n_samples, 3))
    return np.exp(-((X[:, None] - X[None]) ** 2).sum(-1) / 2)


@pytest.mark.parametrize("n_samples", [60, 500])
def test_matches_dense_eigenvalues_of_the_markov_matrix(n_samples):
    kernel = cloud_kernel(n_samples)
    transition = kernel / kernel.sum(1, keepdims=True)
    found = markov_eigenpairs(*markov(kernel), 6)
    expected = np.sort(np.linalg.eigvalsh(markov(kernel)[0].toarray()))[::-1][1:7]
    np.testing.assert_allclose(found.eigenvalues, expected, atol=1e-9)
    residual = transition @ found.eigenvectors - found.eigenvectors * found.eigenvalues
    assert np.abs(residual).max() < 1e-7
    np.testing.assert_allclose(found.eigenvectors.std(0), 1)


@pytest.mark.parametrize("n_samples", [300, 1000, 3000])
def test_repeated_eigenvalues_are_found_with_their_multiplicity(n_samples):
    kernel = ring(n_samples, width=n_samples / 20)
    found = markov_eigenpairs(*markov(kernel), 8)
    transform = np.fft.fft(kernel[0]).real / kernel[0].sum()
    expected = np.repeat(transform[1:5], 2)
    np.testing.assert_allclose(found.eigenvalues, expected, atol=1e-9)
    gram = found.eigenvectors.T @ found.eigenvectors / n_samples
    np.testing.assert_allclose(gram, np.eye(8), atol=1e-6)


def test_crowded_eigenvalues_are_found():
    weak = 1e-7  # three parts that hardly touch
    kernel = scipy.linalg.block_diag(*(cloud_kernel(200, seed) for seed in range(3)))
    kernel[[0, 200], [200, 400]] = kernel[[200, 400], [0, 200]] = weak
    found = markov_eigenpairs(*markov(kernel), 4)
    assert (1 - found.eigenvalues[:2] < 1e-7).all()
    assert (1 - found.eigenvalues[:2] > 0).all()
    means = [found.eigenvectors[part : part + 200, :2].mean(0) for part in (0, 200, 400)]
    assert np.linalg.matrix_rank(np.array(means) - np.mean(means, axis=0), tol=0.1) == 2


def test_components_give_one_eigenvalue_one_each_and_no_mixing():
    kernel = scipy.linalg.block_diag(cloud_kernel(50, 1), cloud_kernel(450, 2), np.ones((1, 1)))
    found = markov_eigenpairs(*markov(kernel), 5)
    assert np.array_equal(np.bincount(found.component), [450, 50, 1])
    assert (found.eigenvalues[:2] == 1).all()
    assert found.eigenvalues[2] < 1
    assert np.isfinite(found.eigenvectors).all()
    for part in range(3):
        assert np.ptp(found.eigenvectors[found.component == part][:, :2], axis=0).max() < 1e-12
    transition = kernel / kernel.sum(1, keepdims=True)
    residual = transition @ found.eigenvectors - found.eigenvectors * found.eigenvalues
    assert np.abs(residual).max() < 1e-7


def test_more_components_than_asked_for_coordinates():
    found = markov_eigenpairs(*markov(np.eye(40)), 3)
    assert (found.eigenvalues == 1).all()
    assert found.component.max() == 39
    assert np.linalg.matrix_rank(found.eigenvectors) == 3


def test_two_runs_are_equal_to_the_bit():
    symmetric, root = markov(cloud_kernel(600))
    first, second = (markov_eigenpairs(symmetric, root, 4) for _ in range(2))
    assert np.array_equal(first.eigenvectors, second.eigenvectors)


def test_largest_entry_is_positive():
    vectors = np.array([[1.0, -0.2], [-3.0, 0.5], [2.0, 0.1]])
    np.testing.assert_array_equal(fix_signs(vectors), vectors * [-1, 1])
    assert np.array_equal(fix_signs(-vectors), fix_signs(vectors))


def test_too_many_components_are_refused():
    with pytest.raises(ValueError, match="n_components=30 must lie between 1 and 29"):
        markov_eigenpairs(*markov(cloud_kernel(30)), 30)


@pytest.mark.parametrize("make", [ring, cloud_kernel])
def test_block_solver_matches_dense(make):
    symmetric, _ = markov(make(500))
    matrix = torch.from_numpy(symmetric.toarray())
    values, vectors = block_eigenpairs(lambda V: matrix @ V, 500, 7)
    expected = np.linalg.eigvalsh(symmetric.toarray())[::-1][:7]
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-10)
    assert (matrix @ vectors - vectors * values).norm(dim=0).max() < 1e-7
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(7, dtype=torch.float64))


def test_block_solver_says_when_it_does_not_converge():
    matrix = torch.from_numpy(markov(ring(800))[0].toarray())
    with pytest.raises(ArithmeticError, match="did not converge in 1 iterations"):
        block_eigenpairs(lambda V: matrix @ V, 800, 6, max_iter=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_device_solver_matches_cpu():
    symmetric, root = markov(cloud_kernel(900))
    there = markov_eigenpairs(symmetric, root, 5, "cuda")
    here = markov_eigenpairs(symmetric, root, 5)
    np.testing.assert_allclose(there.eigenvalues, here.eigenvalues, atol=1e-9)
    np.testing.assert_allclose(there.eigenvectors, here.eigenvectors, atol=1e-5)
