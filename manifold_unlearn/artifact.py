"""Save and load everything fitted: safetensors beside JSON, digests, atomic replacement."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

SCHEMA_VERSION = 1
_TENSORS = "tensors.safetensors"
_MANIFEST = "artifact.json"


def digest(path: Path) -> str:
    """Lower-case hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; on success it is fsynced and renamed onto it.

    Whether a file or a directory is written there, a reader sees the old or the new content,
    never a part; after an exception the old content stands and nothing is left behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    staged = staging / target.name
    try:
        yield staged
        for path in [staged, *staged.rglob("*")] if staged.is_dir() else [staged]:
            _fsync(path)
        if target.is_dir():
            target.rename(staging / "replaced")
        staged.rename(target)
        _fsync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 ``text`` to ``path`` atomically."""
    with replacing(Path(path)) as staged:
        staged.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as strict JSON to ``path`` atomically.

    Raises
    ------
    ValueError
        ``value`` holds NaN or infinity, which JSON has no word for.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def save(
    directory: str | Path, kind: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Write one fitted object as a directory of ``tensors.safetensors`` and ``artifact.json``.

    Parameters
    ----------
    directory : path
        Replaced as a whole if it exists and holds an artifact.
    kind : str
        Class name of the object, checked by :func:`load`.
    tensors : mapping of str to Tensor
    config : mapping
        Anything JSON can say.

    Raises
    ------
    FileExistsError
        ``directory`` exists and is something else than an artifact.
    """
    directory = Path(directory)
    refuse_foreign(directory)
    with replacing(directory) as staged:
        staged.mkdir()
        apart = {  # copies, for safetensors takes no two names of one memory
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in tensors.items()
        }
        save_file(apart, staged / _TENSORS)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "kind": kind,
            "config": dict(config),
            "sha256": {_TENSORS: digest(staged / _TENSORS), "config": _said(kind, config)},
        }
        text = json.dumps(manifest, indent=2, allow_nan=False)
        (staged / _MANIFEST).write_text(text + "\n", encoding="utf-8")


def _said(kind: str, config: Mapping[str, Any]) -> str:
    """Digest of what a manifest says, however it is laid out."""
    told = json.loads(json.dumps([kind, dict(config)]))
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def refuse_foreign(directory: Path) -> None:
    """Raise ``FileExistsError`` if ``directory`` exists and is something else than an artifact."""
    if directory.exists() and not (directory / _MANIFEST).is_file() and any(directory.iterdir()):
        raise FileExistsError(
            f"{directory} exists and is not an artifact; choose another directory or remove it."
        )


def load(directory: str | Path, kind: str | None = None) -> tuple[dict[str, Tensor], dict, str]:
    """Tensors, configuration and kind of what :func:`save` wrote.

    Raises
    ------
    FileNotFoundError
        No artifact there.
    ValueError
        Another ``kind`` or a newer schema than this version reads, a digest that does not match,
        or a file that is truncated.
    """
    directory = Path(directory)
    manifest_path = directory / _MANIFEST
    if not manifest_path.is_file():
        raise FileNotFoundError(
            f"{directory} holds no {_MANIFEST}; give a directory written by save()."
        )
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        version, found = manifest["schema_version"], manifest["kind"]
        expected, config = manifest["sha256"][_TENSORS], manifest["config"]
        told = manifest["sha256"].get("config")  # files of earlier versions have none
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{manifest_path} is damaged ({error!r}); restore it.") from error
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{manifest_path} has schema_version {version}; this version reads up to "
            f"{SCHEMA_VERSION}. Upgrade manifold-unlearn."
        )
    if kind is not None and found != kind:
        raise ValueError(f"{directory} holds a {found}, not a {kind}.")
    if told is not None and told != _said(found, config):
        raise ValueError(
            f"{manifest_path} says other things than were written: it is damaged or was edited. "
            "Restore it or fit again."
        )
    path = directory / _TENSORS
    if not path.is_file():
        raise ValueError(f"{path} is missing; restore it or fit again.")
    if (actual := digest(path)) != expected:
        raise ValueError(
            f"{path} has sha256 {actual[:12]}…, its manifest says {expected[:12]}…: "
            "the file is truncated or changed. Restore it or fit again."
        )
    try:
        return load_file(path), config, found
    except SafetensorError as error:
        raise ValueError(f"{path} is not readable as safetensors: {error}.") from error


def fitted_state(estimator: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fitted attributes (``name_``) of an estimator, split into tensors and JSON values."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, value in vars(estimator).items():
        if not name.endswith("_") or name.startswith("_"):
            continue
        if isinstance(value, Tensor):
            tensors[name] = value
        elif hasattr(value, "__array__") and getattr(value, "ndim", 0) > 0:
            tensors[name] = torch.as_tensor(value)
        else:
            plain[name] = value.item() if hasattr(value, "item") else value
    return tensors, plain


def save_estimator(estimator: Any, directory: str | Path) -> None:
    """Save a scikit-learn style estimator: its parameters and its fitted attributes."""
    tensors, plain = fitted_state(estimator)
    numpy_names = [n for n in tensors if not isinstance(getattr(estimator, n), Tensor)]
    config = {"params": estimator.get_params(deep=False), "fitted": plain, "numpy": numpy_names}
    save(directory, type(estimator).__name__, tensors, config)


def load_estimator(make: Callable[..., Any], directory: str | Path) -> Any:
    """Estimator of class ``make`` as :func:`save_estimator` left it."""
    tensors, config, _ = load(directory, kind=make.__name__)
    estimator = make(**config["params"])
    for name, value in {**tensors, **config["fitted"]}.items():
        setattr(estimator, name, value.numpy() if name in config["numpy"] else value)
    return estimator


class SavedMixin:
    """``save`` and ``load`` of an estimator: parameters and fit, in safetensors and JSON."""

    def save(self, directory: str | Path) -> None:
        """Write parameters and fit to a directory that :meth:`load` reads."""
        check_is_fitted(self)
        save_estimator(self, directory)

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read what :meth:`save` wrote; raises as :func:`manifold_unlearn.artifact.load`."""
        return cast(Self, load_estimator(cls, directory))
