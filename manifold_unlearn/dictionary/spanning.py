"""Which latents span a subspace: greedy choice of decoder directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.arrays import Device, as_rows, generator
from manifold_unlearn.dictionary.coding import checked_latents

_DEPENDENT = 1e-6  # squared part of a unit direction outside the chosen span that is rounding


@dataclass(frozen=True, eq=False)
class SpanningLatents:
    """Latents whose decoder directions span a subspace, and how well.

    Attributes
    ----------
    latents : array of shape (k,), int64
        In the order in which they were chosen.
    captured : array of shape (k,), float64
        Part of the subspace that the span of the first 1, 2, ... holds: mean squared cosine of
        the principal angles, 1 when it is held whole.
    angles : array of shape (rank,), float64
        Principal angles, radians, ascending, between the subspace and the span of all chosen;
        pi / 2 where the span has fewer dimensions.
    coefficients : array of shape (rank, k), float64
        Of each basis vector on the unit decoder directions, least squares.
    random_latents : array of shape (n_controls, k), float64
        ``captured`` of as many latents drawn at random.
    random_subspaces : array of shape (n_controls, k), float64
        ``captured`` of the greedy choice for random subspaces of the same rank: what so many
        latents capture by choice alone.
    rank : int
    """

    latents: np.ndarray
    captured: np.ndarray
    angles: np.ndarray
    coefficients: np.ndarray
    random_latents: np.ndarray
    random_subspaces: np.ndarray
    rank: int

    def enough(self, share: float = 0.9) -> int | None:
        """How many of the latents hold ``share`` of the subspace; None if all do not."""
        held = np.flatnonzero(self.captured >= share)
        return int(held[0]) + 1 if len(held) else None

    def to_json(self) -> dict[str, Any]:
        """All attributes, as plain numbers and lists."""
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in vars(self).items()
        }


def spanning_latents(
    decoder: Any,
    basis: Any,
    n_latents: int,
    *,
    candidates: Any = None,
    n_controls: int = 20,
    device: Device = "auto",
    random_state: Any = 0,
) -> SpanningLatents:
    """Latents that span a subspace, chosen one by one.

    Each step takes the latent that captures most of what is left of the subspace: with ``Q`` an
    orthonormal basis and ``u`` the part of a unit decoder direction outside the span so far,
    ``|Q' u|**2 / |u|**2`` (order-recursive matching pursuit). It is greedy: a better set of the
    same size may exist.

    Parameters
    ----------
    decoder : array or Tensor of shape (d_sae, d)
    basis : array or Tensor of shape (r, d)
        Rows that span the subspace, such as the reading or writing directions of an eraser; they
        need not be orthogonal.
    n_latents : int
        How many to choose; fewer come out where the candidates span no more.
    candidates : sequence of int, optional
        Choose among these alone, such as ``LatentImportance.top(100)``.
    n_controls : int, default=20
    device : str or torch.device, default="auto"
    random_state : int or generator, default=0

    Returns
    -------
    SpanningLatents

    Raises
    ------
    ValueError
        Widths that differ, a basis without length, no candidate with a direction, counts below 1.

    References
    ----------
    Pati, Rezaiifar and Krishnaprasad (1993), Orthogonal matching pursuit.
    Cotter, Adler, Rao and Kreutz-Delgado (1999), Forward sequential algorithms for best basis
    selection (order-recursive matching pursuit).

    Examples
    --------
    >>> import numpy as np
    >>> from manifold_unlearn.dictionary.spanning import spanning_latents
    >>> decoder = np.random.default_rng(0).normal(size=(50, 24))
    >>> found = spanning_latents(decoder, decoder[[3, 8]] @ np.eye(24), 2)
    >>> sorted(found.latents.tolist()), round(float(found.captured[-1]), 6)
    ([3, 8], 1.0)
    """
    rows = as_rows(decoder, device=device, name="decoder").double()
    spanned = as_rows(basis, device=rows.device, name="basis").double()
    if rows.shape[1] != spanned.shape[1]:
        raise ValueError(
            f"basis has {spanned.shape[1]} columns, the decoder {rows.shape[1]}; give the basis as "
            "rows in the space that the dictionary writes to."
        )
    if n_latents < 1 or n_controls < 1:
        raise ValueError(f"n_latents={n_latents} and n_controls={n_controls} must be at least 1.")
    pool = torch.arange(len(rows), device=rows.device)
    if candidates is not None:
        pool = checked_latents(candidates, len(rows)).to(rows.device)
    length = rows[pool].norm(dim=1)
    pool = pool[length > 1e-12 * float(rows.norm(dim=1).amax())]
    if len(pool) == 0:
        raise ValueError("no candidate has a decoder direction of nonzero length.")
    units = rows[pool] / rows[pool].norm(dim=1, keepdim=True)
    Q = _orthonormal(spanned)
    chosen, captured, span = _greedy(units, Q, n_latents)
    k = len(chosen)
    cosines = torch.linalg.svdvals(Q @ span.T).clamp(max=1)
    angles = torch.full((len(Q),), torch.pi / 2, dtype=torch.float64)
    angles[: len(cosines)] = torch.arccos(cosines).cpu()
    random = generator(random_state)
    drawn = [
        _captured(units[torch.randperm(len(units), generator=random)[:k].to(units.device)], Q)
        for _ in range(n_controls)
    ]
    greedy = []
    for _ in range(n_controls):
        other = torch.randn(Q.shape, dtype=torch.float64, generator=random).to(Q.device)
        greedy.append(_padded(_greedy(units, _orthonormal(other), k)[1], k))
    return SpanningLatents(
        latents=pool[chosen].cpu().numpy(),
        captured=captured.cpu().numpy(),
        angles=angles.numpy(),
        coefficients=torch.linalg.lstsq(units[chosen].T, Q.T).solution.T.cpu().numpy(),
        random_latents=torch.stack([_padded(one, k) for one in drawn]).cpu().numpy(),
        random_subspaces=torch.stack(greedy).cpu().numpy(),
        rank=len(Q),
    )


def _orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal basis, as rows, of what the rows span."""
    _, scale, directions = torch.linalg.svd(rows, full_matrices=False)
    if not float(scale[0]) > 0:
        raise ValueError("all rows of basis are 0; a subspace needs a direction.")
    return directions[scale > 1e-10 * scale[0]]


def _greedy(units: Tensor, Q: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices chosen, what they capture so far, and an orthonormal basis of their span."""
    left, size = units.clone(), torch.ones(len(units), dtype=units.dtype, device=units.device)
    chosen: list[int] = []
    span: list[Tensor] = []
    held = [0.0]
    for _ in range(min(k, *units.shape)):
        gain = (left @ Q.T).square().sum(1) / size.clamp_min(_DEPENDENT)
        gain[size <= _DEPENDENT] = -1
        best = int(gain.argmax())
        if float(gain[best]) < 0:
            break
        direction = left[best] / left[best].norm()
        if span:  # what rounding has left of the span
            basis = torch.stack(span)
            direction = direction - (direction @ basis.T) @ basis
            direction = direction / direction.norm()
        chosen.append(best)
        span.append(direction)
        held.append(held[-1] + float((Q @ direction).square().sum()) / len(Q))
        left = left - (left @ direction)[:, None] * direction
        size = left.square().sum(1)
    captured = torch.tensor(held[1:], dtype=torch.float64, device=units.device)
    return torch.tensor(chosen, device=units.device), captured, torch.stack(span)


def _captured(directions: Tensor, Q: Tensor) -> Tensor:
    """What the first 1, 2, ... of the directions capture of a subspace."""
    basis, size = torch.linalg.qr(directions.T)
    kept = size.diagonal().abs() > _DEPENDENT**0.5
    return ((Q @ basis).square().sum(0) * kept).cumsum(0) / len(Q)


def _padded(captured: Tensor, k: int) -> Tensor:
    """To ``k`` entries: with more latents, no less is held."""
    return torch.cat([captured, captured[-1:].expand(k - len(captured))])
