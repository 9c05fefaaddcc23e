"""Optimal transport between clouds: entropic plans, and couplings of clouds by their distances."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from manifold_unlearn.arrays import Array, Device, as_rows, generator, restore

__all__ = ["GromovWasserstein", "Sinkhorn", "gromov_wasserstein", "sinkhorn"]

_ABSORB = 1e2  # scaling factors up to e^100 before they move into the potentials
_CHECK_EVERY = 10
_LEVELS = 64  # quantiles that describe a row's distances
_INNER = 5  # updates of the factors in a proximal step
_LEAST = 1e-100  # mass below which a pair stays in the kernel, so that no row is left without
_START_TOL = 1e-6  # of the marginals of a start
_FINAL_TOL = 1e-10  # of the marginals of a result
_EXACT = 1e-20  # relative loss at which there is nothing to gain from another start


class Sinkhorn(NamedTuple):
    """An entropic transport plan.

    Attributes
    ----------
    plan : array of shape (n_A, n_B)
        ``exp((f_i + g_j - cost_ij) / epsilon)``; its rows sum to ``a``, its columns to ``b``.
    potentials : tuple of arrays of shape (n_A,) and (n_B,)
        ``f`` and ``g``, in units of the cost.
    error : float
        Sum of absolute deviations of the row sums from ``a``; the columns are exact.
    """

    plan: Any
    potentials: tuple[Any, Any]
    error: float


class GromovWasserstein(NamedTuple):
    """A coupling of two clouds that distorts their distances least, as far as was found.

    Attributes
    ----------
    distance : float
        ``sqrt(sum_ijkl (|A_i - A_k| - |B_j - B_l|)**2 T_ij T_kl)``, in units of the data.
    coupling : array of shape (n_rows_A, n_rows_B)
        ``T``, whose rows sum to ``1 / n_rows_A`` and columns to ``1 / n_rows_B``.
    rows_A, rows_B : int64 arrays
        Which rows of the data the coupling is about; all of them unless there were more than
        ``n_landmarks``.
    """

    distance: float
    coupling: Any
    rows_A: Any
    rows_B: Any


def sinkhorn(
    cost: Array,
    a: Array | None = None,
    b: Array | None = None,
    *,
    epsilon: float,
    max_iter: int = 10_000,
    tol: float = 1e-9,
) -> Sinkhorn:
    """Transport plan that minimizes ``<plan, cost> + epsilon * sum(plan * (log(plan) - 1))``.

    Sinkhorn's iteration on scaling factors that are absorbed into logarithmic potentials before
    they grow too large, so that a small ``epsilon`` neither overflows nor divides by zero.

    Parameters
    ----------
    cost : array or Tensor of shape (n_A, n_B)
    a, b : array or Tensor of shape (n_A,) and (n_B,), optional
        Positive masses of equal sum. Default: uniform, of sum 1.
    epsilon : float
        Strength of the entropy, in units of the cost. Smaller is sharper and slower.
    max_iter : int
        Updates of both factors.
    tol : float
        Error of the row sums at which to stop.

    Raises
    ------
    ValueError
        ``epsilon`` is not positive, or masses that are not positive, of another length, or of
        unequal sums.

    Warns
    -----
    UserWarning
        ``tol`` was not reached.

    References
    ----------
    Cuturi (2013), Sinkhorn distances, NeurIPS.
    Schmitzer (2019), Stabilized sparse scaling algorithms for entropy regularized transport
    problems, SIAM J. Sci. Comput. 41.
    """
    C = as_rows(cost, device="auto" if isinstance(cost, Tensor) else "cpu", name="cost").double()
    masses_a, masses_b = _masses(a, C, 0, "a"), _masses(b, C, 1, "b")
    if abs(float(masses_a.sum() - masses_b.sum())) > 1e-8 * float(masses_a.sum()):
        raise ValueError(
            f"a sums to {float(masses_a.sum()):.6g}, b to {float(masses_b.sum()):.6g}. "
            "Scale them to one sum."
        )
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon={epsilon} must be positive and finite.")
    found = _scaled(C, masses_a, masses_b, epsilon, max_iter, tol, torch.zeros_like(masses_b))
    if found.error > tol:
        warnings.warn(
            f"sinkhorn stopped after max_iter={max_iter} at error {found.error:.2g}, above "
            f"tol={tol:.2g}. Raise max_iter or epsilon.",
            UserWarning,
            stacklevel=2,
        )
    f, g = found.potentials
    return Sinkhorn(restore(found.plan, cost), (restore(f, cost), restore(g, cost)), found.error)


def _masses(masses: Array | None, cost: Tensor, axis: int, name: str) -> Tensor:
    length = cost.shape[axis]
    if masses is None:
        return cost.new_full((length,), 1 / length)
    found = torch.as_tensor(masses).to(cost)
    if found.shape != (length,) or not bool((torch.isfinite(found) & (found > 0)).all()):
        raise ValueError(
            f"{name} has shape {tuple(found.shape)}; ({length},) positive masses are needed. "
            "Leave out rows without mass."
        )
    return found


def _scaled(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: float, max_iter: int, tol: float, g: Tensor
) -> Sinkhorn:
    """The plan, from the start ``g`` of the second potential."""
    log_a, log_b = a.log(), b.log()
    error, done = math.inf, 0
    while True:
        f = epsilon * (log_a - torch.logsumexp((g - cost) / epsilon, dim=1))
        g = epsilon * (log_b - torch.logsumexp((f[:, None] - cost) / epsilon, dim=0))
        kernel = torch.exp((f[:, None] + g - cost) / epsilon)
        done += 1
        error = float((kernel.sum(1) - a).abs().sum())
        if error <= tol or done >= max_iter:
            return Sinkhorn(kernel, (f, g), error)
        v = torch.ones_like(b)
        while done < max_iter and error > tol:
            steps = min(_CHECK_EVERY, max_iter - done)
            u, following = _updated(kernel, a, b, v, steps)
            done += steps
            size = float(torch.maximum(u.log().abs().max(), following.log().abs().max()))
            if math.isfinite(size):
                v = following
            if not size < _ABSORB:  # back to the logarithms
                break
            error = float((u * (kernel @ v) - a).abs().sum())
        g = g + epsilon * v.log()


def _updated(kernel: Tensor, a: Tensor, b: Tensor, v: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Factors ``u`` and ``v`` after updates of both."""
    u = a / (kernel @ v)
    v = b / (kernel.T @ u)
    for _ in range(steps - 1):
        u = a / (kernel @ v)
        v = b / (kernel.T @ u)
    return u, v


def gromov_wasserstein(
    A: Array,
    B: Array,
    *,
    distances: Literal["euclidean", "precomputed"] = "euclidean",
    solver: Literal["proximal", "entropic"] = "proximal",
    epsilon: float = 0.02,
    n_landmarks: int | None = 512,
    n_starts: int = 3,
    max_iter: int = 100,
    tol: float = 1e-7,
    device: Device = "auto",
    random_state: Any = 0,
) -> GromovWasserstein:
    """Gromov-Wasserstein distance and coupling of two clouds that need share no space.

    Square loss, uniform masses; a step costs ``O(n_A**2 n_B + n_A n_B**2)`` by the factorization
    of Peyré, Cuturi and Solomon. The problem is not convex: one start is the coupling of rows whose
    distances to all others are distributed alike (Mémoli's third lower bound), others are near the
    product of the masses, and the best result is returned. It is an upper bound.

    Parameters
    ----------
    A, B : array or Tensor of shape (n_A, d_A) and (n_B, d_B)
        Points, or square matrices of distances.
    distances : {"euclidean", "precomputed"}, default="euclidean"
        ``"precomputed"``: ``A`` and ``B`` are symmetric (n_A, n_A) and (n_B, n_B) distances of any
        kind, such as geodesic ones.
    solver : {"proximal", "entropic"}, default="proximal"
        ``"proximal"``: every step is pulled to the coupling before it, and the entropy is gone in
        the limit; for as many rows on both sides steps along permutations follow, to a local
        minimum. ``"entropic"``: the entropy stays, the coupling is soft, the distance too large.
    epsilon : float, default=0.02
        Strength of the entropy, as a part of the mean squared distance within the clouds.
    n_landmarks : int or None, default=512
        Random rows used of a cloud that has more; None: all. Both clouds are cut to one size.
        Memory is ``O(n_landmarks**2)``.
    n_starts : int, default=3
        Starts, unless one of them finds a copy.
    max_iter : int
        Steps from each start.
    tol : float
        Total change of the coupling in a step at which to stop.
    device : str or torch.device, default="auto"
    random_state : int or generator, default=0
        Draws the landmarks and the starts.

    Raises
    ------
    ValueError
        Fewer than 2 rows, distances that are not square, symmetric and non-negative, or a
        parameter out of range.

    References
    ----------
    Mémoli (2011), Gromov-Wasserstein distances and the metric approach to object matching, Found.
    Comput. Math. 11.
    Peyré, Cuturi and Solomon (2016), Gromov-Wasserstein averaging of kernel and distance matrices,
    ICML, proposition 1.
    Xu, Luo, Zha and Carin (2019), Gromov-Wasserstein learning for graph matching, ICML (the
    proximal step).
    Maron and Lipman (2018), (Probably) concave graph matching, NeurIPS (why the steps along
    permutations end at one).
    """
    if solver not in ("proximal", "entropic"):
        raise ValueError(f"solver={solver!r} is not known. Use 'proximal' or 'entropic'.")
    if distances not in ("euclidean", "precomputed"):
        raise ValueError(f"distances={distances!r} is not known. Use 'euclidean' or 'precomputed'.")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon={epsilon} must be positive and finite.")
    if n_starts < 1:
        raise ValueError(f"n_starts={n_starts} must be at least 1.")
    if n_landmarks is not None and n_landmarks < 2:
        raise ValueError(f"n_landmarks={n_landmarks} must be at least 2, or None.")
    draw = generator(random_state)
    points_A = as_rows(A, device=device, name="A", min_samples=2)
    points_B = as_rows(B, device=points_A.device, name="B", min_samples=2)
    rows_A, rows_B = _landmark_rows(points_A, points_B, n_landmarks, draw)
    C_A = _distances(points_A, rows_A, distances, "A")
    C_B = _distances(points_B, rows_B, distances, "B")
    squared_unit = float((C_A.square().mean() + C_B.square().mean()) / 2)
    if squared_unit == 0:  # both clouds are one point each
        plan = C_A.new_full((len(C_A), len(C_B)), 1 / (len(C_A) * len(C_B)))
        return GromovWasserstein(0.0, restore(plan, A), restore(rows_A, A), restore(rows_B, A))
    problem = _Problem(C_A / squared_unit**0.5, C_B / squared_unit**0.5)
    plan, loss = C_A.new_empty(0), math.inf
    starts = (problem.start(number, draw) for number in range(n_starts))
    for candidate in _candidates(problem, starts, solver, epsilon, max_iter, tol):
        if (found := problem.loss(candidate)) < loss:
            plan, loss = candidate, found
        if loss <= _EXACT:
            break
    distance = (loss * squared_unit) ** 0.5
    return GromovWasserstein(distance, restore(plan, A), restore(rows_A, A), restore(rows_B, A))


def _landmark_rows(
    A: Tensor, B: Tensor, n_landmarks: int | None, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ascending rows; two clouds that are both too large are cut to one size."""
    chosen = []
    for X in (A, B):
        if n_landmarks is None or len(X) <= n_landmarks:
            rows = torch.arange(len(X))
        else:
            rows = torch.randperm(len(X), generator=draw)[:n_landmarks].sort().values
        chosen.append(rows.to(A.device))
    return chosen[0], chosen[1]


def _distances(X: Tensor, rows: Tensor, kind: str, name: str) -> Tensor:
    if kind == "euclidean":
        points = X[rows].double()
        return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    if X.shape[0] != X.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(X.shape)}; precomputed distances are square. "
            "Use distances='euclidean' for points."
        )
    C = X[rows][:, rows].double()
    scale = float(C.abs().max())
    if bool((C < 0).any()) or float((C - C.T).abs().max()) > 1e-5 * scale:
        raise ValueError(f"the distances {name} must be symmetric and not negative.")
    return C


class _Problem:
    """The square loss between two matrices of distances under uniform masses."""

    def __init__(self, C_A: Tensor, C_B: Tensor) -> None:
        self.C_A, self.C_B = C_A, C_B
        self.a = C_A.new_full((len(C_A),), 1 / len(C_A))
        self.b = C_B.new_full((len(C_B),), 1 / len(C_B))
        self.squares = C_A.square().mean(1)[:, None] + C_B.square().mean(1)[None, :]

    def cost(self, plan: Tensor) -> Tensor:
        """``sum_kl (C_A_ik - C_B_jl)**2 plan_kl`` for a plan of the right marginals."""
        return self.squares - 2 * (self.C_A @ plan @ self.C_B)

    def loss(self, plan: Tensor) -> float:
        """The objective from differences, exact where it is small."""
        support = plan.nonzero()
        if len(support) <= 2 * max(plan.shape):
            i, j = support.T
            mass = plan[i, j]
            gaps = (self.C_A[i][:, i] - self.C_B[j][:, j]).square_()
            return float(mass @ gaps @ mass)
        return max(float((self.cost(plan) * plan).sum()), 0.0)

    def start(self, number: int, draw: torch.Generator) -> Tensor:
        """The first start, or one of the others: the product, out of its symmetry."""
        if number == 0:
            return self.alike()
        noise = torch.rand(len(self.a), len(self.b), generator=draw, dtype=torch.float64)
        plan = (0.5 + noise.to(self.a.device)) * (self.a[:, None] * self.b)
        return _rounded(plan, self.a, self.b)

    def alike(self) -> Tensor:
        """Coupling of rows by the distribution of their distances to all others."""
        levels = (torch.arange(_LEVELS).to(self.C_A) + 0.5) / _LEVELS
        first, second = (torch.quantile(C, levels, dim=1).T for C in (self.C_A, self.C_B))
        cost = torch.cdist(first, second).square() / _LEVELS
        mean = float(cost.mean())
        if mean <= 1e-12:
            return self.a[:, None] * self.b
        plan = _scaled(
            cost, self.a, self.b, 0.02 * mean, 500, _START_TOL, torch.zeros_like(self.b)
        ).plan
        return _rounded(plan, self.a, self.b)


def _candidates(
    problem: _Problem,
    starts: Iterable[Tensor],
    solver: str,
    epsilon: float,
    max_iter: int,
    tol: float,
) -> Iterator[Tensor]:
    """Stationary couplings from the starts."""
    permutations = solver == "proximal" and len(problem.a) == len(problem.b)
    for start in starts:
        if permutations:
            yield _along_permutations(problem, start)
        if solver == "entropic":
            yield _entropic(problem, start, epsilon, max_iter, tol)
        else:
            plan = _proximal(problem, start, epsilon, max_iter, tol)
            yield _along_permutations(problem, plan) if permutations else plan


def _proximal(problem: _Problem, plan: Tensor, epsilon: float, max_iter: int, tol: float) -> Tensor:
    """A stationary coupling from the start ``plan``; the entropy is to the coupling before."""
    a, b = problem.a, problem.b
    square = len(a) == len(b)  # steps along permutations follow: no need of exact marginals
    for _ in range(max_iter if square else 2 * max_iter):
        gradient = 2 * problem.cost(plan)
        gradient -= gradient.amin(1, keepdim=True)
        gradient -= gradient.amin(0, keepdim=True)
        kernel = plan.clamp_min(_LEAST) * torch.exp(gradient.div_(-epsilon))
        u, v = _updated(kernel, a, b, torch.ones_like(b), _INNER if square else 10 * _INNER)
        kernel *= u[:, None] * v
        change = float((kernel - plan).abs().sum())
        plan = kernel
        if change <= tol:
            break
    if not square:
        cost = -plan.clamp_min(_LEAST).log()
        plan = _scaled(cost, a, b, 1.0, 1000, _FINAL_TOL, torch.zeros_like(b)).plan
    return _rounded(plan, a, b)


def _rounded(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A plan of marginals ``a`` and ``b`` near one that nearly has them.

    Altschuler, Weed and Rigollet (2017), Near-linear time approximation algorithms for optimal
    transport via Sinkhorn iteration, NeurIPS, algorithm 2.
    """
    plan = plan * (a / plan.sum(1)).clamp_max(1)[:, None]
    plan = plan * (b / plan.sum(0)).clamp_max(1)
    rest_a, rest_b = (a - plan.sum(1)).clamp_min(0), (b - plan.sum(0)).clamp_min(0)
    missing = float(rest_a.sum())
    return plan + rest_a[:, None] * rest_b / missing if missing > 0 else plan


def _entropic(problem: _Problem, plan: Tensor, epsilon: float, max_iter: int, tol: float) -> Tensor:
    """The coupling that is the entropic plan of its own gradient, from the start ``plan``."""
    a, b = problem.a, problem.b
    g = torch.zeros_like(b)
    for _ in range(max_iter):
        step = _scaled(2 * problem.cost(plan), a, b, epsilon, 1000, _FINAL_TOL, g)
        g = step.potentials[1]
        change = float((step.plan - plan).abs().sum())
        plan = step.plan
        if change <= tol:
            break
    return plan


def _along_permutations(problem: _Problem, plan: Tensor) -> Tensor:
    """Frank-Wolfe steps with exact line search; every vertex is a permutation over n."""
    n = len(plan)
    for _ in range(50):
        cost = problem.cost(plan)
        rows, columns = linear_sum_assignment(cost.cpu().numpy())
        vertex = torch.zeros_like(plan)
        vertex[torch.as_tensor(rows), torch.as_tensor(columns)] = 1 / n
        direction = vertex - plan
        slope = 2 * float((cost * direction).sum())
        if slope >= -1e-12:
            break
        curvature = -2 * float(((problem.C_A @ direction @ problem.C_B) * direction).sum())
        length = 1.0 if curvature <= 0 else min(1.0, -slope / (2 * curvature))
        plan = vertex if length == 1 else plan + length * direction
    return plan
