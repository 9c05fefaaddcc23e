import numpy as np
import pytest
import torch

from manifold_unlearn.intervene.ridge import ridge_change, spared_basis

N_FORGET, N_RETAIN, WIDTH, OUT = 30, 200, 12, 5


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    forget, wanted = rng.normal(size=(N_FORGET, WIDTH)), rng.normal(size=(N_FORGET, OUT))
    scale = np.linspace(3, 0.05, WIDTH)
    retain = rng.normal(size=(N_RETAIN, WIDTH)) * scale
    return forget, wanted, retain


def grams(problem):
    forget, wanted, retain = map(torch.as_tensor, problem)
    return (
        forget.T @ forget / len(forget),
        forget.T @ wanted / len(forget),
        (retain.T @ retain / len(retain)),
    )


def test_it_minimizes_the_penalized_error(problem):
    """numpy's least squares on stacked rows knows nothing of Gram matrices."""
    forget, wanted, retain = problem
    rows = [forget / np.sqrt(N_FORGET), np.sqrt(2.0 / N_RETAIN) * retain]
    values = [wanted / np.sqrt(N_FORGET), np.zeros((N_RETAIN, OUT))]
    expected = np.linalg.lstsq(np.concatenate(rows), np.concatenate(values), rcond=None)[0]
    found = ridge_change(*grams(problem), ridge=2.0, damping=0.0)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def test_damping_is_a_share_of_the_mean_diagonal(problem):
    gram, cross, hold = (g.numpy() for g in grams(problem))
    system = gram + 2.0 * hold
    system += 0.1 * np.trace(system) / WIDTH * np.eye(WIDTH)
    found = ridge_change(*grams(problem), ridge=2.0, damping=0.1)
    np.testing.assert_allclose(found.numpy(), np.linalg.solve(system, cross), atol=1e-10)


def test_passes_solve_for_what_is_left(problem):
    forget, wanted, _ = map(torch.as_tensor, problem)
    gram, cross, hold = grams(problem)
    total, left = torch.zeros(WIDTH, OUT, dtype=torch.float64), wanted
    for _ in range(3):
        step = ridge_change(gram, forget.T @ left / N_FORGET, hold, ridge=5.0)
        total, left = total + step, left - forget @ step
    found = ridge_change(gram, cross, hold, ridge=5.0, n_passes=3)
    torch.testing.assert_close(found, total)
    once = ridge_change(gram, cross, hold, ridge=5.0)
    assert (wanted - forget @ found).norm() < (wanted - forget @ once).norm()


def test_more_ridge_moves_retain_less(problem):
    retain = torch.as_tensor(problem[2])
    moved = [float((retain @ ridge_change(*grams(problem), ridge=r)).norm()) for r in (0.1, 1, 10)]
    assert moved[0] > moved[1] > moved[2]


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_protected_directions_are_the_fewest_that_hold_the_energy(problem, energy):
    _, _, hold = grams(problem)
    values = np.sort(np.linalg.eigvalsh(hold.numpy()))[::-1]
    n_protected = int(np.searchsorted(np.cumsum(values) / values.sum(), energy) + 1)
    basis = spared_basis(hold, energy)
    assert basis.shape == (WIDTH, WIDTH - n_protected)
    left = float((basis.T @ hold @ basis).trace() / hold.trace())
    assert left <= 1 - energy + 1e-12
    change = ridge_change(*grams(problem), ridge=0.0, null_space=energy)
    torch.testing.assert_close(basis @ (basis.T @ change), change)


def test_the_exact_null_space_leaves_retain_keys_alone(problem):
    forget, wanted, _ = map(torch.as_tensor, problem)
    retain = torch.zeros(50, WIDTH, dtype=torch.float64)
    retain[:, :7] = torch.as_tensor(np.random.default_rng(1).normal(size=(50, 7)))
    change = ridge_change(
        forget.T @ forget / N_FORGET, forget.T @ wanted / N_FORGET, retain.T @ retain / 50,
        ridge=0.0, null_space=1.0, damping=0.0,
    )  # fmt: skip
    assert float((retain @ change).abs().max()) < 1e-10
    expected = np.linalg.lstsq(problem[0][:, 7:], problem[1], rcond=None)[0]
    np.testing.assert_allclose(change[7:].numpy(), expected, atol=1e-8)


def test_keys_without_full_rank_work(problem):
    forget, wanted, _ = map(torch.as_tensor, problem)
    thin = forget.clone()
    thin[:, 4:] = 0
    change = ridge_change(
        thin.T @ thin / N_FORGET, thin.T @ wanted / N_FORGET, 0 * torch.eye(WIDTH).double()
    )
    assert bool(torch.isfinite(change).all())
    expected = np.linalg.lstsq(problem[0][:, :4], problem[1], rcond=None)[0]
    np.testing.assert_allclose(change[:4].numpy(), expected, rtol=0.02, atol=1e-4)  # damping


@pytest.mark.parametrize("name", ["ridge", "damping"])
@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_weights_must_be_finite_and_not_negative(problem, name, value):
    with pytest.raises(ValueError, match=f"{name}=.* must be finite and not negative"):
        ridge_change(*grams(problem), **{name: value})


def test_passes_are_counted_from_one(problem):
    with pytest.raises(ValueError, match="n_passes=0 must be at least 1"):
        ridge_change(*grams(problem), n_passes=0)


@pytest.mark.parametrize("energy", [0.0, -0.5, 1.5])
def test_an_energy_share_is_a_share(problem, energy):
    with pytest.raises(ValueError, match="is a share of energy"):
        ridge_change(*grams(problem), null_space=energy)


def test_retain_keys_in_every_direction_leave_no_null_space(problem):
    with pytest.raises(ValueError, match="protects all 12 directions"):
        ridge_change(*grams(problem), null_space=1.0)


def test_keys_that_are_zero_are_refused():
    zero = torch.zeros(3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="the keys are zero in every direction"):
        ridge_change(zero, zero, zero)
