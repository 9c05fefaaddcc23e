"""How few latents a dictionary uses, and how close what it makes of rows comes to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.activations.models import evaluating
from manifold_unlearn.arrays import require_finite, row_blocks
from manifold_unlearn.dictionary import (
    CrossLayerTranscoder,
    SparseCode,
    SparseCoder,
)
from manifold_unlearn.evaluate.dictionary_moments import Spread
from manifold_unlearn.evaluate.meta import percentiles

Coder: TypeAlias = "SparseCoder | CrossLayerTranscoder"

DENSE = 0.1
"""A latent is dense where it fires on more than this share of rows."""
N_RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class LatentUse:
    """Which latents of one code fire over rows, and how many at a time."""

    n_rows: int
    l0_counts: np.ndarray
    """(largest L0 + 1,) int64: rows with so many latents"""
    n_fired: np.ndarray
    """(d_sae,) int64: rows in which each latent fires"""
    total: np.ndarray
    """(d_sae,) float64: sum of the absolute activations of each latent"""

    @property
    def l0(self) -> float:
        """Latents that fire, mean over rows."""
        return float(self.n_fired.sum() / self.n_rows)

    @property
    def l1(self) -> float:
        """Sum of the absolute activations of a row, mean over rows."""
        return float(self.total.sum() / self.n_rows)

    def l0_quantile(self, q: float) -> int:
        """Least L0 that a share ``q`` of the rows does not exceed."""
        if not 0 <= q <= 1:
            raise ValueError(f"q={q} must be between 0 and 1.")
        return int(np.searchsorted(self.l0_counts.cumsum(), q * self.n_rows))

    @property
    def frequency(self) -> np.ndarray:
        """(d_sae,) float64: share of rows in which each latent fires."""
        return self.n_fired / self.n_rows

    @property
    def dead(self) -> float:
        """Share of latents that never fire."""
        return float((self.n_fired == 0).mean())

    @property
    def dense(self) -> float:
        """Share of latents that fire on more than a tenth of the rows."""
        return float((self.frequency > DENSE).mean())

    def to_json(self) -> dict[str, Any]:
        """The figures, without those of single latents."""
        return {
            "n_rows": self.n_rows,
            "l0": self.l0,
            "l0_median": self.l0_quantile(0.5),
            "l0_largest": len(self.l0_counts) - 1,
            "l1": self.l1,
            "dead": self.dead,
            "dense": self.dense,
        }


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """How close outputs ``y_hat`` come to targets ``y``, ``(n, d)``, at one site."""

    n_rows: int
    errors: Spread
    """of ``y - y_hat``"""
    targets: Spread
    mean_square: float
    """of ``norm(y_hat)`` over the rows"""
    mean_product: float
    """of ``y . y_hat`` over the rows"""
    cosine: float
    """Mean over the rows; those with ``y = 0`` or ``y_hat = 0`` are left out."""
    l2_ratio: float
    """Mean of ``norm(y_hat) / norm(y)``; rows with ``y = 0`` are left out."""
    n_zero: int
    """Rows left out of the cosine."""
    explained_by_row: float | None
    """Mean over the rows of ``1 - norm(y - y_hat)**2 / norm(y - mean(y))**2``:
    ``explained_variance_legacy`` in SAELens and SAEBench. None for a stream, whose mean is not
    known before, and where a row is the mean."""
    by_group: np.ndarray | None
    """(n_groups, 2) float64: squared error and squared distance from the mean, summed a group"""

    @property
    def mse(self) -> float:
        """Squared error, mean over rows and dimensions."""
        return self.squared_error / (self.n_rows * len(self.errors.mean))

    @property
    def fvu(self) -> float:
        """``sum norm(y - y_hat)**2 / sum norm(y - mean(y))**2``, as sparsify has it."""
        return self.squared_error / float(self.targets.scatter.sum())

    @property
    def explained_variance(self) -> float:
        """``1 - fvu``: ``explained_variance`` in SAELens."""
        return 1 - self.fvu

    @property
    def explained_without_bias(self) -> float:
        """``1 - var(y - y_hat) / var(y)``, with the variances summed over dimensions.

        An error that is the same for all rows is free. ``frac_variance_explained`` in
        dictionary_learning.
        """
        return 1 - float(self.errors.scatter.sum() / self.targets.scatter.sum())

    @property
    def fvu_by_dimension(self) -> np.ndarray:
        """(d,) float64: the FVU of each dimension; NaN where the target does not vary."""
        found = self.errors.second_moments
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = (found / self.targets.scatter).numpy()
        return np.where(self.targets.scatter.numpy() > 0, ratio, np.nan)

    @property
    def relative_bias(self) -> float:
        """``mean norm(y_hat)**2 / mean y . y_hat``: below 1 where outputs are shrunk.

        References
        ----------
        Rajamanoharan et al. (2024), Improving dictionary learning with gated sparse autoencoders.
        """
        return self.mean_square / self.mean_product if self.mean_product else float("nan")

    @property
    def fvu_interval(self) -> tuple[float, float] | None:
        """95 % percentile bootstrap of the FVU over the groups, from a fixed seed."""
        if self.by_group is None:
            return None
        n = len(self.by_group)
        drawn = np.random.default_rng(0).integers(0, n, size=(N_RESAMPLES, n))
        error, spread = self.by_group[drawn].sum(axis=1).T
        return percentiles(error / spread)

    @property
    def squared_error(self) -> float:
        """``norm(y - y_hat)**2``, summed over the rows."""
        return float(self.errors.second_moments.sum())

    def to_json(self) -> dict[str, Any]:
        """All figures; null where one is undefined."""
        interval = self.fvu_interval
        return {
            "n_rows": self.n_rows,
            "fvu": self.fvu,
            "fvu_interval": None if interval is None else list(interval),
            "explained_variance": self.explained_variance,
            "explained_without_bias": self.explained_without_bias,
            "explained_by_row": self.explained_by_row,
            "mse": self.mse,
            "cosine": self.cosine,
            "l2_ratio": self.l2_ratio,
            "relative_bias": self.relative_bias if self.mean_product else None,
            "n_zero": self.n_zero,
        }


@dataclass(frozen=True, eq=False)
class DictionaryFidelity:
    """A dictionary over rows: its codes, and what it makes of them at each site."""

    codes: tuple[LatentUse, ...]
    """One; for a cross-layer transcoder one a layer"""
    outputs: tuple[Reconstruction, ...]
    """One; for a crosscoder one a stream, for a cross-layer transcoder one a layer"""

    @property
    def l0(self) -> float:
        """Latents that fire a row, over all codes."""
        return sum(use.l0 for use in self.codes)

    @property
    def fvu(self) -> float:
        """Of all outputs together: their squared errors over their variances."""
        errors = sum(out.squared_error for out in self.outputs)
        return errors / sum(float(out.targets.scatter.sum()) for out in self.outputs)

    def to_json(self) -> dict[str, Any]:
        """Everything but the figures of single latents."""
        return {
            "l0": self.l0,
            "fvu": self.fvu,
            "codes": [use.to_json() for use in self.codes],
            "outputs": [out.to_json() for out in self.outputs],
        }


class _Tally:
    """Sums over the rows of a dictionary that were seen so far, in float64."""

    def __init__(self, coder: Coder, means: Tensor | None, n_groups: int) -> None:
        self.coder, self.n_rows = coder, 0
        place = coder.device
        self.place = torch.device("cpu") if place.type == "mps" else place  # which has no float64
        self.means = None if means is None else means.to(self.place)
        n_codes = coder.n_layers if isinstance(coder, CrossLayerTranscoder) else 1
        self.n_fired = torch.zeros(n_codes, coder.d_sae, dtype=torch.int64)
        self.total = torch.zeros(n_codes, coder.d_sae, dtype=torch.float64)
        self.l0_counts = torch.zeros(n_codes, coder.d_sae + 1, dtype=torch.int64)
        self.errors: Spread | None = None
        self.targets: Spread | None = None
        self.sums: dict[str, Tensor] = {}
        self.by_group = None if n_groups == 0 else torch.zeros(n_groups, 0, 2).double()

    def add(self, x: Tensor, y: Tensor, groups: Tensor | None) -> None:
        """Take in one block of rows and their targets."""
        x = x.to(self.coder.device, self.coder.dtype)
        codes, found = _run(self.coder, x)
        wanted, found = (_apart(rows.detach().to(self.place).double()) for rows in (y, found))
        if found.shape != wanted.shape:
            raise ValueError(
                f"the dictionary answers rows {tuple(found.shape[1:])}; the targets are "
                f"{tuple(wanted.shape[1:])}, streams and width."
            )
        require_finite(found, "the dictionary's outputs")
        self.n_rows += len(x)
        for i, code in enumerate(codes):
            self._count(i, code)
        self._compare(wanted, found, groups)

    def _count(self, i: int, code: SparseCode) -> None:
        fires = code.value != 0
        row, latent = code.row[fires].cpu(), code.latent[fires].cpu()
        size = code.value[fires].abs().to("cpu", torch.float64)
        self.n_fired[i] += torch.bincount(latent, minlength=code.n_latents)
        self.total[i] += torch.bincount(latent, size, minlength=code.n_latents)
        l0 = torch.bincount(row, minlength=code.n_rows)
        self.l0_counts[i] += torch.bincount(l0, minlength=code.n_latents + 1)

    def _compare(self, y: Tensor, y_hat: Tensor, groups: Tensor | None) -> None:
        error = y - y_hat
        spread, varied = Spread.of(error), Spread.of(y)
        self.errors = spread if self.errors is None else self.errors.merge(spread)
        self.targets = varied if self.targets is None else self.targets.merge(varied)
        norm, norm_hat = y.norm(dim=2), y_hat.norm(dim=2)
        product = (y * y_hat).sum(2)
        there, both = norm > 0, (norm > 0) & (norm_hat > 0)
        one = torch.ones_like(norm)
        parts = {
            "square": norm_hat.square(),
            "product": product,
            "cosine": torch.where(both, product / torch.where(both, norm * norm_hat, one), 0),
            "n_both": both.double(),
            "ratio": torch.where(there, norm_hat / torch.where(there, norm, one), 0),
            "n_there": there.double(),
        }
        if self.means is not None:
            apart = (y - self.means).square().sum(2)
            parts["by_row"] = (
                1 - error.square().sum(2) / apart
            )  # a row that is the mean: not finite
            if self.by_group is not None and groups is not None:
                pair = torch.stack([error.square().sum(2), apart], dim=2).cpu()
                if self.by_group.shape[1] == 0:
                    self.by_group = self.by_group.new_zeros(len(self.by_group), *pair.shape[1:])
                self.by_group.index_add_(0, groups, pair)
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0) + value.sum(0)

    def result(self) -> DictionaryFidelity:
        if self.errors is None or self.targets is None:
            raise ValueError("there are no rows; give at least one.")
        codes = tuple(
            LatentUse(
                self.n_rows,
                np.trim_zeros(counts.numpy(), "b"),
                fired.numpy(),
                total.numpy(),
            )
            for counts, fired, total in zip(self.l0_counts, self.n_fired, self.total, strict=True)
        )
        n_streams = len(self.errors.mean)
        return DictionaryFidelity(codes, tuple(self._output(i) for i in range(n_streams)))

    def _output(self, i: int) -> Reconstruction:
        assert self.errors is not None and self.targets is not None
        sums = {name: float(value[i]) for name, value in self.sums.items()}
        targets = self.targets.stream(i)
        if not float(targets.scatter.sum()) > 0:
            raise ValueError(
                f"the {self.n_rows} target rows of stream {i} are all alike: no share of their "
                "variance can be told. Give rows that differ."
            )
        n, n_both, n_there = self.n_rows, sums["n_both"], sums["n_there"]
        by_row = sums["by_row"] / n if "by_row" in sums else None
        return Reconstruction(
            n_rows=n,
            errors=self.errors.stream(i),
            targets=targets,
            mean_square=sums["square"] / n,
            mean_product=sums["product"] / n,
            cosine=sums["cosine"] / n_both if n_both else 0.0,
            l2_ratio=sums["ratio"] / n_there,
            n_zero=n - round(n_both),
            explained_by_row=by_row if by_row is not None and np.isfinite(by_row) else None,
            by_group=None if self.by_group is None else self.by_group[:, i].numpy(),
        )


def _run(coder: Coder, x: Tensor) -> tuple[list[SparseCode], Tensor]:
    """Sparse codes of a block of rows, and the outputs."""
    if isinstance(coder, CrossLayerTranscoder):
        codes = coder.codes(x)
        sparse = [c if isinstance(c, SparseCode) else SparseCode.of(c) for c in codes]
        return sparse, coder.decode(sparse, x)
    code = coder.code(x)
    return [code], coder.decode(code, x)


def _apart(rows: Tensor) -> Tensor:
    """Rows as (n, streams, d)."""
    return rows[:, None] if rows.ndim == 2 else rows


def dictionary_fidelity(
    coder: Coder,
    rows: Tensor,
    targets: Tensor | None = None,
    *,
    groups: Sequence[int] | np.ndarray | Tensor | None = None,
    block: int = 4096,
) -> DictionaryFidelity:
    """Sparsity and reconstruction of a dictionary over rows in memory.

    In blocks, with sums in float64 merged exactly: the block changes nothing, and no array of
    rows by latents is ever made of more than one block.

    Parameters
    ----------
    coder : SparseCoder or CrossLayerTranscoder
        Put in evaluation mode meanwhile.
    rows : Tensor of shape (n, d_in)
        For a crosscoder (n, n_streams, d_stream), for a cross-layer transcoder (n, n_layers, d_in).
    targets : Tensor of shape (n, d_out) or (n, streams, d_out), optional
        What a transcoder shall write. Default: the rows, which autoencoders and crosscoders make
        again; transcoders need it.
    groups : sequence of int of shape (n,), optional
        Which text each row is of: gives the FVU an interval over texts.
    block : int, default=4096

    Returns
    -------
    DictionaryFidelity

    Raises
    ------
    ValueError
        No rows, NaN or infinity (names the row), a transcoder without targets, shapes that do not
        fit, targets that are all alike.

    Examples
    --------
    >>> import torch
    >>> from manifold_unlearn.dictionary import SparseAutoencoder
    >>> from manifold_unlearn.evaluate import dictionary_fidelity
    >>> sae = SparseAutoencoder(8, 32, {"name": "topk", "k": 4}, random_state=0)
    >>> found = dictionary_fidelity(sae, torch.randn(100, 8))
    >>> found.l0 <= 4, found.outputs[0].fvu == 1 - found.outputs[0].explained_variance
    (True, True)
    """
    wanted = _targets(coder, rows, targets)
    if len(rows) != len(wanted) or len(rows) == 0:
        raise ValueError(f"{len(rows)} rows with {len(wanted)} targets; give at least one of each.")
    for name, given in (("rows", rows), ("targets", wanted)):
        require_finite(given, name)
    index, n_groups = _grouped(groups, len(rows))
    means = _apart(wanted).mean(0, dtype=torch.float64)
    tally = _Tally(coder, means, n_groups)
    with evaluating(coder), torch.no_grad():
        for part in row_blocks(len(rows), block):
            tally.add(rows[part], wanted[part], None if index is None else index[part])
    return tally.result()


def dictionary_fidelities(
    coders: Mapping[str, Coder], batches: Iterable[Mapping[str, Any]], *, block: int = 4096
) -> dict[str, DictionaryFidelity]:
    """Sparsity and reconstruction of several dictionaries over one stream of batches.

    Parameters
    ----------
    coders : mapping of str to SparseCoder or CrossLayerTranscoder
    batches : iterable of mappings of str to rows, or to (rows, targets)
        As :func:`~manifold_unlearn.dictionary.streams.stream_activations` gives them; gone through
        once.
    block : int, default=4096

    Returns
    -------
    dict of str to DictionaryFidelity
        Without ``explained_by_row`` and intervals, which need all rows.

    Raises
    ------
    ValueError
        As :func:`dictionary_fidelity`; a batch without the rows of a dictionary.
    """
    tallies = {name: _Tally(coder, None, 0) for name, coder in coders.items()}
    with ExitStack() as stack, torch.no_grad():
        for coder in coders.values():
            stack.enter_context(evaluating(coder))
        for batch in batches:
            for name, tally in tallies.items():
                if name not in batch:
                    raise ValueError(f"a batch has rows of {sorted(batch)}, none of {name!r}.")
                given = batch[name]
                rows, targets = given if isinstance(given, tuple) else (given, None)
                wanted = _targets(tally.coder, rows, targets)
                for what, array in (("rows", rows), ("targets", wanted)):
                    require_finite(array, f"{what} of {name!r}")
                for part in row_blocks(len(rows), block):
                    tally.add(rows[part], wanted[part], None)
    return {name: tally.result() for name, tally in tallies.items()}


def _targets(coder: Coder, rows: Tensor, targets: Tensor | None) -> Tensor:
    if targets is not None:
        return targets
    if getattr(coder, "kind", "") in ("SparseAutoencoder", "Crosscoder"):
        return rows
    raise ValueError(
        f"a {type(coder).__name__} writes other rows than it reads; give those of the site it "
        "writes to as targets."
    )


def _grouped(groups: Any, n: int) -> tuple[Tensor | None, int]:
    if groups is None:
        return None, 0
    values = np.asarray(groups)
    if values.shape != (n,):
        raise ValueError(f"groups has shape {values.shape}; expected ({n},), one a row.")
    names, index = np.unique(values, return_inverse=True)
    return torch.from_numpy(index), len(names)
