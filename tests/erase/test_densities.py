import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from manifold_unlearn.erase.densities import KernelRatio, LinearRatio, tensors_of
from manifold_unlearn.erase.folds import Rows
from manifold_unlearn.erase.held_out import fit_linear

RNG = np.random.default_rng(0)
LANDMARKS = RNG.normal(size=(30, 5))
WEIGHTS = RNG.uniform(size=(30, 2))
H = RNG.normal(size=(4, 3, 5))


def kernel_ratio(n_neighbors=0, background=0.02, offset=0.0):
    center = np.full(5, offset)
    parts = (center, LANDMARKS, (LANDMARKS**2).sum(1), WEIGHTS)
    return KernelRatio(
        *(torch.from_numpy(np.array(part)) for part in parts), 0.7, background, n_neighbors
    )


def by_hand(h, n_neighbors=0, background=0.02):
    squared = ((h[..., None, :] - LANDMARKS) ** 2).sum(-1)
    kernel = np.exp(-squared / (4 * 0.7))
    if n_neighbors:
        last = np.sort(squared, -1)[..., n_neighbors - 1, None]
        kernel = np.where(squared <= last, 0.7 / (0.7 + squared), 0)
    masses = kernel @ WEIGHTS + background
    return np.log(masses[..., 0] / masses[..., 1])


@pytest.mark.parametrize("n_neighbors", [0, 7])
def test_the_kernel_ratio_is_its_formula_for_any_shape(n_neighbors):
    ratio = kernel_ratio(n_neighbors)
    np.testing.assert_allclose(ratio(torch.from_numpy(H)), by_hand(H, n_neighbors), atol=1e-12)
    assert ratio(torch.from_numpy(H[0, 0])).shape == ()


def test_the_center_only_moves_the_rows():
    moved = kernel_ratio(offset=50.0)(torch.from_numpy(H + 50))
    np.testing.assert_allclose(moved, by_hand(H), atol=1e-10)


def test_far_from_all_landmarks_there_is_no_evidence():
    far = torch.full((2, 5), 1e3, dtype=torch.float64)
    assert kernel_ratio()(far).tolist() == [0, 0]
    assert kernel_ratio(7)(far).abs().max() < 1e-3


@pytest.mark.parametrize("n_neighbors", [0, 7])
def test_the_ratio_has_the_gradient_of_its_formula(n_neighbors):
    h = torch.from_numpy(H[0]).requires_grad_()
    (slope,) = torch.autograd.grad(kernel_ratio(n_neighbors)(h).sum(), h)
    for i in range(5):
        step = np.zeros(5)
        step[i] = 1e-6
        change = by_hand(H[0] + step, n_neighbors) - by_hand(H[0] - step, n_neighbors)
        np.testing.assert_allclose(slope[:, i], change / 2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_rows_are_read_in_float32(dtype):
    rows = torch.from_numpy(H).to(dtype)
    found = kernel_ratio()(rows)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, by_hand(rows.double().numpy()), atol=1e-4)
    placed = kernel_ratio().to("cpu", dtype)
    assert placed.landmarks.dtype == torch.float32
    torch.testing.assert_close(placed(rows), found)


def test_fields_are_split_into_tensors_and_numbers():
    tensors, numbers = tensors_of(kernel_ratio(3))
    assert set(tensors) == {"center", "landmarks", "squared", "weights"}
    assert numbers == {"bandwidth": 0.7, "background": 0.02, "n_neighbors": 3}
    again = KernelRatio(**tensors, **numbers)
    assert torch.equal(again(torch.from_numpy(H)), kernel_ratio(3)(torch.from_numpy(H)))


def test_the_linear_ratio_is_that_of_two_normal_densities_of_one_covariance():
    rng = np.random.default_rng(3)
    X = rng.normal(size=(13000, 3)) * [3, 1, 0.5]  # far from round: little is shrunk
    X[:4000] += 1
    line = np.r_[np.arange(4000) % 4, 4 + np.arange(9000) % 5]
    fitted = fit_linear(Rows(torch.from_numpy(X), torch.from_numpy(line), 4, 9)).ratio
    means = X[:4000].mean(0), X[4000:].mean(0)
    spread = (np.cov(X[:4000].T, ddof=0) + np.cov(X[4000:].T, ddof=0)) / 2
    one, other = (multivariate_normal(mean, spread).logpdf(X[::50]) for mean in means)
    np.testing.assert_allclose(fitted(torch.from_numpy(X[::50])), one - other, rtol=0.01, atol=0.02)
    assert isinstance(fitted, LinearRatio)
    half = fitted.to("cpu", torch.bfloat16)
    assert half.direction.dtype == torch.float32
