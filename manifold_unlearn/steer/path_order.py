"""In which order, and how far apart, the centroids of a feature lie along its curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

Plane: TypeAlias = Literal["centroids", "coordinates"]
Spacing: TypeAlias = Literal["angle", "chord", "uniform"]

_TOGETHER = 1e-9  # distance along the parameter under which two centroids are one


class Layout(NamedTuple):
    """Order of the centroids along a curve, and their positions.

    Attributes
    ----------
    order : Tensor of shape (n_classes,), int64
    parameter : Tensor of shape (n_classes,), float64
        Increasing.
    """

    order: Tensor
    parameter: Tensor

    def to(self, device: torch.device) -> Layout:
        """The layout on another device."""
        return Layout(self.order.to(device), self.parameter.to(device))


def distinct_labels(labels: Any, n_samples: int) -> tuple[list[Any], np.ndarray]:
    """Distinct labels, and the number (n_samples,) of each row's.

    Numbers ascend, other labels stand as they first appear.

    Raises
    ------
    ValueError
        Another length than the rows, more than one dimension, or a label that is NaN.
    """
    found = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    if found.shape != (n_samples,):
        raise ValueError(
            f"labels has shape {found.shape}; expected ({n_samples},), one for each row."
        )
    if (nan := found != found).any():
        raise ValueError(f"labels holds NaN in row {int(nan.argmax())}. Remove it.")
    if found.dtype.kind in "iufb":
        names, member = np.unique(found, return_inverse=True)
        return names.tolist(), member
    plain = [label.item() if isinstance(label, np.generic) else label for label in found.tolist()]
    number: dict[Any, int] = {}
    member = np.array([number.setdefault(label, len(number)) for label in plain])
    return list(number), member


def in_given_order(order: Sequence[Any], names: list[Any]) -> Tensor:
    """Numbers of the labels ``names`` in ``order``.

    Raises
    ------
    ValueError
        ``order`` leaves a label out, repeats one, or holds another.
    """
    wanted = order.tolist() if isinstance(order, np.ndarray | Tensor) else list(order)
    missing = [name for name in names if name not in wanted]
    foreign = [name for name in wanted if name not in names]
    if missing or foreign or len(wanted) != len(names):
        raise ValueError(
            f"order must hold every label once: it lacks {missing}, has {foreign} that no row "
            f"has, and {len(wanted)} entries for {len(names)} labels."
        )
    return torch.tensor([names.index(name) for name in wanted])


def layout_of(
    along: Tensor,
    names: list[Any],
    *,
    periodic: bool,
    order: Sequence[Any] | None,
    spacing: Spacing | None,
    plane: Tensor,
    by_first: bool,
) -> Layout:
    """Order and positions of the centroids from their coordinates.

    Parameters
    ----------
    along : Tensor of shape (n_classes, k)
        Coordinates of the centroids, in the order of ``names``.
    names : list
        Labels.
    plane : Tensor of shape (n_classes, 2)
        Coordinates whose angle counts.
    periodic, order, spacing
        See :class:`~manifold_unlearn.steer.spline.CentroidSpline`.
    by_first : bool
        Whether the first coordinate decides the order of an open curve where none is given.

    Raises
    ------
    ValueError
        ``order`` is not of these labels, or centroids fall together.
    """
    given = None if order is None else in_given_order(order, names)
    if (periodic and given is None) or spacing == "angle":
        layout = angular_layout(plane, given, names)
        if spacing in (None, "angle"):
            return layout.to(along.device)
        given = layout.order
    if given is None and by_first:
        given = along[:, 0].argsort()
        first = int((given == 0).nonzero())
        given = given.flip(0) if 2 * first >= len(names) else given
    if given is None:
        given = torch.arange(len(names))
    layout = chordal_layout(along, given, periodic=periodic, uniform=spacing == "uniform")
    check_layout(layout, names)
    return layout.to(along.device)


def layout_at(
    positions: np.ndarray, member: np.ndarray, names: list[Any], *, periodic: bool
) -> Layout:
    """Layout by given ``positions`` (n_classes,) of the classes numbered ``member``.

    Raises
    ------
    ValueError
        Not one finite position for each class, or two that are equal.
    """
    if positions.shape != member.shape or not np.isfinite(positions).all():
        raise ValueError(
            f"parameter has {len(positions)} entries for {len(member)} centroids; give one finite "
            "position for each."
        )
    at = positions[member.argsort()]
    at = torch.from_numpy(at % 1 if periodic else at)
    order = at.argsort()
    layout = Layout(order, at[order])
    check_layout(layout, names)
    return layout


def angular_layout(plane: Tensor, given: Tensor | None, names: list[Any]) -> Layout:
    """Positions by the angle, over a turn, in two coordinates centered and of unit variance.

    Parameters
    ----------
    plane : Tensor of shape (n_classes, 2)
    given : Tensor of shape (n_classes,), int64, optional
        Order to keep to. Default: by the angle from the first class, in the direction in
        which the second comes sooner.
    names : list
        Labels, for the messages.

    Raises
    ------
    ValueError
        The centroids do not spread in both coordinates, two of them have one angle, or the angles
        do not follow the order given.
    """
    flat = plane - plane.mean(0)
    spread = flat.square().mean(0).sqrt()
    if plane.shape[1] < 2 or float(spread.min()) <= 1e-9 * max(float(plane.abs().max()), 1e-300):
        raise ValueError(
            "the centroids do not spread in both coordinates of the plane: there is no angle. "
            "Choose another plane, or give order and spacing='chord'."
        )
    angle = torch.atan2(flat[:, 1] / spread[1], flat[:, 0] / spread[0]) / (2 * math.pi)
    if given is None:
        position = (angle - angle[0]) % 1
        position = -position % 1 if float(position[1]) > 0.5 else position
        order = position.argsort()
        layout = Layout(order, position[order])
    else:
        given = given.to(plane.device)
        position = (angle[given] - angle[given[0]]) % 1
        if not bool((position[1:] > position[:-1]).all()):
            position = (-position) % 1
        if not bool((position[1:] > position[:-1]).all()):
            raise ValueError(
                "the angles do not follow the order given. Use spacing='chord', or leave order out."
            )
        layout = Layout(given, position)
    check_layout(layout, names)
    return layout


def chordal_layout(along: Tensor, order: Tensor, *, periodic: bool, uniform: bool) -> Layout:
    """Positions in [0, 1] by the distances of successive centroids.

    Parameters
    ----------
    along : Tensor of shape (n_classes, k)
    order : Tensor of shape (n_classes,), int64
    periodic : bool
        Whether the way from the last to the first counts.
    uniform : bool
        Whether the steps count as equal.
    """
    order = order.to(along.device)
    points = along[order]
    after = points.roll(-1, 0) if periodic else points[1:]
    steps = (after - points[: len(after)]).norm(dim=1)
    if uniform:
        steps = torch.ones_like(steps)
    reached = torch.cat([steps.new_zeros(1), steps.cumsum(0)]) / steps.sum().clamp_min(1e-300)
    reached[-1] = 1.0  # to the bit, where rounding has left it beside
    return Layout(order, reached[: len(order)])


def check_layout(layout: Layout, names: list[Any]) -> None:
    """Raise ``ValueError`` if two centroids lie at one position."""
    gaps = layout.parameter[1:] - layout.parameter[:-1]
    if bool((gaps > _TOGETHER).all()):
        return
    at = int((gaps <= _TOGETHER).nonzero()[0])
    one, other = (names[int(layout.order[i])] for i in (at, at + 1))
    raise ValueError(
        f"the centroids of {one!r} and {other!r} fall together: the curve cannot tell them apart. "
        "Merge the labels, or choose another plane, order or spacing."
    )
