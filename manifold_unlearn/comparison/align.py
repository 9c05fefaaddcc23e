"""Maps from one manifold onto another: by paired rows, by what both share, or by shape alone."""

from __future__ import annotations

import warnings
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from manifold_unlearn.arrays import Array, Device, generator, restore
from manifold_unlearn.comparison.alignment import ManifoldAlignment, Stage
from manifold_unlearn.comparison.alternating import Blend, common_coordinates
from manifold_unlearn.comparison.linear_maps import Affine, Rigid, canonical, fit_of, rigid
from manifold_unlearn.comparison.mmd import all_equal, two_clouds
from manifold_unlearn.comparison.similarity import paired_clouds
from manifold_unlearn.comparison.transport import gromov_wasserstein

__all__ = ["ManifoldAlignment", "align_manifolds"]

Method: TypeAlias = Literal["procrustes", "cca", "alternating_diffusion", "gromov_wasserstein"]

_N_COMMON = 8  # common coordinates of alternating diffusion
_N_DIFFUSED = 2000  # rows it is fitted on
_N_COUPLED = 512  # rows of a side that are coupled


def align_manifolds(
    A: Array,
    B: Array,
    method: Method = "procrustes",
    *,
    n_components: int | None = None,
    scale: bool = True,
    reflection: bool = True,
    regularization: float | Literal["auto"] = "auto",
    n_neighbors: int = 8,
    n_landmarks: int | None = None,
    distances: tuple[Array, Array] | None = None,
    barycentric: bool = False,
    device: Device = "auto",
    random_state: Any = 0,
) -> ManifoldAlignment:
    """Fit a map from the space of A to the space of B.

    Parameters
    ----------
    A, B : array or Tensor of shape (n_A, d_A) and (n_B, d_B)
        For all methods but gromov_wasserstein row i of A belongs to row i of B.
    method : str, default="procrustes"
        ``"procrustes"``: rotation, scale and translation, least squares on the pairs; between
        spaces of different dimension a rotation into the larger one.
        ``"cca"``: regularized canonical correlations; the map is the affine prediction through
        the shared coordinates.
        ``"alternating_diffusion"``: nonlinear coordinates of what both views have in common,
        nuisances of either view gone; the map is the mean of B given them.
        ``"gromov_wasserstein"``: no pairs; rows are coupled so that distances within A fit those
        within B. A cloud with symmetries has more than one such coupling.
    n_components : int or None
        Shared coordinates. None: as many as there are (cca), or 8 (alternating_diffusion).
    scale : bool, default=True
        Whether a rigid map may scale.
    reflection : bool, default=True
        Whether a rigid map between spaces of one dimension may reflect.
    regularization : float or "auto", default="auto"
        Of cca: added to every variance, in units of their mean; ``"auto"``: what predicts the
        other side best by generalized cross-validation.
    n_neighbors : int, default=8
        Of the kernels of alternating_diffusion: small enough that the neighbors share the common
        variable, large enough to average over the rest. Means of B are over 8 times as many.
    n_landmarks : int or None
        Random rows fitted where there are more: None: 2,000 (alternating_diffusion, memory
        ``O(n_landmarks**2)``) or 512 (gromov_wasserstein).
    distances : pair of arrays of shape (n_A, n_A) and (n_B, n_B), optional
        Of gromov_wasserstein: distances within A and within B, such as geodesic ones. Default:
        Euclidean.
    barycentric : bool, default=False
        Of gromov_wasserstein: whether the map is a local mean of the coupled rows, for shapes that
        are bent into each other, and not the rigid map that fits the coupling best.
    device : str or torch.device, default="auto"
    random_state : int or generator, default=0
        Draws landmarks and starts iterations.

    Returns
    -------
    ManifoldAlignment

    Raises
    ------
    ValueError
        Unpaired rows where pairs are needed, too few rows, a constant side, or a parameter out of
        range.

    Warns
    -----
    UserWarning
        ``n_neighbors`` is clamped.

    References
    ----------
    Schönemann (1966), A generalized solution of the orthogonal Procrustes problem, Psychometrika
    31.
    Hotelling (1936), Relations between two sets of variates, Biometrika 28.
    Lederman and Talmon (2018), Learning the geometry of common latent variables using
    alternating-diffusion, Appl. Comput. Harmon. Anal. 44.
    Peyré, Cuturi and Solomon (2016), Gromov-Wasserstein averaging of kernel and distance matrices,
    ICML.

    Examples
    --------
    >>> from manifold_unlearn.manifold import samples
    >>> from manifold_unlearn.comparison.align import align_manifolds
    >>> circle = samples.circle(200, n_features=3, random_state=0).points
    >>> found = align_manifolds(circle, 2 * circle[:, ::-1] + 1)
    >>> round(found.scale, 6), round(found.score, 6)
    (2.0, 1.0)
    """
    if method not in get_args(Method):
        raise ValueError(
            f"method={method!r} is not known. Use one of {', '.join(map(repr, get_args(Method)))}."
        )
    if n_components is not None and n_components < 1:
        raise ValueError(f"n_components={n_components} must be at least 1, or None.")
    if n_landmarks is not None and n_landmarks < 4:
        raise ValueError(f"n_landmarks={n_landmarks} must be at least 4, or None.")
    if method == "gromov_wasserstein":
        if n_neighbors < 1:
            raise ValueError(f"n_neighbors={n_neighbors} must be at least 1.")
        X, Y = two_clouds(A, B, device, min_samples=3, same_space=False)
        return _coupled(
            A, X.double(), Y.double(), distances, scale, reflection, barycentric, n_neighbors,
            n_landmarks or _N_COUPLED, random_state,
        )  # fmt: skip
    X, Y = paired_clouds(A, B, device, min_samples=3)
    X, Y = X.double(), Y.double()
    if method == "procrustes":
        return _procrustes(A, X, Y, scale, reflection)
    if method == "cca":
        return _canonical(A, X, Y, n_components, regularization)
    return _alternating(
        A, X, Y, n_components or _N_COMMON, n_neighbors, n_landmarks or _N_DIFFUSED, random_state
    )


def _rigid_stages(found: Rigid) -> dict[str, tuple[Stage, ...]]:
    stages: dict[str, tuple[Stage, ...]] = {"forward": (found.forward,)}
    if found.backward is not None:
        stages["backward"] = (found.backward,)
    return stages


def _procrustes(
    like: Array, X: Tensor, Y: Tensor, scale: bool, reflection: bool
) -> ManifoldAlignment:
    found = rigid(X, Y, None, scale, reflection)
    fit = fit_of(found.forward(X), Y)
    rows = torch.arange(len(X), device=X.device)
    return ManifoldAlignment(
        "procrustes",
        fit.score,
        fit.residual,
        (X.shape[1], Y.shape[1]),
        restore(rows, like),
        restore(rows, like),
        matrix=restore(found.forward.matrix, like),
        offset=restore(found.forward.offset, like),
        scale=found.scale,
        rows_B=restore(rows, like),
        stages=_rigid_stages(found),
    )


def _canonical(
    like: Array, X: Tensor, Y: Tensor, n_components: int | None, regularization: Any
) -> ManifoldAlignment:
    found = canonical(X, Y, n_components, regularization)
    fit = fit_of(found.forward(X), Y)
    rows = torch.arange(len(X), device=X.device)
    return ManifoldAlignment(
        "cca",
        fit.score,
        fit.residual,
        (X.shape[1], Y.shape[1]),
        restore(rows, like),
        restore(rows, like),
        matrix=restore(found.forward.matrix, like),
        offset=restore(found.forward.offset, like),
        correlations=restore(found.correlations, like),
        rows_B=restore(rows, like),
        stages={
            "forward": (found.forward,),
            "backward": (found.backward,),
            "into_A": (found.into_A,),
            "into_B": (found.into_B,),
        },
    )


def _alternating(
    like: Array,
    X: Tensor,
    Y: Tensor,
    n_components: int,
    n_neighbors: int,
    n_landmarks: int,
    random_state: Any,
) -> ManifoldAlignment:
    draw = generator(random_state)
    rows = torch.arange(len(X))
    if len(X) > n_landmarks:
        rows = torch.randperm(len(X), generator=draw)[:n_landmarks].sort().values
    rows = rows.to(X.device)
    P, Q = paired_clouds(X[rows], Y[rows], X.device)
    if n_components > len(P) - 2:
        raise ValueError(
            f"n_components={n_components} needs at least {n_components + 2} rows; got {len(P)}. "
            "Lower n_components or add rows."
        )
    if n_neighbors < 1:
        raise ValueError(f"n_neighbors={n_neighbors} must be at least 1.")
    if n_neighbors > len(P) - 1:
        warnings.warn(
            f"n_neighbors={n_neighbors} is more than the {len(P) - 1} other rows; {len(P) - 1} "
            "are used. Lower n_neighbors or add rows.",
            UserWarning,
            stacklevel=3,
        )
        n_neighbors = len(P) - 1
    seed = int(torch.randint(2**31 - 1, (), generator=draw))
    found = common_coordinates(P, Q, n_components, n_neighbors, seed)
    weights = torch.diag(found.correlations)
    zero = weights.new_zeros(n_components)
    count = torch.tensor(min(8 * n_neighbors, len(P)))
    weighing = Affine(weights, zero)
    forward = (found.of_first, weighing, Blend(found.first @ weights, Q, count))
    backward = (found.of_second, weighing, Blend(found.second @ weights, P, count))
    fit = fit_of(forward[2](found.first @ weights), Q)
    return ManifoldAlignment(
        "alternating_diffusion",
        fit.score,
        fit.residual,
        (X.shape[1], Y.shape[1]),
        restore(rows, like),
        restore(rows, like),
        correlations=restore(found.correlations, like),
        rows_B=restore(rows, like),
        stages={
            "forward": forward,
            "backward": backward,
            "into_A": (found.of_first,),
            "into_B": (found.of_second,),
        },
    )


def _coupled(
    like: Array,
    X: Tensor,
    Y: Tensor,
    distances: tuple[Array, Array] | None,
    scale: bool,
    reflection: bool,
    barycentric: bool,
    n_neighbors: int,
    n_landmarks: int,
    random_state: Any,
) -> ManifoldAlignment:
    for name, side in (("A", X), ("B", Y)):
        if all_equal(side):
            raise ValueError(
                f"all {len(side)} rows of {name} are equal: there is no shape to couple. "
                "Give data with distinct rows."
            )
    if distances is None:
        found = gromov_wasserstein(
            X, Y, n_landmarks=n_landmarks, device=X.device, random_state=random_state
        )
    else:
        for name, side, given in (("A", X, distances[0]), ("B", Y, distances[1])):
            if given.shape[0] != len(side):
                raise ValueError(
                    f"the distances within {name} have {given.shape[0]} rows, {name} has "
                    f"{len(side)}. Give the distances of the rows of {name}."
                )
        found = gromov_wasserstein(
            *distances,
            distances="precomputed",
            n_landmarks=n_landmarks,
            device=X.device,
            random_state=random_state,
        )
    rows_A = torch.as_tensor(found.rows_A, device=X.device)
    rows_B = torch.as_tensor(found.rows_B, device=X.device)
    coupling = torch.as_tensor(found.coupling, device=X.device).double()
    P, Q = X[rows_A], Y[rows_B]
    means = (coupling / coupling.sum(1, keepdim=True)) @ Q
    fitted = rigid(P, Q, coupling, scale, reflection)
    if barycentric:
        back = (coupling.T / coupling.sum(0)[:, None]) @ P
        near = torch.tensor(min(n_neighbors, X.shape[1] + 1, len(P)))
        far = torch.tensor(min(n_neighbors, Y.shape[1] + 1, len(Q)))
        stages: dict[str, tuple[Stage, ...]] = {
            "forward": (Blend(P, means, near),),
            "backward": (Blend(Q, back, far),),
        }
    else:
        stages = _rigid_stages(fitted)
    fit = fit_of(stages["forward"][0](P), means)
    return ManifoldAlignment(
        "gromov_wasserstein",
        fit.score,
        fit.residual,
        (X.shape[1], Y.shape[1]),
        restore(rows_A, like),
        restore(rows_B[coupling.argmax(1)], like),
        matrix=None if barycentric else restore(fitted.forward.matrix, like),
        offset=None if barycentric else restore(fitted.forward.offset, like),
        scale=None if barycentric else fitted.scale,
        coupling=restore(coupling, like),
        rows_B=restore(rows_B, like),
        distance=found.distance,
        stages=stages,
    )
