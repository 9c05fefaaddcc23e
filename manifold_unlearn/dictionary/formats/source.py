"""What stands at a path, looked at by every family of formats; and what a family is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.cross_layer import CrossLayerTranscoder
from manifold_unlearn.dictionary.formats import files
from manifold_unlearn.dictionary.formats.errors import DictionaryFormatError

Coder: TypeAlias = SparseCoder | CrossLayerTranscoder
Which: TypeAlias = Mapping[str, Any]

CONFIGS = ("cfg.json", "config.json", "config.yaml", "hyperparams.json", "artifact.json")
_TRAINING = re.compile(r"(trainer_state|state|optimizer|lr_scheduler|scheduler)(_\d+)?\.pth?")


class Family(NamedTuple):
    """A format that is read.

    Attributes
    ----------
    name : str
    holds : str
        Its files, in words.
    recognizes : callable
        Whether a source is of it.
    read : callable
        The coder, of a source and of the keywords that it takes.
    takes : tuple of str
        Keywords of ``load`` that mean something to it.
    """

    name: str
    holds: str
    recognizes: Callable[[Source], bool]
    read: Callable[[Source, Which], Coder]
    takes: tuple[str, ...] = ()


class Source:
    """A file or a directory, each part of it read once.

    Parameters
    ----------
    path : str or Path
        A configuration means its directory; any other file means itself, with what is beside it.

    Attributes
    ----------
    directory : Path
    names : tuple of str
        Files in the directory, or the one that was given.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist; give a local file or directory. What lies on a hub is "
                "fetched first, with huggingface_hub.snapshot_download."
            )
        whole = path.is_dir() or path.name in CONFIGS
        self.path = path
        self.directory = path if path.is_dir() else path.parent
        self.names: tuple[str, ...] = (path.name,)
        if whole:
            self.names = tuple(sorted(p.name for p in self.directory.iterdir() if p.is_file()))
        self._read: dict[tuple[str, str], Any] = {}

    def __str__(self) -> str:
        return str(self.path)

    def has(self, name: str) -> bool:
        """Whether the file is given, or stands in the directory that is."""
        return name in self.names

    def matching(self, pattern: str) -> dict[int, str]:
        """Files whose whole name matches, by the number in its first group."""
        found = ((re.fullmatch(pattern, name), name) for name in self.names)
        return dict(sorted((int(match[1]), name) for match, name in found if match))

    def beside(self, name: str) -> bool:
        """Whether the file stands in the directory."""
        return (self.directory / name).is_file()

    def at(self, name: str) -> Path:
        """Path of a file of the directory."""
        return self.directory / name

    def _once(self, kind: str, name: str, read: Callable[[Path], Any]) -> Any:
        if (kind, name) not in self._read:
            self._read[kind, name] = read(self.at(name))
        return self._read[kind, name]

    def json(self, name: str) -> dict[str, Any]:
        """Fields of a JSON file; none where there is no such file."""
        return self._once("json", name, files.read_json) if self.beside(name) else {}

    def yaml(self, name: str) -> dict[str, Any]:
        """Fields of a YAML file; none where there is no such file."""
        return self._once("yaml", name, files.read_yaml) if self.beside(name) else {}

    def safetensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of a safetensors file."""
        found: dict[str, Tensor] = self._once("safetensors", name, files.read_safetensors)[0]
        return dict(found)

    def said(self, name: str) -> dict[str, str]:
        """Metadata of a safetensors file."""
        found: dict[str, str] = self._once("safetensors", name, files.read_safetensors)[1]
        return found

    def safetensors_names(self, name: str) -> set[str]:
        """Names of the tensors of a safetensors file."""
        found: set[str] = self._once("names", name, files.safetensors_names)
        return found

    def torch(self, name: str) -> Any:
        """Value of a torch checkpoint."""
        return self._once("torch", name, files.read_torch)

    def checkpoint(self) -> tuple[str, dict[str, Any]] | None:
        """The one torch checkpoint here, if its value is fields with names."""
        found = [
            name
            for name in self.names
            if name.endswith((".pt", ".pth")) and not _TRAINING.fullmatch(name)
        ]
        if "ae.pt" in found:  # beside which checkpoints of its training may lie
            found = ["ae.pt"]
        if len(found) != 1:
            return None
        value = self.torch(found[0])
        named = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
        return (found[0], dict(value)) if named else None


def one_layer(source: Source, found: Mapping[int, str], which: Which) -> tuple[int, str]:
    """Number and file of the layer that was asked for, or of the only one.

    Raises
    ------
    DictionaryFormatError
        There is no such layer, or there are several and none was asked for.
    """
    layer = which.get("layer")
    if layer is None and len(found) == 1:
        return next(iter(found.items()))
    if layer is None or layer not in found:
        asked = "none was asked for" if layer is None else f"{layer} was asked for"
        raise DictionaryFormatError(
            f"{source} holds the layers {', '.join(map(str, found))}, and {asked}; give layer= "
            "one of them."
        )
    return int(layer), found[int(layer)]
