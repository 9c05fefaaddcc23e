"""Gradient steps toward the states a model shall have, while those of retain texts are held."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from manifold_unlearn.activations.sites import find_decoder
from manifold_unlearn.arrays import generator
from manifold_unlearn.finetune.batches import LabeledBatch
from manifold_unlearn.finetune.reference import frozen_copy, hidden_states
from manifold_unlearn.finetune.rules import Descent, Run, Terms
from manifold_unlearn.intervene.hooks import intervene
from manifold_unlearn.intervene.targets import StateTargets


@dataclass(frozen=True, eq=False)
class ManifoldMatching:
    r"""Residual states of forget texts go to their targets, those of retain texts stay.

    With ``h_l`` the state after block ``l``, ``t_l`` its target and ``v_l`` the total variance of
    the targets there, descends

    - ``forget``: the sum over layers of ``mean |h_l - t_l|^2 / v_l`` at the tokens that have
      targets, plus ``beta`` times what the last of the layers adds to it when the states that
      ``original`` has on the same texts are put back after an earlier block;
    - ``retain``: ``alpha`` times the sum over layers of ``mean |h_l - r_l|^2 / v_l``, with ``r_l``
      the state of ``original`` on the retain texts.

    Moving a subject's states alone redirects it: blocks that turn its former states into its facts
    stand as before, and the facts come back together when one is learned again. The part that
    ``beta`` weighs takes from each block what it would make of them.

    Attributes
    ----------
    targets : StateTargets
        Of all forget texts given to :func:`~manifold_unlearn.finetune.train.train`. They are found
        by their tokens, whatever the order; one that stands there twice has two targets in turn.
    original : transformers.PreTrainedModel, optional
        The model before any edit: give it where a baked model is trained. Never changed. None: the
        model trained, as it is at the start, of which a copy is kept.
    alpha : float, default=1
        Weight of the retain part; 0 leaves it out.
    beta : float, default=1
        Weight of the states put back; 0 leaves them out, and spares a third of the cost.
    layers : sequence of int, optional
        Blocks after which states are matched, among those of the targets. None: all of these.

    Notes
    -----
    A step costs a forward and a backward pass of the forget and of the retain batch, a forward pass
    of the retain batch in ``original``, and with ``beta`` as much again for the forget batch: 7
    forward passes of a batch, or 11. The block behind which states are put back is drawn anew each
    step, among those before the last of the layers. The first token of a text is not held: where it
    is a sink its norm would swamp all others. Gradients that would move retain texts can be taken
    out by :class:`~manifold_unlearn.finetune.disentangle.Disentangled`.
    """

    targets: StateTargets
    original: Any | None = None
    alpha: float = 1.0
    beta: float = 1.0
    layers: Sequence[int] | None = None
    name: ClassVar[str] = "manifold"

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be finite and not negative.")

    @property
    def needs_retain(self) -> bool:
        """Unless ``alpha`` is 0."""
        return self.alpha > 0

    def bind(self, run: Run) -> Descent:
        """Find the targets of the forget texts; return the rule of one run.

        Raises
        ------
        ValueError
            A forget text without targets, layers that have none, targets of another width, or that
            are not finite or all zero.
        """
        aim = _aim(self.targets, run, self.layers)
        original = self.original
        if original is None and (self.alpha or self.beta):
            original = frozen_copy(run.model)
        draw = generator(run.random_state + 3)

        def terms(forget: LabeledBatch, retain: LabeledBatch | None) -> Terms:
            row = aim.rows(forget)
            now = hidden_states(run.model, aim.sites, forget)
            near = [aim.distance(i, h, row) for i, h in zip(aim.layers, now, strict=True)]
            found = {"forget": _total(near)}
            if self.beta and aim.layers[-1] > 0:
                entry = int(torch.randint(aim.layers[-1], (), generator=draw))
                reached = _put_back(run.model, original, entry, aim.sites[-1], forget, row >= 0)
                again = aim.distance(aim.layers[-1], reached, row)
                found["forget"] = found["forget"] + self.beta * again
            if self.alpha:
                assert retain is not None
                found["retain"] = self.alpha * _drift(run.model, original, aim, retain)
            return found

        return Descent(run, terms)


@dataclass(frozen=True, eq=False)
class _Aim:
    """Targets in the layout of a run's batches: padded on the right, in the order of its rows."""

    states: Mapping[int, Tensor]
    scale: Mapping[int, Tensor]
    row: Tensor
    """int64 (n_texts, width): row of the states that belongs to a token, or -1"""

    @property
    def layers(self) -> list[int]:
        return list(self.states)

    @property
    def sites(self) -> list[str]:
        return [f"layers.{i}" for i in self.states]

    def rows(self, batch: LabeledBatch) -> Tensor:
        return self.row[batch.index, : batch.input_ids.shape[1]]

    def distance(self, layer: int, hidden: Tensor, row: Tensor) -> Tensor:
        """Mean squared distance to the targets of a layer, in units of their variance."""
        place = row >= 0
        gap = hidden[place].float() - self.states[layer][row[place]]
        return gap.square().sum(-1).mean() / self.scale[layer]


def _aim(targets: StateTargets, run: Run, layers: Sequence[int] | None) -> _Aim:
    chosen = sorted(targets.states if layers is None else set(layers))
    missing = [i for i in chosen if i not in targets.states]
    if missing or not chosen:
        raise ValueError(
            f"layers={missing or chosen} have no targets; there are targets after the blocks "
            f"{sorted(targets.states)}."
        )
    states = {i: targets.states[i].to(run.device).float() for i in chosen}
    width = int(next(find_decoder(run.model).final_norm.parameters()).shape[0])
    for i, state in states.items():
        if state.shape[1] != width:
            raise ValueError(
                f"the targets after block {i} have width {state.shape[1]}, the model {width}; "
                "compute them with a model of the same shape."
            )
    return _Aim(
        states, {i: _scale(i, state) for i, state in states.items()},
        _rows(targets, run).to(run.device),
    )  # fmt: skip


def _scale(layer: int, states: Tensor) -> Tensor:
    """Total variance, or mean square where all targets agree."""
    if not bool(torch.isfinite(states).all()):
        raise ValueError(
            f"the targets after block {layer} are not finite; compute them in float32 or bfloat16."
        )
    square = states.square().sum(1).mean()
    if float(square) == 0:
        raise ValueError(f"the targets after block {layer} are all zero: no distance has a scale.")
    variance = states.var(0, correction=0).sum()
    return torch.where(variance > 1e-6 * square, variance, square)


def _rows(targets: StateTargets, run: Run) -> Tensor:
    """Row of the states at every token of every forget text of the run, or -1."""
    present, place = targets.attention_mask.bool().cpu(), targets.where.cpu()
    number = torch.full(place.shape, -1)
    number[place] = torch.arange(int(place.sum()))
    known: dict[tuple[int, ...], deque[int]] = {}
    for i, (ids, here) in enumerate(zip(targets.input_ids.cpu(), present, strict=True)):
        known.setdefault(tuple(ids[here].tolist()), deque()).append(i)
    row = torch.full((len(run.forget), max(map(len, run.forget))), -1)
    for k, text in enumerate(run.forget):
        found = known.get(tuple(text.ids.tolist()))
        if not found:
            raise ValueError(
                f"forget text {k} ({run.tokenizer.decode(text.ids)[:40]!r}) has no targets: none "
                f"of their {len(targets.input_ids)} texts has these tokens. Compute targets of the "
                "texts that are trained on, with the same max_length and include_eos."
            )
        i = found[0]
        found.rotate(-1)
        row[k, : len(text)] = number[i, present[i]]
    return row


def _put_back(
    model: nn.Module, original: Any, entry: int, site: str, batch: LabeledBatch, place: Tensor
) -> Tensor:
    """State at a site when that of the original model is put back after block ``entry``."""
    with torch.no_grad():
        (before,) = hidden_states(original, [f"layers.{entry}"], batch)

    def put(hidden: Tensor) -> Tensor:
        return before.to(hidden.dtype)

    with intervene(model, {f"layers.{entry}": put}, tokens=place):
        (reached,) = hidden_states(model, [site], batch)
    return reached


def _drift(model: nn.Module, original: Any, aim: _Aim, batch: LabeledBatch) -> Tensor:
    """Squared distance that retain states moved, summed over layers, in units of the targets."""
    held = batch.attention_mask.bool().clone()
    held[:, 0] = False
    with torch.no_grad():
        before = hidden_states(original, aim.sites, batch)
    now = hidden_states(model, aim.sites, batch)
    parts = []
    for layer, h, h0 in zip(aim.layers, now, before, strict=True):
        gap = h[held].float() - h0[held].float()
        parts.append(gap.square().sum(-1).mean() / aim.scale[layer])
    return _total(parts)


def _total(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum()
