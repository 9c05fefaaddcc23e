"""Relearning: how few gradient steps bring back what was only hidden."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.arrays import generator
from manifold_unlearn.attack.knowledge import accuracy_of, measure_name, measured
from manifold_unlearn.attack.results import AttackCurve, Knowledge
from manifold_unlearn.evaluate.likelihood import plain
from manifold_unlearn.finetune.train import TrainConfig, fine_tune

POINTS = (1, 2, 5, 10, 20, 50)

QUICK = TrainConfig(lr=1e-4, batch_size=16, schedule="constant", weight_decay=0.0)
"""The learning rate decides much: give the attacker the best of several, and the control too."""


def relearning_attack(
    model: Any,
    tokenizer: Any,
    knowledge: Knowledge,
    material: Sequence[Any],
    *,
    name: str = "forget data",
    points: Sequence[int] = POINTS,
    config: TrainConfig = QUICK,
) -> AttackCurve:
    """What a model shows of each item as it is fine-tuned on some material.

    On the forget data itself anything is relearned in time: what counts is how many steps fewer
    than the never-told model it takes. On unrelated text a model can only regain what it has.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Left bit-identical: a copy is trained.
    tokenizer : transformers.PreTrainedTokenizerBase
    knowledge : Knowledge
        Such as ``probability_of(forget)``.
    material : sequence of Item, str or (prompt, answer)
        Trained on: forget items, other facts, or unrelated texts.
    name : str, default="forget data"
        What the curve calls the material: ``"unrelated text"``.
    points : sequence of int, default=(1, 2, 5, 10, 20, 50)
        Ascending gradient steps after which is measured; the last is the budget.
    config : TrainConfig, optional
        Its ``steps`` are replaced by the budget.

    Returns
    -------
    AttackCurve
        ``spent`` is gradient steps. Details: ``losses`` (of each step), ``n_material``, ``lr``,
        ``batch_size``.

    Raises
    ------
    ValueError
        No material, points that do not ascend, or as
        :func:`manifold_unlearn.finetune.train.fine_tune`.

    References
    ----------
    Łucki et al. (2024), arXiv 2409.18025: ten unrelated examples bring most capability back.
    """
    steps = _check_points(points)
    values: list[np.ndarray] = []
    losses = _measured_while_training(
        model, tokenizer, material, steps, config, knowledge, values.append
    )
    return AttackCurve(
        attack=f"relearn, {name}",
        metric=measure_name(knowledge),
        unit="gradient steps",
        spent=np.array([0, *steps], dtype=np.float64),
        values=np.stack(values),
        details={
            "losses": losses,
            "n_material": len(material),
            "lr": config.lr,
            "batch_size": config.batch_size,
        },
    )


def disjoint_facts_attack(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    original: Any | None = None,
    measure: Callable[[Sequence[Item]], Knowledge] = accuracy_of,
    groups: Sequence[Hashable] | None = None,
    n_folds: int = 5,
    points: Sequence[int] = POINTS,
    config: TrainConfig = QUICK,
    random_state: int = 0,
) -> AttackCurve:
    """What returns of each item when the model is fine-tuned on the others (RTT).

    The items are dealt into folds; for each fold a copy is trained on all the others, ``T``, and
    measured on the fold, ``V``, which it never saw. Facts in ``V`` must not follow from those in
    ``T``: keep facts that do in one group.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Left bit-identical.
    tokenizer : transformers.PreTrainedTokenizerBase
    items : sequence of Item
        What was to be forgotten.
    original : transformers.PreTrainedModel, optional
        The model before it was made to forget, for the headline.
    measure : callable, default=accuracy_of
        Gives the measure of a set of items.
    groups : sequence of hashable, optional
        One an item; a group is never split between ``T`` and ``V``. Default: each item alone.
    n_folds : int, default=5
    points, config
        As in :func:`relearning_attack`.
    random_state : int
        Of the folds.

    Returns
    -------
    AttackCurve
        ``spent`` is gradient steps; each item's values come from the fold that held it out.
        Details: ``folds`` (the fold of each item), ``accuracy_original`` and ``recovered`` (mean
        at the best point over the mean of the original model on the same items; both null without
        ``original``), ``losses`` of each fold.

    Raises
    ------
    ValueError
        Fewer groups than folds, fewer than two folds, or as :func:`relearning_attack`.

    References
    ----------
    Deeb and Roger (2024), arXiv 2410.08827: retraining on T; 88 % of the accuracy returned.
    """
    steps = _check_points(points)
    folds = _deal(len(items), groups, n_folds, random_state)
    values = np.zeros((len(steps) + 1, len(items)))
    losses = []
    for fold in range(n_folds):
        held = np.flatnonzero(folds == fold)
        rows: list[np.ndarray] = []
        knowledge = measure([items[i] for i in held])
        others = [item for item, f in zip(items, folds, strict=True) if f != fold]
        losses.append(
            _measured_while_training(
                model, tokenizer, others, steps, config, knowledge, rows.append
            )
        )
        values[:, held] = np.stack(rows)
    before = None
    if original is not None:
        before = float(measured(measure(items), plain(original), tokenizer).mean())
    best = float(values.mean(axis=1).max())
    return AttackCurve(
        attack="relearn, disjoint facts",
        metric=measure_name(measure(items)),
        unit="gradient steps",
        spent=np.array([0, *steps], dtype=np.float64),
        values=values,
        details={
            "folds": folds.tolist(),
            "accuracy_original": before,
            "recovered": best / before if before else None,
            "losses": losses,
            "lr": config.lr,
            "batch_size": config.batch_size,
        },
    )


def steps_to(curve: AttackCurve, level: float) -> float:
    """Compute at which the mean of a curve first reaches a level, interpolated; infinite if never.

    Parameters
    ----------
    curve : AttackCurve
    level : float
        In [0, 1]: compare the steps of the model judged with those of the never-told one.
    """
    means, spent = curve.values.mean(axis=1), curve.spent
    reached = np.flatnonzero(means >= level)
    if not reached.size:
        return float("inf")
    i = int(reached[0])
    if i == 0:
        return float(spent[0])
    share = (level - means[i - 1]) / (means[i] - means[i - 1])
    return float(spent[i - 1] + share * (spent[i] - spent[i - 1]))


def _check_points(points: Sequence[int]) -> list[int]:
    steps = [int(point) for point in points]
    if not steps or steps[0] < 1 or any(np.diff(steps) <= 0):
        raise ValueError(f"points={tuple(steps)} must be positive and ascending.")
    return steps


def _measured_while_training(
    model: Any,
    tokenizer: Any,
    material: Sequence[Any],
    steps: Sequence[int],
    config: TrainConfig,
    knowledge: Knowledge,
    keep: Callable[[np.ndarray], object],
) -> list[float]:
    """Hand the measure at step 0 and at each of the steps to ``keep``; return the losses."""
    if not len(material):
        raise ValueError("material is empty; give at least one item or text to train on.")
    wanted = {0, *steps}

    def on_step(step: int, trained: Any) -> None:
        if step in wanted:
            keep(measured(knowledge, plain(trained), tokenizer))

    config = replace(config, steps=steps[-1])
    result = fine_tune(model, tokenizer, material, config=config, on_step=on_step)
    return [float(loss) for loss in result.losses["nll"]]


def _deal(
    n_items: int, groups: Sequence[Hashable] | None, n_folds: int, random_state: int
) -> np.ndarray:
    """Fold of each item ``(n_items,)``; groups stay whole, sizes as even as the groups allow."""
    of_item: Sequence[Hashable] = range(n_items) if groups is None else groups
    if len(of_item) != n_items:
        raise ValueError(f"{len(of_item)} groups for {n_items} items; give one an item.")
    names = list(dict.fromkeys(of_item))
    if not 2 <= n_folds <= len(names):
        raise ValueError(
            f"n_folds={n_folds} must be at least 2 and at most the number of groups, {len(names)}."
        )
    order = torch.randperm(len(names), generator=generator(random_state)).tolist()
    fold = {names[group]: place % n_folds for place, group in enumerate(order)}
    return np.array([fold[group] for group in of_item])
