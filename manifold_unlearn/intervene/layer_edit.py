"""One layer's part of a least-squares bake: gather Gram matrices, solve, write, move on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from manifold_unlearn.activations.sites import find_decoder
from manifold_unlearn.intervene.block_stream import BlockStream, StreamPart, tapped
from manifold_unlearn.intervene.linear import SiteLinear, linear_at
from manifold_unlearn.intervene.ridge import ridge_change
from manifold_unlearn.intervene.targets import StateTargets

Writer = Literal["mlp", "attn"]


@dataclass(frozen=True)
class Solver:
    """Parameters of :func:`~manifold_unlearn.intervene.ridge.ridge_change`."""

    ridge: float
    null_space: float | None
    damping: float
    n_passes: int


def advance(stream: BlockStream, block: Any, layer: int) -> None:
    """Lead all texts through a block."""
    for part in stream:
        part.hidden = part.through(block, layer)


class LayerEdit:
    """The edited model and its targets, while the layers are solved one after the other.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its writers change.
    targets : StateTargets
    weights : Tensor of shape (where.sum(),), optional
    parts : sequence of {"attn", "mlp"}
        In the order in which a block runs them.
    solver : Solver
    """

    def __init__(
        self,
        model: Any,
        targets: StateTargets,
        weights: Tensor | None,
        parts: Sequence[Writer],
        solver: Solver,
    ):
        self.decoder = find_decoder(model)
        self.model = model
        self.targets = targets
        self.parts = parts
        self.solver = solver
        self.device = next(model.parameters()).device
        self.solved_on = torch.device("cpu") if self.device.type == "mps" else self.device
        self.rank = targets.where.flatten().cumsum(0).reshape(targets.where.shape) - 1
        n_rows = int(targets.where.sum())
        self.weights = (torch.ones(n_rows) if weights is None else weights).to(torch.float64)
        self.retain_moved = 0.0
        self.linear = list(parts) == ["mlp"] and not self.decoder.normalizes_writes
        """Whether what the edit writes arrives in the stream unchanged."""

    def pass_by(self, stream: BlockStream, layer: int) -> float:
        """Lead all texts through the edited model's block; return the tokens that ran."""
        advance(stream, self.decoder.blocks[layer], layer)
        return stream.n_tokens

    def distance(self, stream: BlockStream, layer: int) -> float:
        """Frobenius distance of the states that left a block from the targets behind it."""
        total = 0.0
        for part in stream:
            total += float(self._missing(part, part.hidden, layer)[0].square().sum())
        return total**0.5

    def edit(self, layer: int, moving: BlockStream, held: BlockStream, recapture: bool) -> float:
        """Solve one layer and lead both streams through it; return the tokens that ran."""
        linears = [self._writer(layer, part) for part in self.parts]
        first = [linear.weight_as(self.solved_on) for linear in linears]
        retain_gram, n_retain = self._retain_gram(held, layer, linears, commit=not recapture)
        n_run = float(held.n_tokens)
        stages = [(slice(0, 2), 0), (slice(1, 2), 1)] if len(linears) == 2 else [(slice(0, 1), 0)]
        for _ in range(1 if self.linear else self.solver.n_passes):
            for solved, applied in stages:
                gathered = _Gathered(self, layer, linears[solved], moving)
                n_run += moving.n_tokens
                widths = [linear.weight_as("cpu").shape[1] for linear in linears]
                span = slice(sum(widths[: solved.start]), sum(widths))
                hold = retain_gram[span, span] + gathered.held_gram
                change = ridge_change(
                    gathered.gram,
                    gathered.cross,
                    hold / (n_retain + gathered.n_held),
                    ridge=self.solver.ridge,
                    null_space=self.solver.null_space,
                    damping=self.solver.damping,
                    n_passes=self.solver.n_passes if self.linear else 1,
                )
                shift = _apply(linears[applied], change[: widths[applied]])
        if self.linear:
            gathered.shift(shift)
        else:
            n_run += self.pass_by(moving, layer)
        if recapture:
            n_run += self.pass_by(held, layer)
        self.retain_moved = _moved(linears, first, retain_gram)
        return n_run

    def _writer(self, layer: int, part: Writer) -> SiteLinear:
        linear = linear_at(self.model, f"layers.{layer}.{part}")
        assert linear is not None
        return linear

    def _retain_gram(
        self, held: BlockStream, layer: int, linears: Sequence[SiteLinear], *, commit: bool
    ) -> tuple[Tensor, int]:
        """Sum of outer products of the keys at retain tokens, before this layer is edited."""
        gram: Tensor | float = 0.0
        count = 0
        with tapped(linears) as seen:
            for part in held:
                output = part.through(self.decoder.blocks[layer], layer)
                rows = self._keys(seen, part.where & part.present)
                gram = gram + rows.T @ rows
                count += len(rows)
                if commit:
                    part.hidden = output
        assert isinstance(gram, Tensor)
        return gram, count

    def _keys(self, seen: Sequence[tuple[Tensor, Tensor]], mask: Tensor) -> Tensor:
        return torch.cat([keys[mask].to(self.solved_on, torch.float64) for keys, _ in seen], dim=1)

    def _missing(self, part: StreamPart, output: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """What the states of a part still lack (n, d), float64, and the weights of these rows."""
        mask = part.where.cpu()
        rank = self.rank[part.index, : mask.shape[1]][mask]
        target = self.targets.states[layer][rank].to(self.solved_on, torch.float64)
        reached = output[part.where].to(self.solved_on, torch.float64)
        return target - reached, self.weights[rank].to(self.solved_on)

    def before_norm(self, layer: int, part: Writer, missing: Tensor, written: Tensor) -> Tensor:
        """Change of what a writer writes that makes a change behind its norm, but for its scale."""
        if not self.decoder.normalizes_writes:
            return missing
        block: Any = self.decoder.blocks[layer]
        norm = block.post_feedforward_layernorm if part == "mlp" else block.post_attention_layernorm
        gain = norm(torch.ones_like(written[:1])).to(missing)
        size = written.to(missing).square().mean(1, keepdim=True).sqrt()
        usable = gain.abs() > 1e-3 * gain.abs().max()
        return torch.where(usable, missing * size / torch.where(usable, gain, 1.0), 0.0)


class _Gathered:
    """Gram matrices of one layer at the targets' texts, from one run of the block."""

    def __init__(
        self, run: LayerEdit, layer: int, linears: Sequence[SiteLinear], moving: BlockStream
    ):
        self.outputs: list[tuple[StreamPart, Tensor, Tensor]] = []
        zero: Any = 0.0
        self.gram, self.cross, self.held_gram, self.n_held = zero, zero, zero, 0
        total = run.weights.sum().to(run.solved_on)
        with tapped(linears) as seen:
            for part in moving:
                output = part.through(run.decoder.blocks[layer], layer)
                keys = run._keys(seen, part.where)
                missing, weight = run._missing(part, output, layer)
                written = seen[0][1][part.where]
                change = run.before_norm(layer, run.parts[-len(linears)], missing, written)
                weighted = keys * (weight / total)[:, None]
                self.gram = self.gram + weighted.T @ keys
                self.cross = self.cross + weighted.T @ change
                others = run._keys(seen, part.present & ~part.where)
                self.held_gram = self.held_gram + others.T @ others
                self.n_held += len(others)
                if run.linear:
                    self.outputs.append((part, output, seen[0][0]))

    def shift(self, change: Tensor) -> None:
        """Lead the texts behind the block, where the edit adds ``keys @ change``."""
        for part, output, keys in self.outputs:
            moved = keys.to(change.device, torch.float64) @ change
            part.hidden = (output.to(moved) + moved).to(output)


def _apply(linear: SiteLinear, change: Tensor) -> Tensor:
    """Add a change ``(d_in, d_out)`` to a weight; return what the weight's dtype keeps of it."""
    before = linear.weight_as(change.device)
    linear.write(before + change.T)
    return (linear.weight_as(change.device) - before).T


def _moved(linears: Sequence[SiteLinear], first: Sequence[Tensor], gram: Tensor) -> float:
    """Frobenius norm of what the change writes at retain keys, over what was written there."""
    old = torch.cat(list(first), dim=1)
    new = torch.cat([linear.weight_as(old.device) for linear in linears], dim=1)
    size = [float(((w @ gram) * w).sum().clamp(min=0).sqrt()) for w in (new - old, old)]
    return size[0] / size[1] if size[1] > 0 else 0.0
