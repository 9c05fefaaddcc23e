"""Latents of a dictionary held at values of one's choice, the reconstruction error kept."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, get_args

import torch
from torch import Tensor

from manifold_unlearn import artifact
from manifold_unlearn.activations.models import evaluating
from manifold_unlearn.arrays import as_rows, restore, working_dtype
from manifold_unlearn.dictionary.autoencoder import SparseAutoencoder
from manifold_unlearn.dictionary.chosen_latents import latent_activations
from manifold_unlearn.dictionary.codes import decode_sparse
from manifold_unlearn.dictionary.coding import checked_latents

Rule: TypeAlias = Literal["set", "scale"]


@dataclass(frozen=True, eq=False)
class FeatureClamp:
    """``h -> h + (f' - f) W_dec``: some activations ``f`` replaced by ``f'``, the rest kept.

    What the dictionary does not reconstruct stays in the row. A row in which no chosen latent
    changes is returned as it came, to the bit. ``value=0`` takes the latents out; a negative value
    pushes the row to the other side of them where they fire; with ``only_when_active=False`` a
    latent is set in every row: steering.

    Parameters
    ----------
    coder : SparseAutoencoder
        Never changed. Its normalization of rows is undone for the change as it is for outputs.
    latents : sequence of int or Tensor of shape (m,)
    value : float or Tensor of shape (m,), default=0.0
        In units of activations.
    rule : {"set", "scale"}, default="set"
        ``f' = value``, or ``f' = value * f``.
    only_when_active : bool, default=True
        Leave latents that do not fire in a row at 0 there. ``"scale"`` does so in any case.

    Raises
    ------
    ValueError
        No autoencoder, latents that do not exist, values that do not fit, an unknown rule.

    References
    ----------
    Farrell, Lau and Conmy (2024), Applying sparse autoencoders to unlearn knowledge in language
    models, arXiv 2410.19278.

    Examples
    --------
    >>> import torch
    >>> from manifold_unlearn.dictionary import SparseAutoencoder
    >>> sae = SparseAutoencoder(8, 32, {"name": "relu"}, random_state=0)
    >>> rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    >>> clamped = FeatureClamp(sae, [3, 4])(rows)
    >>> fires = (sae.encode(rows)[:, [3, 4]] > 0).any(1)
    >>> bool((clamped[~fires] == rows[~fires]).all() and (clamped[fires] != rows[fires]).any())
    True
    """

    coder: SparseAutoencoder
    latents: Any
    value: Any = 0.0
    rule: Rule = "set"
    only_when_active: bool = True

    def __post_init__(self) -> None:
        """Check the parts against each other."""
        if not isinstance(self.coder, SparseAutoencoder):
            raise ValueError(
                f"a {type(self.coder).__name__} does not write the rows that it reads; clamp the "
                "latents of a SparseAutoencoder."
            )
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule={self.rule!r} is not one of {get_args(Rule)}.")
        latents = checked_latents(self.latents, self.coder.d_sae).to(self.coder.device)
        value = torch.as_tensor(self.value).detach().to(self.coder.device, self.coder.dtype)
        if value.shape not in ((), latents.shape) or not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"value of shape {tuple(value.shape)} must be one finite number, or one a latent "
                f"({len(latents)})."
            )
        object.__setattr__(self, "latents", latents)
        object.__setattr__(self, "value", value.expand(len(latents)).contiguous())

    @property
    def n_features_in_(self) -> int:
        """Width of the rows."""
        return self.coder.d_in

    def activations(self, h: Tensor) -> Tensor:
        """Of the chosen latents, (..., m), in rows (..., d)."""
        return latent_activations(self.coder, h, self.latents)

    def __call__(self, h: Tensor) -> Tensor:
        """Edited rows ``(..., d)``, in the dtype and on the device of ``h``."""
        if h.device != self.coder.device:
            return self.to(h.device, h.dtype)(h)
        return self.edited(h, self.activations(h))

    def edited(self, h: Tensor, activations: Tensor) -> Tensor:
        """Edited rows, where the activations (..., m) of the chosen latents are known already."""
        wanted = self.value if self.rule == "set" else self.value * activations
        if self.only_when_active:
            wanted = torch.where(activations != 0, wanted, 0.0)
        difference = wanted.expand_as(activations) - activations
        changed = (difference != 0).any(-1, keepdim=True)
        wide = working_dtype(h.dtype)
        moved = (h.to(wide) + self._written(h, difference).to(wide)).to(h.dtype)
        return torch.where(changed, moved, h)

    def _written(self, h: Tensor, difference: Tensor) -> Tensor:
        """What a change of activations (..., m) adds to rows (..., d)."""
        coder = self.coder
        if coder.after is None:
            change = difference @ coder.decoder[self.latents]
            deviation = coder.scaled(h).deviation
            return change if deviation is None else change * deviation
        rows = h.reshape(-1, h.shape[-1])
        with evaluating(coder):
            code = coder.code(rows)
        scaled = coder.scaled(rows)
        before = decode_sparse(code, coder.decoder) + coder.b_dec
        after = before + difference.reshape(len(rows), -1) @ coder.decoder[self.latents]
        moved = coder.after(after) - coder.after(before)
        if scaled.deviation is not None:
            moved = moved * scaled.deviation
        return moved.reshape(h.shape)

    def transform(self, X: Any) -> Any:
        """Edited rows, in the kind of ``X`` (n_samples, n_features)."""
        with torch.no_grad():
            return restore(self(as_rows(X)), X)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> FeatureClamp:  # noqa: ARG002
        """Return the clamp on another device; the dictionary computes in its own dtype."""
        if torch.device(device) == self.coder.device:
            return self
        moved = copy.deepcopy(self.coder).to(device)
        return FeatureClamp(moved, self.latents, self.value, self.rule, self.only_when_active)

    def save(self, directory: str | Path) -> None:
        """Write clamp and dictionary to a directory that :meth:`load` reads."""
        directory = Path(directory)
        config = {"rule": self.rule, "only_when_active": self.only_when_active}
        artifact.refuse_foreign(directory)
        with artifact.replacing(directory) as staged:
            tensors = {"latents": self.latents, "value": self.value}
            artifact.save(staged, "FeatureClamp", tensors, config)
            self.coder.save(staged / "coder")

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read what :meth:`save` wrote; raises as :func:`manifold_unlearn.artifact.load`."""
        tensors, config, _ = artifact.load(directory, kind="FeatureClamp")
        coder = SparseAutoencoder.load(Path(directory) / "coder")
        return cls(coder, tensors["latents"], tensors["value"], **config)
