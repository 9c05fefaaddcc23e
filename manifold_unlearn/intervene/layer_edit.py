"""One layer's part of a least-squares bake: gather Gram matrices, solve, write, move on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from manifold_unlearn.activations.sites import find_decoder
from manifold_unlearn.intervene.block_stream import BlockStream, StreamPart, advance, tapped
from manifold_unlearn.intervene.linear import SiteLinear, linear_at
from manifold_unlearn.intervene.ridge import ridge_change
from manifold_unlearn.intervene.targets import StateTargets

Writer = Literal["mlp", "attn"]

N_HALVINGS = 5
"""Steps tried, each half the one before, where an edit's effect on the states is not linear."""


@dataclass(frozen=True)
class Solver:
    """Parameters of :func:`~manifold_unlearn.intervene.ridge.ridge_change`."""

    ridge: float
    null_space: float | None
    damping: float
    n_passes: int


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
        self.parts = list(parts)
        self.solver = solver
        self.device = next(model.parameters()).device
        self.solved_on = torch.device("cpu") if self.device.type == "mps" else self.device
        self.rank = targets.rank
        n_rows = int(targets.where.sum())
        self.weights = (torch.ones(n_rows) if weights is None else weights).to(torch.float64)
        self.retain_moved = 0.0
        self.linear = self.parts == ["mlp"] and not self.decoder.normalizes_writes
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

    def rounding(self, layer: int) -> float:
        """Distance that two passes of one model may have, batched otherwise."""
        states = self.targets.states[layer]
        precision = torch.finfo(states.dtype)
        factor = 1 if precision.bits == 16 else 16
        return factor * precision.eps * float(states.double().norm())

    def edit(
        self, layer: int, moving: BlockStream, held: BlockStream, aim: BlockStream | None
    ) -> float:
        """Solve one layer and lead both streams through it; return the tokens that ran.

        Parameters
        ----------
        layer : int
        moving, held : BlockStream
            The texts with targets and those to retain, before the layer.
        aim : BlockStream, optional
            The texts to retain behind this layer of the original model, to be come back to. None:
            ``held`` is led through the layer as it was.
        """
        linears = [self._writer(layer, part) for part in self.parts]
        first = [linear.weight_as(self.solved_on) for linear in linears]
        retain = _Retained(self, layer, linears, held, aim)
        gathered = _Gathered(self, layer, linears, moving)
        n_run = held.n_tokens + moving.n_tokens
        if self.linear:
            change = self._solved(gathered, retain, 0, self.solver.n_passes)
            gathered.lead(_apply(linears[0], change))
        else:
            for stage, place in enumerate(list(range(len(linears))) * self.solver.n_passes):
                if stage and aim is not None:
                    retain = _Retained(self, layer, linears, held, aim)
                    n_run += held.n_tokens
                change = self._solved(gathered, retain, place, 1)
                change = change[: linears[place].weight_as(self.solved_on).shape[1]]
                gathered, n_trials = self._stepped(linears, place, change, gathered, layer, moving)
                n_run += n_trials * moving.n_tokens
            gathered.lead()
        if aim is not None:
            n_run += int(self.pass_by(held, layer))
        self.retain_moved = _moved(linears, first, retain.gram)
        return n_run

    def _solved(self, gathered: _Gathered, retain: _Retained, place: int, n_passes: int) -> Tensor:
        """Change of the writers from this place in the block on, on top of each other."""
        start = sum(gathered.widths[:place])
        n_held = retain.n_rows + gathered.n_held
        return ridge_change(
            gathered.gram[start:, start:],
            gathered.cross[start:],
            (retain.gram + gathered.held_gram)[start:, start:] / n_held,
            retain_cross=None if retain.cross is None else retain.cross[start:] / n_held,
            ridge=self.solver.ridge,
            null_space=self.solver.null_space,
            damping=self.solver.damping,
            n_passes=n_passes,
        )

    def _stepped(
        self,
        linears: Sequence[SiteLinear],
        place: int,
        change: Tensor,
        before: _Gathered,
        layer: int,
        moving: BlockStream,
    ) -> tuple[_Gathered, int]:
        """Write a change whose effect is not linear, halved until the states come closer."""
        weight = linears[place].weight_as(self.solved_on)
        for halvings in range(N_HALVINGS):
            linears[place].write(weight + change.T / 2**halvings)
            after = _Gathered(self, layer, linears, moving)
            if after.distance < before.distance:
                return after, halvings + 1
        linears[place].write(weight)
        return before, N_HALVINGS

    def _writer(self, layer: int, part: Writer) -> SiteLinear:
        linear = linear_at(self.model, f"layers.{layer}.{part}")
        assert linear is not None
        return linear

    def _keys(self, seen: Sequence[tuple[Tensor, Tensor]], mask: Tensor) -> Tensor:
        return torch.cat([keys[mask].to(self.solved_on, torch.float64) for keys, _ in seen], dim=1)

    def _missing(self, part: StreamPart, output: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """What the states of a part still lack (n, d), float64, and the weights of these rows."""
        mask = part.where.cpu()
        rank = self.rank[part.index, : mask.shape[1]][mask]
        target = self.targets.states[layer][rank].to(self.solved_on, torch.float64)
        reached = output[part.where].to(self.solved_on, torch.float64)
        return target - reached, self.weights[rank].to(self.solved_on)

    def before_norm(self, layer: int, missing: Tensor, written: Tensor) -> Tensor:
        """What the writer has to add so that a change comes out behind its norm (but for scale)."""
        if not self.decoder.normalizes_writes:
            return missing
        block: Any = self.decoder.blocks[layer]
        norm = (
            block.post_feedforward_layernorm
            if self.parts == ["mlp"]
            else block.post_attention_layernorm
        )
        gain = norm(torch.ones_like(written[:1])).to(missing)
        size = written.to(missing).square().mean(1, keepdim=True).sqrt()
        usable = gain.abs() > 1e-3 * gain.abs().max()
        return torch.where(usable, missing * size / torch.where(usable, gain, 1.0), 0.0)


class _Retained:
    """Gram matrix of one layer's keys at retain tokens, before the layer is edited."""

    def __init__(
        self,
        run: LayerEdit,
        layer: int,
        linears: Sequence[SiteLinear],
        held: BlockStream,
        aim: BlockStream | None,
    ):
        zero: Any = 0.0
        self.gram, self.n_rows = zero, 0
        self.cross: Tensor | None = None
        goals = [None] * len(held.parts) if aim is None else [part.hidden for part in aim]
        with tapped(linears) as seen:
            for part, goal in zip(held, goals, strict=True):
                output = part.through(run.decoder.blocks[layer], layer)
                keys = run._keys(seen, part.where)
                self.gram = self.gram + keys.T @ keys
                self.n_rows += len(keys)
                if goal is None:
                    part.hidden = output
                    continue
                drift = (goal - output)[part.where].to(keys)
                lost = keys.T @ run.before_norm(layer, drift, seen[0][1][part.where])
                self.cross = lost if self.cross is None else self.cross + lost


class _Gathered:
    """Gram matrices of one layer at the targets' texts, from one run of the block."""

    def __init__(
        self, run: LayerEdit, layer: int, linears: Sequence[SiteLinear], moving: BlockStream
    ):
        self.outputs: list[tuple[StreamPart, Tensor, Tensor]] = []
        zero: Any = 0.0
        self.gram, self.cross, self.held_gram, self.n_held = zero, zero, zero, 0
        self.distance = 0.0
        total = run.weights.sum().to(run.solved_on)
        with tapped(linears) as seen:
            for part in moving:
                output = part.through(run.decoder.blocks[layer], layer)
                keys = run._keys(seen, part.where)
                missing, weight = run._missing(part, output, layer)
                weight = (weight / total)[:, None]
                self.distance += float((weight * missing.square()).sum())
                change = run.before_norm(layer, missing, seen[0][1][part.where])
                self.gram = self.gram + (weight * keys).T @ keys
                self.cross = self.cross + (weight * keys).T @ change
                others = run._keys(seen, part.present & ~part.where)
                self.held_gram = self.held_gram + others.T @ others
                self.n_held += len(others)
                self.outputs.append((part, output, seen[0][0] if run.linear else output[:0]))
        self.widths = [keys.shape[-1] for keys, _ in seen]

    def lead(self, change: Tensor | None = None) -> None:
        """Lead the texts behind the block, where a change of the MLP adds ``keys @ change``."""
        for part, output, keys in self.outputs:
            if change is not None:
                moved = keys.to(change.device, torch.float64) @ change
                output = (output.to(moved) + moved).to(output)
            part.hidden = output


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
