"""The common part of every dictionary: sparse codes of rows, and rows made of codes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from manifold_unlearn import artifact
from manifold_unlearn.arrays import generator
from manifold_unlearn.dictionary.codes import SparseCode, decode_sparse, encode_selected
from manifold_unlearn.dictionary.nonlinearity import (
    BatchTopK,
    Choosing,
    Nonlinearity,
    make_nonlinearity,
)

Normalization: TypeAlias = Literal["none", "layer_norm", "unit_rms"]
Code: TypeAlias = "Tensor | SparseCode"

_EPS = 1e-5


class Scaled(NamedTuple):
    """Rows as the encoder reads them, and how to bring outputs back.

    Attributes
    ----------
    rows : Tensor of shape (n, d_in)
    mean, deviation : Tensor of shape (n, 1) or None
    """

    rows: Tensor
    mean: Tensor | None
    deviation: Tensor | None

    def restored(self, outputs: Tensor) -> Tensor:
        """Outputs in the units of the rows given."""
        if self.deviation is not None:
            outputs = outputs * self.deviation
        return outputs if self.mean is None else outputs + self.mean


class Residual(nn.Module):
    """``h + outer(gelu(inner(h)))``, the identity to begin with."""

    def __init__(self, d: int, width: int, draw: torch.Generator) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(d, width), nn.Linear(width, d)
        with torch.no_grad():
            self.inner.weight.copy_(torch.randn(width, d, generator=draw) / d**0.5)
            for parameter in (self.inner.bias, self.outer.weight, self.outer.bias):
                parameter.zero_()

    def forward(self, h: Tensor) -> Tensor:
        """Rows (n, d) as rows (n, d)."""
        found: Tensor = h + self.outer(functional.gelu(self.inner(h)))
        return found


class SparseCoder(nn.Module):
    """Sparse codes of rows, ``f = nonlinearity((x - b_in) W_enc + b_enc)``, and rows made of them.

    The output is ``f W_dec + b_dec``, plus ``x W_skip`` where there is one. The classes of this
    room say what comes in and what goes out; all may be trained, saved, spliced into a model.

    Parameters
    ----------
    d_in, d_sae, d_out : int
    nonlinearity : Nonlinearity or mapping, default={"name": "topk", "k": 32}
        Or what ``make_nonlinearity`` takes.
    centered : bool, default=False
        Subtract ``b_dec`` from the input (``d_out == d_in``).
    normalization : {"none", "layer_norm", "unit_rms"}, default="none"
        Of each row of the input, undone at the output: mean 0 and standard deviation 1 (unbiased;
        1e-5 is added to it where it divides), or norm ``sqrt(d_in)``.
    rank_by_norm : bool, default=False
        Rules of rank compare ``f * norm(W_dec row)``.
    skip : bool, default=False
        A linear way around, ``W_skip`` (d_in, d_out), zero to begin with.
    deep : int, default=0
        Width of a hidden layer before the encoder and of one after the decoder, each around a
        residual connection: ``h + V gelu(U h + c) + e``, the identity to begin with. 0: none.
    random_state : int, optional

    Attributes
    ----------
    W_enc : Tensor of shape (d_in, d_sae)
        A view of ``encoder`` (d_sae, d_in).
    W_dec : Tensor of shape (d_sae, d_out)
        The parameter ``decoder``; its rows begin with norm 1, and ``W_enc`` as their transpose
        where input and output have one width.
    b_enc : Tensor of shape (d_sae,)
    b_dec : Tensor of shape (d_out,)
    b_in : Tensor of shape (d_in,) or None
        Subtracted from the input; a parameter of its own where a file says so.
    W_skip : Tensor of shape (d_in, d_out) or None
    origin : dict
        Where the dictionary reads and writes, and what else a file said; JSON.
    """

    kind: ClassVar[str] = "SparseCoder"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        d_out: int,
        nonlinearity: Nonlinearity | Mapping[str, Any] | None = None,
        *,
        centered: bool = False,
        normalization: Normalization = "none",
        rank_by_norm: bool = False,
        skip: bool = False,
        deep: int = 0,
        random_state: int | None = None,
    ) -> None:
        super().__init__()
        if min(d_in, d_sae, d_out) < 1:
            raise ValueError(f"d_in={d_in}, d_sae={d_sae}, d_out={d_out} must be at least 1.")
        if centered and d_in != d_out:
            raise ValueError(f"centered=True needs one width; got d_in={d_in}, d_out={d_out}.")
        if normalization not in get_args(Normalization):
            raise ValueError(
                f"normalization={normalization!r} is not one of {get_args(Normalization)}."
            )
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_out
        self.centered, self.normalization, self.rank_by_norm = centered, normalization, rank_by_norm
        if not isinstance(nonlinearity, Nonlinearity):
            nonlinearity = make_nonlinearity(nonlinearity or {"name": "topk", "k": 32}, d_sae)
        self.nonlinearity = nonlinearity
        draw = generator(random_state)
        decoder = torch.randn(d_sae, d_out, generator=draw)
        decoder /= decoder.norm(dim=1, keepdim=True)
        encoder = decoder.clone() if d_in == d_out else torch.randn(d_sae, d_in, generator=draw)
        if d_in != d_out:
            encoder /= encoder.norm(dim=1, keepdim=True)
        self.encoder, self.decoder = nn.Parameter(encoder), nn.Parameter(decoder)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        self.b_in: nn.Parameter | None = None
        self.W_skip = nn.Parameter(torch.zeros(d_in, d_out)) if skip else None
        self.deep = deep
        self.before = Residual(d_in, deep, draw) if deep else None
        self.after = Residual(d_out, deep, draw) if deep else None
        self.origin: dict[str, Any] = {}

    @property
    def W_enc(self) -> Tensor:  # noqa: N802 - the field's name
        """(d_in, d_sae)."""
        return self.encoder.mT

    @property
    def W_dec(self) -> Tensor:  # noqa: N802 - the field's name
        """(d_sae, d_out)."""
        return self.decoder

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.encoder.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.encoder.device

    def scaled(self, x: Tensor) -> Scaled:
        """Rows (n, d_in) as the encoder reads them."""
        if x.shape[-1] != self.d_in:
            raise ValueError(f"rows have {x.shape[-1]} features; the dictionary reads {self.d_in}.")
        rows = x.to(self.dtype)
        if self.normalization == "layer_norm":
            mean = rows.mean(-1, keepdim=True)
            deviation = (rows - mean).std(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
            return Scaled((rows - mean) / (deviation + _EPS), mean, deviation)
        if self.normalization == "unit_rms":
            norm = rows.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
            deviation = norm / self.d_in**0.5
            return Scaled(rows / deviation, None, deviation)
        return Scaled(rows, None, None)

    def read(self, rows: Tensor) -> Tensor:
        """Scaled rows as the encoder's product takes them: without what is subtracted."""
        shift = self.b_dec if self.centered else self.b_in
        rows = rows if shift is None else rows - shift
        return rows if self.before is None else self.before(rows)

    def ranking(self) -> Tensor | None:
        """Factor (d_sae,) of what rules of rank compare; None where they compare what there is."""
        return self.decoder.detach().norm(dim=1) if self.rank_by_norm else None

    def pre_activations(self, x: Tensor) -> Tensor:
        """Of rows (..., d_in): (..., d_sae)."""
        return self.read(self.scaled(x).rows) @ self.encoder.mT + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        """Activations of rows (..., d_in): (..., d_sae), in the dtype of the weights."""
        pre = self.pre_activations(x)
        return self.activations(pre.reshape(-1, self.d_sae)).reshape(pre.shape)

    def activations(self, pre: Tensor) -> Tensor:
        """Of pre-activations (n, d_sae), dense."""
        if isinstance(self.nonlinearity, Choosing):
            found: Tensor = self.nonlinearity(pre, self.ranking())
        else:
            found = self.nonlinearity(pre)
        return found

    def code(self, x: Tensor) -> SparseCode:
        """Sparse code of rows (n, d_in); the same numbers as :meth:`encode`."""
        return self._code(self.scaled(x).rows)

    def _code(self, rows: Tensor) -> SparseCode:
        shape = self.nonlinearity
        if not isinstance(shape, Choosing):
            pre = self.read(rows) @ self.encoder.mT + self.b_enc
            return SparseCode.of(shape(pre))
        scale = self.ranking()
        raw = encode_selected(
            self.read(rows), self.encoder, self.b_enc, lambda pre: shape.choice(pre, scale)
        )
        return SparseCode(raw.row, raw.latent, shape.shaped(raw.value), raw.n_rows, raw.n_latents)

    def decode(self, code: Code, x: Tensor | None = None) -> Tensor:
        """Outputs of codes.

        Parameters
        ----------
        code : Tensor of shape (..., d_sae), or SparseCode
        x : Tensor of shape (..., d_in), optional
            The rows that were encoded; needed with a normalization or a skip.

        Returns
        -------
        Tensor of shape (..., d_out)

        Raises
        ------
        ValueError
            ``x`` is needed.
        """
        if x is None:
            if self.normalization != "none" or self.W_skip is not None:
                raise ValueError(
                    f"a dictionary with normalization={self.normalization!r} or a skip decodes "
                    "relative to its input; give the rows as x."
                )
            return self._decode(code)
        scaled = self.scaled(x)
        return scaled.restored(self._decode(code, scaled.rows))

    def _decode(self, code: Code, rows: Tensor | None = None) -> Tensor:
        if isinstance(code, SparseCode):
            out = decode_sparse(code, self.decoder) + self.b_dec
        else:
            out = code @ self.decoder + self.b_dec
        out = out if self.after is None else self.after(out)
        return out if self.W_skip is None or rows is None else out + rows @ self.W_skip

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of rows (..., d_in): (..., d_out), in the dtype of the weights."""
        scaled = self.scaled(x.reshape(-1, x.shape[-1]))
        if self.nonlinearity.chooses:
            code: Code = self._code(scaled.rows)
        else:
            pre = self.read(scaled.rows) @ self.encoder.mT + self.b_enc
            code = self.activations(pre)
        out = scaled.restored(self._decode(code, scaled.rows))
        return out.reshape(*x.shape[:-1], self.d_out)

    @torch.no_grad()
    def fold_scale(self, scale_in: float, scale_out: float | None = None) -> Self:
        """Take on the scaling of the data it was trained on: from now on it reads them unscaled.

        A dictionary of ``x * scale_in`` with outputs ``y * scale_out`` becomes one of ``x`` and
        ``y`` with the same codes, in place.

        Parameters
        ----------
        scale_in, scale_out : float
            ``scale_out`` defaults to ``scale_in``.
        """
        scale_out = scale_in if scale_out is None else scale_out
        if min(scale_in, scale_out) <= 0:
            raise ValueError(f"scale_in={scale_in}, scale_out={scale_out} must be positive.")
        self.encoder.mul_(scale_in)
        for parameter in (self.decoder, self.b_dec):
            parameter.div_(scale_out)
        for rule in self.nonlinearity.modules():
            if self.rank_by_norm and isinstance(rule, BatchTopK):
                rule.threshold.div_(scale_out)
        if self.b_in is not None:
            self.b_in.div_(scale_in)
        if self.W_skip is not None:
            self.W_skip.mul_(scale_in / scale_out)
        for part, scale in ((self.before, scale_in), (self.after, scale_out)):
            if part is not None:
                part.inner.weight.mul_(scale)
                part.outer.weight.div_(scale)
                part.outer.bias.div_(scale)
        return self

    def constrain(self) -> None:
        """Bring weights back to where they are allowed, after a step of training."""

    def config(self) -> dict[str, Any]:
        """What makes the same dictionary again, tensors apart; JSON."""
        return {
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "d_out": self.d_out,
            "nonlinearity": self.nonlinearity.config(),
            "centered": self.centered,
            "normalization": self.normalization,
            "rank_by_norm": self.rank_by_norm,
            "skip": self.W_skip is not None,
            "deep": self.deep,
        }

    def save(self, directory: str | Path) -> None:
        """Write the dictionary to a directory that :meth:`load` reads, bit by bit."""
        config = {
            "made": self.config(),
            "origin": self.origin,
            "reads_shifted": self.b_in is not None,
        }
        artifact.save(directory, self.kind, self.state_dict(), config)

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """Read what :meth:`save` wrote; raises as :func:`manifold_unlearn.artifact.load`."""
        tensors, config, _ = artifact.load(directory, kind=cls.kind)
        coder = cls.made_of(config["made"])
        if config["reads_shifted"]:
            coder.b_in = nn.Parameter(torch.zeros(coder.d_in))
        coder.take(tensors)
        coder.origin = config["origin"]
        return coder

    @classmethod
    def made_of(cls, config: Mapping[str, Any]) -> Self:
        """Dictionary of a configuration, with fresh weights."""
        return cls(**config)

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Take on weights, their dtype included; raises if their names or shapes differ."""
        own = self.state_dict()
        if own.keys() != tensors.keys():
            raise ValueError(
                f"tensors {sorted(tensors)} are not those of a {type(self).__name__} "
                f"({sorted(own)})."
            )
        for name, value in tensors.items():
            if value.shape != own[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, not {tuple(own[name].shape)}."
                )
        self.to(tensors["encoder"].dtype)
        self.load_state_dict(dict(tensors))
