"""From the tensors of a file to a coder: names, shapes, values, dtype, and where it belongs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.cross_layer import CrossLayerTranscoder
from manifold_unlearn.dictionary.formats.errors import DictionaryFormatError
from manifold_unlearn.dictionary.formats.files import plain

C = TypeVar("C", bound=SparseCoder | CrossLayerTranscoder)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def named(path: Path, tensors: Mapping[str, Any], *names: str) -> list[Tensor]:
    """Tensors of these names, in that order.

    Raises
    ------
    DictionaryFormatError
        One is missing, or is no tensor.
    """
    missing = [name for name in names if not isinstance(tensors.get(name), Tensor)]
    if missing:
        raise DictionaryFormatError(
            f"{path} has no tensor {', '.join(missing)}; it holds {_listed(tensors)}. Fetch it "
            "again, or give format= if it is of another."
        )
    return [tensors[name] for name in names]


def _listed(tensors: Mapping[str, Any]) -> str:
    names = [str(name) for name in tensors][:12]
    return ", ".join(names) + (", ..." if len(tensors) > 12 else "") or "nothing"


def width(path: Path, name: str, value: Tensor, n_axes: int = 2) -> tuple[int, ...]:
    """Shape of a tensor that must have ``n_axes`` axes, none of them empty."""
    if value.ndim != n_axes or 0 in value.shape:
        raise DictionaryFormatError(
            f"{path}: {name} has shape {tuple(value.shape)}; it needs {n_axes} axes, none empty."
        )
    return tuple(value.shape)


def whole_number(path: Path, name: str, value: Any) -> int:
    """A positive whole number that a file says, from a number or a tensor of one."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        raise DictionaryFormatError(f"{path}: {name}={plain(value)!r} is not a whole number.")
    if value < 1:
        raise DictionaryFormatError(f"{path}: {name}={value} must be at least 1.")
    return int(value)


def number(path: Path, name: str, value: Any) -> float:
    """A finite positive number that a file says, from a number or a tensor of one."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise DictionaryFormatError(f"{path}: {name}={plain(value)!r} is not a positive number.")
    return float(value)


def common_dtype(path: Path, tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The narrowest dtype that holds every matrix and vector; scalars follow."""
    found: torch.dtype | None = None
    for name, value in tensors.items():
        if value.dtype not in _DTYPES:
            raise DictionaryFormatError(
                f"{path}: {name} has dtype {value.dtype}; weights are float16, bfloat16, float32 "
                "or float64."
            )
        if value.ndim:
            found = value.dtype if found is None else torch.promote_types(found, value.dtype)
    return found or torch.float32


def assembled(path: Path, make: Callable[[], C], tensors: Mapping[str, Tensor]) -> C:
    """Coder with these weights, in evaluation mode.

    Parameters
    ----------
    path : Path
        Named in errors.
    make : callable
        Makes the coder; its weights are not drawn.
    tensors : mapping
        Its ``state_dict``; ``b_in`` may be among them.

    Raises
    ------
    DictionaryFormatError
        A tensor is missing, has another shape, or is not finite.
    """
    with torch.device("meta"):
        coder: C = make()
        if isinstance(coder, SparseCoder) and "b_in" in tensors:
            coder.b_in = nn.Parameter(torch.zeros(coder.d_in))
    expected = coder.state_dict()
    if expected.keys() != tensors.keys():
        odd = sorted(expected.keys() ^ tensors.keys())
        raise DictionaryFormatError(f"{path}: {', '.join(odd)} missing or of no use.")
    dtype = common_dtype(
        path, {k: v for k, v in tensors.items() if expected[k].is_floating_point()}
    )
    own = {}
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            raise DictionaryFormatError(
                f"{path}: {name} has shape {tuple(value.shape)}; the others ask for "
                f"{tuple(expected[name].shape)}. The file is damaged or of another format."
            )
        if not value.isfinite().all():
            n = int((~value.isfinite()).sum())
            raise DictionaryFormatError(
                f"{path}: {n} of {value.numel()} values of {name} are not finite; fetch it again."
            )
        kind = dtype if expected[name].is_floating_point() else expected[name].dtype
        own[name] = value.detach().to(kind).clone(memory_format=torch.contiguous_format)
    coder.load_state_dict(own, assign=True)
    coder.eval()
    return coder


def scaled(value: Tensor, factor: float | Tensor) -> Tensor:
    """Product, in float32 at least, so that folding a factor in costs no precision."""
    dtype = value.dtype if value.dtype == torch.float64 else torch.float32
    return value.to(dtype) * factor


def origin(
    format: str,  # noqa: A002 - the name it has in load
    config: Any = None,
    *,
    model: Any = None,
    **sites: Any,
) -> dict[str, Any]:
    """Where a dictionary belongs, with ``site`` or ``site_in`` and ``site_out``; JSON."""
    known = {name: value for name, value in sites.items() if value is not None}
    found = {"format": format, **known, "config": plain(config or {})}
    return found if model is None else {**found, "model": str(model)}
