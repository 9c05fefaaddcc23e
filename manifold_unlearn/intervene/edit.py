"""An edit on disk: the maps of all its sites in one artifact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from manifold_unlearn import artifact
from manifold_unlearn.intervene.maps import AffineMap


@dataclass(frozen=True)
class Edit(Mapping[str, AffineMap]):
    """Maps by site, to be handed to :func:`intervene` or :func:`bake` as they are."""

    maps: dict[str, AffineMap]

    def __getitem__(self, site: str) -> AffineMap:
        return self.maps[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.maps)

    def __len__(self) -> int:
        return len(self.maps)

    def save(self, directory: str | Path) -> None:
        """Write the edit to a directory that :meth:`load` reads."""
        tensors = {
            f"{site}/{part}": getattr(site_map, part)
            for site, site_map in self.maps.items()
            for part in ("read", "write", "offset")
        }
        artifact.save(directory, "Edit", tensors, {"sites": list(self.maps)})

    @classmethod
    def load(cls, directory: str | Path) -> Edit:
        """Read the edit that :meth:`save` wrote; raises as :func:`~.artifact.load`."""
        tensors, config, _ = artifact.load(directory, kind="Edit")
        return cls(
            {
                site: AffineMap(
                    *(tensors[f"{site}/{part}"] for part in ("read", "write", "offset"))
                )
                for site in config["sites"]
            }
        )
