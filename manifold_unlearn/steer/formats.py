"""Steering vectors in the files and objects of other programs.

=====================  ============================  ==================================
their name             what it means                 site here
=====================  ============================  ==================================
``direction.N``        added to what block N (from   ``layers.N``, N >= 1
                       0) leaves in the stream
``decoder_block`` N    the same                      ``layers.N``, N >= 0
``self_attn`` N        added to the attention's      ``layers.N.attn``
                       answer in block N
``mlp`` N              added to the MLP's answer     ``layers.N.mlp``
=====================  ============================  ==================================

``layers.N`` is ``hidden_states[N + 1]`` of transformers, but for the last block, where that list
holds the stream after the final norm.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from manifold_unlearn import artifact
from manifold_unlearn.arrays import require_finite
from manifold_unlearn.intervene.edit import Edit
from manifold_unlearn.intervene.maps import is_affine
from manifold_unlearn.steer.vectors import SteeringVector

_ARCHITECTURE = "controlvector"
_DIRECTION = re.compile(r"direction\.(\d+)")
_STORED = re.compile(r"layer_activations\.(\d+)")
_FORMAT = "steering-vectors"

LAYER_TYPES = {
    "decoder_block": "layers.{}",
    "self_attn": "layers.{}.attn",
    "mlp": "layers.{}.mlp",
}
"""Layer types of the package steering-vectors, and the site of layer N here."""


class ControlVectorFile(NamedTuple):
    """What a GGUF control vector holds.

    Attributes
    ----------
    edit : Edit
        A :class:`SteeringVector` of strength 1 a site.
    model_hint : str
        Kind of model it was made for, in the words of who wrote it; ``""`` where none is said.
    """

    edit: Edit
    model_hint: str


class LayerActivations(NamedTuple):
    """The two fields of a ``steering_vectors.SteeringVector``.

    Attributes
    ----------
    layer_activations : dict of int to Tensor (d,)
    layer_type : str
    """

    layer_activations: dict[int, Tensor]
    layer_type: str


def write_control_vector(edit: Mapping[str, Any], path: str | Path, *, model_hint: str) -> None:
    """Write a GGUF control vector, as repeng does and llama.cpp (``--control-vector``) reads.

    ``direction.N``, one-dimensional float32, is what the map at ``layers.N`` adds at its strength.
    Programs add it times a coefficient of theirs, so 1 is the edit as it is.

    Parameters
    ----------
    edit : Edit or mapping of str to map
        Maps that add a constant vector, at sites ``layers.N`` with N >= 1.
    path : path
        Replaced as a whole.
    model_hint : str
        ``model.config.model_type``, as repeng writes it.

    Raises
    ------
    ValueError
        A site that the format has no name for (``layers.0`` is refused by llama.cpp), a map that
        does more than to add a vector, or one that float32 cannot hold.
    ImportError
        Without the package gguf.
    """
    gguf = _gguf()
    directions = {}
    for site, site_map in _some(edit).items():
        layer = _layer(site, "layers.{}")
        if layer is None or layer == 0:
            raise ValueError(
                f"a control vector has no name for the site {site!r}: direction.N is what is added "
                "after block N >= 1. Steer at such sites, or keep the edit with Edit.save."
            )
        directions[layer] = _shift(site_map, site)
    _require_one_width(directions)
    with artifact.replacing(Path(path)) as staged:
        writer = gguf.GGUFWriter(staged, _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", model_hint)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(directions))
        for layer, vector in sorted(directions.items()):
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_control_vector(path: str | Path) -> ControlVectorFile:
    """Read a GGUF control vector of repeng or llama.cpp.

    A tensor ``direction.N`` becomes the map at ``layers.N``, where llama.cpp and repeng apply it.
    (llama.cpp's own generator measures it one block earlier, at ``layers.{N - 1}``.)

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Not a GGUF file or a damaged one, one of another kind, without directions, or with
        directions that are not vectors of one width, not finite or zero.
    ImportError
        Without the package gguf.

    Warns
    -----
    UserWarning
        The file holds other tensors too, which are left out.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a GGUF control vector.")
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(path)
        kind = _text_field(reader, "general.architecture")
        hint = _text_field(reader, f"{_ARCHITECTURE}.model_hint")
        tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, NotImplementedError) as error:
        raise ValueError(f"{path} is not readable as GGUF ({error}); restore it.") from error
    if kind != _ARCHITECTURE:
        raise ValueError(
            f"{path} has general.architecture {kind!r}; a control vector has {_ARCHITECTURE!r}."
        )
    matched = {name: _DIRECTION.fullmatch(name) for name in tensors}
    directions = {
        int(m[1]): torch.from_numpy(np.array(tensors[name], dtype=np.float32))
        for name, m in matched.items()
        if m
    }
    _report_others(path, [name for name, m in matched.items() if not m])
    return ControlVectorFile(_edit(directions, "layers.{}", str(path)), hint)


def to_layer_activations(edit: Mapping[str, Any]) -> LayerActivations:
    """Return the fields of a ``steering_vectors.SteeringVector`` that does what the edit does.

    Raises
    ------
    ValueError
        Sites of several layer types or of none, or a map that does more than to add a vector.

    Examples
    --------
    >>> fields = to_layer_activations(edit)  # doctest: +SKIP
    >>> steering_vectors.SteeringVector(**fields._asdict())  # doctest: +SKIP
    """
    for layer_type, template in LAYER_TYPES.items():
        layers = {site: _layer(site, template) for site in _some(edit)}
        if all(layer is not None for layer in layers.values()):
            shifts = {layers[site]: _shift(edit[site], site) for site in layers}
            return LayerActivations({int(n): shifts[n] for n in sorted(shifts)}, layer_type)  # type: ignore[arg-type,type-var]
    raise ValueError(
        f"the sites {list(edit)} are not all of one layer type; steering-vectors knows "
        f"{', '.join(t.format('N') for t in LAYER_TYPES.values())}."
    )


def from_layer_activations(
    layer_activations: Mapping[int, Any], layer_type: str = "decoder_block"
) -> Edit:
    """Edit that does what a ``steering_vectors.SteeringVector`` of these fields does.

    Parameters
    ----------
    layer_activations : mapping of int to array or Tensor (d,)
    layer_type : {"decoder_block", "self_attn", "mlp"}, default="decoder_block"

    Raises
    ------
    ValueError
        Another layer type, a negative layer, or entries that are not vectors of one width, not
        finite or zero.
    """
    if layer_type not in LAYER_TYPES:
        raise ValueError(
            f"layer_type={layer_type!r} is not one of {', '.join(LAYER_TYPES)}: no site here is "
            "where it adds."
        )
    if below := [n for n in layer_activations if n < 0]:
        raise ValueError(f"layer {below[0]} is counted from the end; name layers from 0.")
    directions = {int(n): torch.as_tensor(v).detach() for n, v in layer_activations.items()}
    return _edit(directions, LAYER_TYPES[layer_type], "layer_activations")


def write_steering_vectors(edit: Mapping[str, Any], path: str | Path) -> None:
    """Write the fields of a ``steering_vectors.SteeringVector`` to one safetensors file.

    The package itself has no file format, and pickles of its objects are not read here. The file
    holds ``layer_activations.N`` (d,) and, in its metadata, ``format`` and ``layer_type``.

    Raises
    ------
    ValueError
        As :func:`to_layer_activations`.
    """
    fields = to_layer_activations(edit)
    tensors = {f"layer_activations.{n}": v for n, v in fields.layer_activations.items()}
    with artifact.replacing(Path(path)) as staged:
        save_file(tensors, staged, {"format": _FORMAT, "layer_type": fields.layer_type})


def read_steering_vectors(path: str | Path) -> Edit:
    """Read the file of :func:`write_steering_vectors`.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        Not a safetensors file, one of another format, or as :func:`from_layer_activations`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a file of write_steering_vectors.")
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not readable as safetensors ({error}). Pickles are not read: where it was "
            "made, write the object's fields with write_steering_vectors."
        ) from error
    if said.get("format") != _FORMAT:
        raise ValueError(f"{path} says format {said.get('format')!r}; expected {_FORMAT!r}.")
    matched = {name: _STORED.fullmatch(name) for name in tensors}
    _report_others(path, [name for name, m in matched.items() if not m])
    found = {int(m[1]): tensors[name] for name, m in matched.items() if m}
    return from_layer_activations(found, said.get("layer_type", "decoder_block"))


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "GGUF control vectors need the package gguf: pip install 'manifold-unlearn[gguf]'"
        ) from error
    return gguf


def _text_field(reader: Any, name: str) -> str:
    field = reader.get_field(name)
    return "" if field is None else bytes(field.parts[field.data[0]]).decode()


def _some(edit: Mapping[str, Any]) -> Mapping[str, Any]:
    if not edit:
        raise ValueError("the edit is empty; give at least one site with its map.")
    return edit


def _layer(site: str, template: str) -> int | None:
    """Number N of a site that a template names; None for other sites."""
    found = re.fullmatch(re.escape(template).replace(r"\{\}", r"(\d+)"), site)
    return int(found[1]) if found else None


def _shift(site_map: Any, site: str) -> Tensor:
    """What a map adds, ``(d,)`` float32 on the CPU, verified that it does nothing else."""
    if not is_affine(site_map):
        raise ValueError(
            f"the map at {site!r} is a {type(site_map).__name__} without matrix_ and bias_: the "
            "format knows vectors that are added to every row alike."
        )
    matrix, bias = torch.as_tensor(site_map.matrix_), torch.as_tensor(site_map.bias_)
    if not torch.equal(matrix, torch.eye(len(bias), dtype=matrix.dtype, device=matrix.device)):
        raise ValueError(
            f"the map at {site!r} also multiplies rows (its matrix_ is not the identity); the "
            "format knows vectors that are added. Use mode='add'."
        )
    shift = bias.detach().to("cpu", torch.float32).contiguous()
    require_finite(shift[None], f"what the map at {site!r} adds, in float32,")
    return shift


def _edit(directions: Mapping[int, Tensor], template: str, name: str) -> Edit:
    if not directions:
        raise ValueError(f"{name} holds no directions; nothing to apply.")
    _require_one_width(directions)
    return Edit(
        {template.format(n): SteeringVector.given(v) for n, v in sorted(directions.items())}
    )


def _require_one_width(directions: Mapping[int, Tensor]) -> None:
    shapes = {n: tuple(v.shape) for n, v in directions.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"directions must be vectors of one width; got shapes by layer {shapes}.")


def _report_others(path: Path, others: list[str]) -> None:
    if others:
        warnings.warn(
            f"{path}: {len(others)} tensor(s) that are no directions were left out, the first is "
            f"{others[0]!r}.",
            UserWarning,
            stacklevel=3,
        )
