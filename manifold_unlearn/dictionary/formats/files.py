"""Files of others, read so that none of them runs code, and each damage has its name."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from manifold_unlearn.dictionary.formats.errors import DictionaryFormatError
from manifold_unlearn.dictionary.formats.inert import Made, read_inert

_CONFIG_BYTES = 1 << 24
_INFLATION = 20
_SMALL = 1 << 26
_ITEMS = 100_000


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; download it first, or give its directory.")
    try:
        yield
    except DictionaryFormatError:
        raise
    except Exception as error:  # parsers of damaged files raise whatever they stumble over
        said = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise DictionaryFormatError(
            f"{path} is not readable as {kind} ({said}): it is truncated, damaged, or of another "
            "kind. Fetch it again."
        ) from error


def _text(path: Path) -> str:
    if (size := path.stat().st_size) > _CONFIG_BYTES:
        raise DictionaryFormatError(
            f"{path} has {size} bytes; a configuration has less than {_CONFIG_BYTES}."
        )
    return path.read_text(encoding="utf-8")


def _a_mapping(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DictionaryFormatError(
            f"{path} holds a {type(value).__name__}, not fields with names; restore it."
        )
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Fields of a JSON file."""
    with _reading(path, "JSON"):
        return _a_mapping(path, json.loads(_text(path)))


def read_yaml(path: Path) -> dict[str, Any]:
    """Fields of a YAML file, plain values only."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError("this format needs PyYAML: pip install pyyaml") from error
    with _reading(path, "YAML"):
        return _a_mapping(path, yaml.safe_load(_text(path)))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    with _reading(path, "safetensors"), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def safetensors_names(path: Path) -> set[str]:
    """Names of the tensors of a safetensors file, without their values."""
    with _reading(path, "safetensors"), safe_open(path, framework="pt") as file:
        return set(file.keys())


def _require_sound(archive: zipfile.ZipFile, path: Path) -> None:
    packed = path.stat().st_size
    unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > max(_SMALL, _INFLATION * packed):
        raise DictionaryFormatError(
            f"{path} has {packed} bytes and would unpack to {unpacked}: no weights compress so "
            "far. It is damaged or malicious; it was not unpacked."
        )
    if (damaged := archive.testzip()) is not None:
        raise DictionaryFormatError(
            f"{path}: the checksum of its part {damaged} does not match; fetch it again."
        )


def read_npz(path: Path) -> dict[str, Tensor]:
    """Arrays of an npz file; none of objects."""
    with _reading(path, "npz"), zipfile.ZipFile(path) as archive:
        _require_sound(archive, path)
        found = {}
        for member in archive.infolist():
            with archive.open(member) as file:
                array = _array(file, member.file_size)
            found[member.filename.removesuffix(".npy")] = torch.from_numpy(array)
        return found


def _array(file: Any, size: int) -> np.ndarray:
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
        version, np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise DictionaryFormatError("an array of objects, which would run code; it was not read.")
    if math.prod(shape) * dtype.itemsize > size:
        raise DictionaryFormatError(f"an array of shape {shape} in {size} bytes; fetch it again.")
    flat = np.frombuffer(bytearray(file.read()), dtype=dtype)
    ordered = flat.reshape(shape, order="F" if fortran else "C")
    return ordered.astype(dtype.newbyteorder("="), copy=False)


def read_torch(path: Path) -> Any:
    """Value of a torch checkpoint; objects of foreign classes as inert ``Made``, none is run."""
    with _reading(path, "a torch checkpoint"):
        if not zipfile.is_zipfile(path):
            return _require_whole(path, _weights_only(path))
        with zipfile.ZipFile(path) as archive:
            _require_sound(archive, path)
            try:
                found = _weights_only(path)
            except Exception:  # it names what weights_only refuses, or is damaged: say which
                found = read_inert(archive)
        return _require_whole(path, found)


def _weights_only(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _require_whole(path: Path, value: Any) -> Any:
    """The value, if every tensor is plain and no larger than what is stored of it."""
    queue, seen = [value], set()
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            plain = item.layout == torch.strided and item.device.type == "cpu"
            if (
                not plain
                or item.is_quantized
                or item.numel() * item.element_size() > item.untyped_storage().nbytes()
            ):
                raise DictionaryFormatError(
                    f"{path} holds a tensor of shape {tuple(item.shape)} that is not stored in "
                    "full (sparse, quantized, or expanded); it is damaged or malicious."
                )
        elif isinstance(item, Mapping):
            queue += item.values()
        elif isinstance(item, list | tuple):
            queue += item
        elif isinstance(item, Made):
            queue.append(item.state)
    return value


def plain(value: Any) -> Any:
    """A value as JSON can say it; what JSON cannot is said in words, what is too much left out."""
    return _said(value, 8, [_ITEMS])


def _said(value: Any, depth: int, left: list[int]) -> Any:
    left[0] -= 1  # shared parts are said each time: a small file may mean a huge text
    if isinstance(value, Tensor):
        value = value.tolist() if value.numel() <= 64 else f"tensor of {tuple(value.shape)}"
    if isinstance(value, Made):
        value = value.state
    if isinstance(value, Mapping | list | tuple) and (depth == 0 or left[0] < 0):
        return "..."
    if isinstance(value, Mapping):
        return {str(key): _said(item, depth - 1, left) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_said(item, depth - 1, left) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
