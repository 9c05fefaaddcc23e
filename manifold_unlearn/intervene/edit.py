"""An edit on disk: the maps of all its sites in one artifact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from manifold_unlearn import artifact
from manifold_unlearn.intervene.maps import AffineMap

_PARTS = ("read", "write", "offset")


@dataclass(frozen=True)
class Edit(Mapping[str, Any]):
    """Maps by site, to be handed to :func:`intervene` or :func:`bake` as they are."""

    maps: dict[str, Any]
    """An :class:`AffineMap`, or whatever has ``save`` and ``load``, as fitted erasers do."""

    def __getitem__(self, site: str) -> Any:
        return self.maps[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.maps)

    def __len__(self) -> int:
        return len(self.maps)

    def save(self, directory: str | Path) -> None:
        """Write the edit to a directory that :meth:`load` reads; as a whole, or not at all.

        Affine maps share one file; every other map has a directory in ``maps``, written by its
        own ``save``.

        Raises
        ------
        ValueError
            A map that has no ``save`` and ``load``.
        FileExistsError
            ``directory`` exists and is something else than an artifact.
        """
        tensors: dict[str, Tensor] = {}
        saved: dict[str, dict[str, str]] = {}
        for site, site_map in self.maps.items():
            if isinstance(site_map, AffineMap):
                tensors |= {f"{site}/{part}": getattr(site_map, part) for part in _PARTS}
            elif hasattr(site_map, "save") and hasattr(type(site_map), "load"):
                home = f"maps/{len(saved)}"
                saved[site] = {"kind": type(site_map).__name__, "directory": home}
            else:
                raise ValueError(
                    f"the map at {site!r} is a {type(site_map).__name__} without save and load; an "
                    "edit on disk holds fitted maps of this package, or others that have both."
                )
        config = {"sites": list(self.maps)} | ({"saved": saved} if saved else {})
        directory = Path(directory)
        artifact.refuse_foreign(directory)
        with artifact.replacing(directory) as staged:
            artifact.save(staged, "Edit", tensors, config)
            for site, entry in saved.items():
                self.maps[site].save(staged / entry["directory"])

    @classmethod
    def load(cls, directory: str | Path, kinds: Mapping[str, Any] | None = None) -> Edit:
        """Read the edit that :meth:`save` wrote.

        Parameters
        ----------
        directory : path
        kinds : mapping of str to class, optional
            Classes of maps that are no public names of this package, by their names.

        Raises
        ------
        FileNotFoundError, ValueError
            As :func:`~.artifact.load`; a map of a class that is not known; a site named outside
            the directory.
        """
        directory = Path(directory)
        tensors, config, _ = artifact.load(directory, kind="Edit")
        saved = config.get("saved", {})
        maps: dict[str, Any] = {}
        for site in config["sites"]:
            if site in saved:
                made = _class_of(saved[site]["kind"], site, kinds or {})
                maps[site] = made.load(_inside(directory, saved[site]["directory"]))
            else:
                maps[site] = AffineMap(*(tensors[f"{site}/{part}"] for part in _PARTS))
        return cls(maps)


def _class_of(kind: str, site: str, kinds: Mapping[str, Any]) -> Any:
    import manifold_unlearn

    if kind in kinds:
        return kinds[kind]
    for room in (manifold_unlearn, manifold_unlearn.steer, manifold_unlearn.dictionary):
        if kind in room.__all__ and hasattr(getattr(room, kind), "load"):
            return getattr(room, kind)
    raise ValueError(
        f"the map at {site!r} is a {kind}, which is no public class of manifold_unlearn; hand it "
        f"over: Edit.load(directory, kinds={{{kind!r}: {kind}}})."
    )


def _inside(directory: Path, home: str) -> Path:
    path = directory / home
    if not path.resolve().is_relative_to(directory.resolve()):
        raise ValueError(f"{directory} names the map {home!r} outside of it; restore the edit.")
    return path
