"""The same fitted steering at other strengths, without fitting again."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from manifold_unlearn.activations.capture import Activations
from manifold_unlearn.arrays import as_rows
from manifold_unlearn.intervene.edit import Edit


def checked_strength(strength: float) -> float:
    """``strength`` as a float; raises ``ValueError`` where it is not finite."""
    if not math.isfinite(strength):
        raise ValueError(f"strength={strength!r} must be finite; 0 leaves every row as it is.")
    return float(strength)


def with_strength(edit: Mapping[str, Any], strength: float | Mapping[str, float]) -> Edit:
    """Return the same maps at another strength; the edit given stays as it is.

    Parameters
    ----------
    edit : Edit or mapping of str to map
        Fitted maps with a ``strength``, as those of this room have.
    strength : float or mapping of str to float
        One for all sites, or one a site; sites that are not named keep theirs.

    Raises
    ------
    ValueError
        A map without a strength, a site that the edit does not have, or a strength that is not
        finite.
    """
    wanted = dict(strength) if isinstance(strength, Mapping) else dict.fromkeys(edit, strength)
    if unknown := sorted(wanted.keys() - set(edit)):
        raise ValueError(f"strengths for {unknown}, which the edit does not have: {list(edit)}.")
    for site, value in wanted.items():
        if not math.isfinite(value):
            raise ValueError(f"strength={value!r} at {site!r} is not finite.")
        if not hasattr(edit[site], "strength"):
            raise ValueError(
                f"the map at {site!r} is a {type(edit[site]).__name__}, which has no strength; "
                "sweep steering maps only."
            )
    return Edit({s: _at(m, float(wanted[s])) if s in wanted else m for s, m in edit.items()})


def _at(site_map: Any, strength: float) -> Any:
    if is_dataclass(site_map):
        return replace(site_map, strength=strength)  # type: ignore[type-var]
    other = copy.copy(site_map)
    other.strength = strength
    return other


def sweep_strengths(
    edit: Mapping[str, Any], strengths: Sequence[float], *, relative: bool = False
) -> Iterator[tuple[float, Edit]]:
    """Every strength with the edit at it, in the order given.

    Parameters
    ----------
    edit : Edit or mapping of str to map
        Fitted maps with a ``strength``.
    strengths : sequence of float
    relative : bool, default=False
        Multiples of the strength that each map has, instead of one strength for all: so sites
        keep the proportions that :func:`relative_strengths` gave them.

    Raises
    ------
    ValueError
        As :func:`with_strength`.

    Examples
    --------
    >>> for strength, steered in sweep_strengths(edit, [-2, 0, 2]):  # doctest: +SKIP
    ...     with intervene(model, steered):
    ...         model.generate(**inputs)
    """
    for strength in strengths:
        if relative:
            own = {site: getattr(site_map, "strength", 1.0) for site, site_map in edit.items()}
            yield float(strength), with_strength(edit, {s: strength * own[s] for s in own})
        else:
            yield float(strength), with_strength(edit, strength)


def sweep_rows(site_map: Any, X: Any, strengths: Sequence[float]) -> Tensor:
    """Rows steered at every strength, ``(n_strengths, n_samples, n_features)``.

    Parameters
    ----------
    site_map
        A fitted map of this room.
    X : array or Tensor of shape (n_samples, n_features)
    strengths : sequence of float

    Raises
    ------
    ValueError
        No strengths; a map without one; data that is not finite.
    """
    if len(strengths) == 0:
        raise ValueError("strengths is empty; give at least one.")
    rows = as_rows(X)
    edits = sweep_strengths({"rows": site_map}, strengths)
    return torch.stack([steered["rows"](rows) for _, steered in edits])


def relative_strengths(
    edit: Mapping[str, Any], activations: Activations, fraction: float
) -> dict[str, float]:
    """Strength at each site that moves a typical row by a part of its own length.

    ``fraction * median(norm of the rows) / norm(vector_)``, over the rows that are no attention
    sinks. Blocks write rows of very different lengths: one strength for all sites steers early
    layers hard and late ones not at all.

    Parameters
    ----------
    edit : Edit or mapping of str to map
        Maps with a ``vector_``.
    activations : Activations
        Of ordinary text, at these sites.
    fraction : float

    Returns
    -------
    dict of str to float
        For :func:`with_strength`.

    Raises
    ------
    ValueError
        A site without activations, or a map without a vector.
    """
    found = {}
    for site, site_map in edit.items():
        if site not in activations:
            raise ValueError(f"no activations at {site!r}; captured are {list(activations)}.")
        if not hasattr(site_map, "vector_"):
            raise ValueError(f"the map at {site!r} has no vector_ to scale.")
        norms = torch.linalg.vector_norm(activations[site][~activations.sink].float(), dim=1)
        size = torch.linalg.vector_norm(torch.as_tensor(site_map.vector_).double())
        found[site] = fraction * float(norms.median()) / float(size)
    return found
