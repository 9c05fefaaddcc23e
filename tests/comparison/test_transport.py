import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog

from manifold_unlearn.comparison.transport import gromov_wasserstein, sinkhorn
from manifold_unlearn.manifold import samples

RNG = np.random.default_rng(0)
X = RNG.standard_normal((60, 4))


def distances(points):
    return np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))


def moved_copy(points, seed=0):
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.standard_normal((points.shape[1],) * 2))
    order = rng.permutation(len(points))
    return (points @ rotation + 5)[order], order


def loss(C, D, plan):
    return np.einsum("ijkl,ij,kl", (C[:, None, :, None] - D[None, :, None]) ** 2, plan, plan)


@pytest.mark.parametrize("epsilon", [10.0, 0.1, 1e-3, 1e-4])
def test_the_plan_has_its_marginals_and_its_form(epsilon):
    rng = np.random.default_rng(0)
    cost = rng.uniform(size=(15, 20))
    a, b = rng.dirichlet(np.ones(15)), rng.dirichlet(np.ones(20))
    found = sinkhorn(cost, a, b, epsilon=epsilon, max_iter=100_000)
    np.testing.assert_allclose(found.plan.sum(1), a, atol=1e-8)
    np.testing.assert_allclose(found.plan.sum(0), b, atol=1e-12)
    f, g = found.potentials
    np.testing.assert_allclose(found.plan, np.exp((f[:, None] + g - cost) / epsilon), rtol=1e-6)


def test_little_entropy_gives_the_transport_of_the_linear_program():
    rng = np.random.default_rng(1)
    cost = rng.uniform(size=(8, 11))
    a, b = np.full(8, 1 / 8), np.full(11, 1 / 11)
    rows = np.kron(np.eye(8), np.ones(11))
    columns = np.kron(np.ones(8), np.eye(11))
    exact = linprog(cost.ravel(), A_eq=np.r_[rows, columns], b_eq=np.r_[a, b]).fun
    found = sinkhorn(cost, epsilon=1e-3, max_iter=100_000)
    assert (found.plan * cost).sum() == pytest.approx(exact, abs=2e-3)


def test_costs_far_beyond_the_exponent_do_not_overflow():
    cost = 1e5 * RNG.uniform(size=(10, 10))
    found = sinkhorn(cost, epsilon=10.0, max_iter=20_000, tol=1e-3)
    assert np.isfinite(found.plan).all()
    rows, columns = linear_sum_assignment(cost)
    assert (found.plan[rows, columns] > 0.09).mean() > 0.7


def test_an_iteration_cut_short_warns():
    with pytest.warns(UserWarning, match="stopped after max_iter=5 at error"):
        sinkhorn(RNG.uniform(size=(30, 30)), epsilon=1e-3, max_iter=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, "epsilon=0.0 must be positive"),
        ({"epsilon": 1.0, "a": np.ones(4)}, r"a has shape \(4,\); \(3,\) positive masses"),
        ({"epsilon": 1.0, "b": np.array([1.0, 0.0, 0.0])}, "b has shape .* positive masses"),
        ({"epsilon": 1.0, "a": np.ones(3)}, "a sums to 3, b to 1"),
    ],
)
def test_impossible_plans_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn(np.eye(3), **options)


@pytest.mark.parametrize(
    "points",
    [X, samples.circle(150, random_state=0).points, samples.swiss_roll(150, random_state=0).points],
    ids=["ball", "circle", "roll"],
)
def test_a_rotated_shuffled_copy_is_at_no_distance_and_found(points):
    copy, order = moved_copy(points)
    found = gromov_wasserstein(points, copy)
    assert found.distance == pytest.approx(0, abs=1e-6)
    np.testing.assert_array_equal(found.coupling.argmax(0), order)
    np.testing.assert_allclose(found.coupling.sum(1), 1 / len(points), rtol=1e-12)


def test_a_noisy_copy_is_found_but_for_few_rows():
    copy, order = moved_copy(X)
    noisy = copy + 0.02 * RNG.standard_normal(copy.shape)
    found = gromov_wasserstein(X, noisy)
    assert (found.coupling.argmax(0) == order).mean() > 0.95
    assert 0 < found.distance < 0.1


@pytest.mark.parametrize("n_second", [60, 45])
@pytest.mark.parametrize("solver", ["proximal", "entropic"])
def test_the_distance_is_that_of_the_coupling(solver, n_second):
    other = RNG.standard_normal((n_second, 7))
    found = gromov_wasserstein(X, other, solver=solver, epsilon=0.1)
    truth = loss(distances(X), distances(other), found.coupling)
    assert found.distance == pytest.approx(np.sqrt(truth))
    np.testing.assert_allclose(found.coupling.sum(1), 1 / 60, atol=1e-9)
    np.testing.assert_allclose(found.coupling.sum(0), 1 / n_second, atol=1e-9)


def test_a_circle_is_no_segment_and_no_larger_circle():
    circle = samples.circle(100, random_state=0).points
    segment = np.linspace(0, 3, 100)[:, None]
    assert gromov_wasserstein(circle, segment).distance > 0.3
    ring = np.linspace(0, 2 * np.pi, 100, endpoint=False)
    even = np.c_[np.cos(ring), np.sin(ring)]
    chord = np.sqrt(np.mean(distances(even) ** 2))
    assert gromov_wasserstein(even, 3 * even).distance == pytest.approx(2 * chord)


def test_it_scales_with_the_data_and_is_symmetric():
    other = RNG.standard_normal((60, 3))
    plain = gromov_wasserstein(X, other).distance
    assert gromov_wasserstein(1e6 * X, 1e6 * other).distance == pytest.approx(1e6 * plain)
    assert gromov_wasserstein(other, X).distance == pytest.approx(plain, rel=0.1)


def test_given_distances_unroll_the_roll():
    roll = samples.swiss_roll(120, random_state=0)
    flat = roll.intrinsic_coordinates
    geodesic = roll.geodesic_distances()
    found = gromov_wasserstein(geodesic, distances(flat), distances="precomputed")
    assert found.distance == pytest.approx(0, abs=1e-6)
    assert gromov_wasserstein(roll.points, flat).distance > 5


def test_landmarks_stand_for_the_rest():
    sphere = samples.sphere(1500, random_state=0).points
    found = gromov_wasserstein(sphere, 2 * sphere[:700], n_landmarks=100)
    assert found.coupling.shape == (100, 100)
    assert (np.diff(found.rows_A) > 0).all()
    assert found.rows_B.max() < 700
    truth = np.sqrt(np.mean(distances(sphere[:700]) ** 2))  # 2 r against r
    assert found.distance == pytest.approx(truth, rel=0.05)
    again = gromov_wasserstein(sphere, 2 * sphere[:700], n_landmarks=100)
    np.testing.assert_array_equal(again.coupling, found.coupling)


@pytest.mark.parametrize("epsilon", [0.1, 0.5])
@pytest.mark.parametrize("n_second", [30, 20])
def test_the_entropic_coupling_is_that_of_pot(epsilon, n_second):
    ot = pytest.importorskip("ot")
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((30, 3)), rng.standard_normal((n_second, 2)) + 1
    C, D = distances(first), distances(second)
    unit = (np.mean(C**2) + np.mean(D**2)) / 2
    found = gromov_wasserstein(
        first, second, solver="entropic", epsilon=epsilon, max_iter=2000, tol=1e-12
    )
    p, q = np.full(30, 1 / 30), np.full(n_second, 1 / n_second)
    theirs = ot.gromov.entropic_gromov_wasserstein(
        C / unit**0.5, D / unit**0.5, p, q, "square_loss", epsilon=epsilon, solver="PGD",
        G0=found.coupling, max_iter=2000, tol=1e-12,
    )  # fmt: skip
    np.testing.assert_allclose(found.coupling, theirs, atol=1e-7)


@pytest.mark.parametrize("seed", range(6))
def test_the_distance_is_no_larger_than_that_of_pot(seed):
    ot = pytest.importorskip("ot")
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((80, 3)), rng.standard_normal((80, 5))
    p = np.full(80, 1 / 80)
    squared = ot.gromov.gromov_wasserstein2(distances(first), distances(second), p, p)
    assert gromov_wasserstein(first, second).distance <= np.sqrt(squared) * 1.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tensors_in_tensors_out(dtype):
    points = torch.tensor(X, dtype=dtype)
    copy, order = moved_copy(X)
    found = gromov_wasserstein(points, torch.tensor(copy, dtype=dtype))
    assert found.coupling.dtype == dtype
    assert found.rows_A.dtype == torch.int64
    assert (found.coupling.argmax(0).numpy() == order).all()
    plan = sinkhorn(torch.eye(3, dtype=dtype), epsilon=1.0)
    assert plan.plan.dtype == plan.potentials[0].dtype == dtype


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.repeat(X, 2, axis=0), X),
        (np.r_[X, np.full((1, 4), 1e6)], X),
        (np.ones((20, 3)), X),
        (np.ones((20, 3)), np.zeros((10, 2))),
        (np.outer(np.arange(9.0), np.ones(50)), X),
        (X[:2], X[:3]),
    ],
    ids=["pairs", "outlier", "one point", "two points", "rank one", "few"],
)
def test_degenerate_clouds_give_finite_couplings(first, second):
    found = gromov_wasserstein(first, second)
    assert np.isfinite(found.distance)
    np.testing.assert_allclose(found.coupling.sum(1), 1 / len(first), atol=1e-9)
    np.testing.assert_allclose(found.coupling.sum(0), 1 / len(second), atol=1e-9)


def test_a_point_is_as_far_as_the_size_of_the_cloud():
    found = gromov_wasserstein(np.ones((20, 3)), X)
    assert found.distance == pytest.approx(np.sqrt(np.mean(distances(X) ** 2)))


@pytest.mark.parametrize(
    ("first", "options", "message"),
    [
        (X[:1], {}, "minimum of 2"),
        (X, {"solver": "exact"}, "solver='exact' is not known"),
        (X, {"distances": "cosine"}, "distances='cosine' is not known"),
        (X, {"epsilon": -1}, "epsilon=-1 must be positive"),
        (X, {"n_starts": 0}, "n_starts=0 must be at least 1"),
        (X, {"n_landmarks": 1}, "n_landmarks=1 must be at least 2"),
        (X, {"distances": "precomputed"}, r"A has shape \(60, 4\); precomputed distances are sq"),
        (
            np.arange(9.0).reshape(3, 3),
            {"distances": "precomputed"},
            "distances A must be symmetric and not negative",
        ),
        (np.where(np.eye(60, 4) > 0, np.nan, X), {}, "A contains NaN or infinity"),
    ],
)
def test_impossible_requests_are_refused(first, options, message):
    with pytest.raises(ValueError, match=message):
        gromov_wasserstein(first, X, **options)
