"""Cross-layer transcoders: latents read at one layer and write at all that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from manifold_unlearn import artifact
from manifold_unlearn.dictionary.coder import Code, SparseCoder


class CrossLayerTranscoder(nn.Module):
    """MLP outputs of all layers from sparse codes of their inputs.

    ``f_i = nonlinearity(x_i W_enc[i] + b_enc[i])``, ``y_l = b_dec[l] + sum over i <= l of f_i
    W_dec[i][:, l - i]``, plus ``x_l W_skip[l]`` where there is one.

    Parameters
    ----------
    n_layers, d_in, d_sae : int
    d_out : int, optional
        Default: ``d_in``.
    nonlinearity : mapping, default={"name": "jumprelu"}
        Of every layer its own.
    skip : bool, default=False
        A linear way around at each layer, from its rows to its own outputs; zero to begin with.
    random_state : int, optional

    Attributes
    ----------
    layers : nn.ModuleList of SparseCoder
        The latents of layer i, with ``d_out * (n_layers - i)`` outputs.
    b_dec : Tensor of shape (n_layers, d_out)
    W_enc : Tensor of shape (n_layers, d_in, d_sae)
    W_dec : tuple of Tensor of shape (d_sae, n_layers - i, d_out)
    W_skip : Tensor of shape (n_layers, d_in, d_out) or None
    origin : dict

    References
    ----------
    Ameisen et al. (2025), Circuit tracing: revealing computational graphs in language models.
    """

    kind: ClassVar[str] = "CrossLayerTranscoder"

    def __init__(
        self,
        n_layers: int,
        d_in: int,
        d_sae: int,
        d_out: int | None = None,
        nonlinearity: Mapping[str, Any] | None = None,
        *,
        skip: bool = False,
        random_state: int | None = None,
    ) -> None:
        super().__init__()
        if n_layers < 1:
            raise ValueError(f"n_layers={n_layers} must be at least 1.")
        self.n_layers, self.d_in, self.d_sae = n_layers, d_in, d_sae
        self.d_out = d_in if d_out is None else d_out
        self.shape = dict(nonlinearity or {"name": "jumprelu"})
        seeds: Sequence[int | None] = [None] * n_layers
        if random_state is not None:
            seeds = range(random_state, random_state + n_layers)
        self.layers = nn.ModuleList(
            SparseCoder(d_in, d_sae, self.d_out * (n_layers - i), self.shape, random_state=seeds[i])
            for i in range(n_layers)
        )
        for layer in self.coders:
            layer.b_dec.requires_grad_(False)  # each output has one bias, kept here
        self.b_dec = nn.Parameter(torch.zeros(n_layers, self.d_out))
        self.W_skip = nn.Parameter(torch.zeros(n_layers, d_in, self.d_out)) if skip else None
        self.origin: dict[str, Any] = {}

    @property
    def coders(self) -> list[SparseCoder]:
        """The latents of each layer."""
        return cast(list[SparseCoder], list(self.layers))

    @property
    def W_enc(self) -> Tensor:  # noqa: N802 - the field's name
        """(n_layers, d_in, d_sae)."""
        return torch.stack([layer.W_enc for layer in self.coders])

    @property
    def W_dec(self) -> tuple[Tensor, ...]:  # noqa: N802 - the field's name
        """Of every layer (d_sae, n_layers - i, d_out)."""
        return tuple(layer.decoder.unflatten(1, (-1, self.d_out)) for layer in self.coders)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.b_dec.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.b_dec.device

    def encode(self, x: Tensor) -> Tensor:
        """Activations (..., n_layers, d_sae) of rows (..., n_layers, d_in)."""
        self._require_rows(x)
        return torch.stack([layer.encode(x[..., i, :]) for i, layer in enumerate(self.coders)], -2)

    def codes(self, x: Tensor) -> list[Code]:
        """Of rows (n, n_layers, d_in) each layer's code, sparse where the nonlinearity chooses."""
        self._require_rows(x)
        return [
            layer.code(x[:, i]) if layer.nonlinearity.chooses else layer.encode(x[:, i])
            for i, layer in enumerate(self.coders)
        ]

    def decode(self, code: Tensor | Sequence[Code], x: Tensor | None = None) -> Tensor:
        """Outputs of codes.

        Parameters
        ----------
        code : Tensor of shape (..., n_layers, d_sae), or sequence of one code a layer
        x : Tensor of shape (..., n_layers, d_in), optional
            The rows that were encoded; needed with a skip.

        Returns
        -------
        Tensor of shape (..., n_layers, d_out)

        Raises
        ------
        ValueError
            Another number of codes, or ``x`` is needed.
        """
        parts = code.unbind(-2) if isinstance(code, Tensor) else code
        if len(parts) != self.n_layers:
            raise ValueError(f"{len(parts)} codes for {self.n_layers} layers; give one each.")
        if self.W_skip is not None and x is None:
            raise ValueError("a skip writes what it reads of the input; give the rows as x.")
        total: Tensor | None = None
        for i, (layer, part) in enumerate(zip(self.coders, parts, strict=True)):
            wrote = layer.decode(part).unflatten(-1, (-1, self.d_out))
            if total is None:
                total = wrote + self.b_dec
            else:
                total = torch.cat([total[..., :i, :], total[..., i:, :] + wrote], dim=-2)
        assert total is not None
        if self.W_skip is None or x is None:
            return total
        return total + torch.einsum("...ld,ldo->...lo", x, self.W_skip)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., n_layers, d_out) of rows (..., n_layers, d_in)."""
        rows = x.reshape(-1, *x.shape[-2:])
        return self.decode(self.codes(rows), rows).reshape(*x.shape[:-1], self.d_out)

    def _require_rows(self, x: Tensor) -> None:
        if x.shape[-2:] != (self.n_layers, self.d_in):
            raise ValueError(
                f"rows have shape {tuple(x.shape)}; the transcoder reads (..., {self.n_layers}, "
                f"{self.d_in})."
            )

    def constrain(self) -> None:
        """Nothing is constrained."""

    @torch.no_grad()
    def fold_scale(self, scale_in: Tensor, scale_out: Tensor) -> Self:
        """Read and write unscaled what was scaled by a factor a layer, (n_layers,) each."""
        for i, layer in enumerate(self.coders):
            layer.encoder.mul_(scale_in[i])
            layer.decoder.div_(scale_out[i:].repeat_interleave(self.d_out))
        self.b_dec.div_(scale_out[:, None])
        if self.W_skip is not None:
            self.W_skip.mul_((scale_in / scale_out)[:, None, None])
        return self

    def config(self) -> dict[str, Any]:
        """What makes the same dictionary again, tensors apart; JSON."""
        return {
            "n_layers": self.n_layers,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "d_out": self.d_out,
            "nonlinearity": self.shape,
            "skip": self.W_skip is not None,
        }

    def save(self, directory: str | Path) -> None:
        """Write the dictionary to a directory that :meth:`load` reads, bit by bit."""
        config = {"made": self.config(), "origin": self.origin}
        artifact.save(directory, self.kind, self.state_dict(), config)

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read what :meth:`save` wrote; raises as :func:`manifold_unlearn.artifact.load`."""
        tensors, config, _ = artifact.load(directory, kind=cls.kind)
        coder = cls(**config["made"])
        coder.to(tensors["b_dec"].dtype)
        coder.load_state_dict(tensors)
        coder.origin = config["origin"]
        return coder
