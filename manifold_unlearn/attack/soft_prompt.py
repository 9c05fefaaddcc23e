"""Soft prompts: free embedding vectors optimized to bring an answer out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.activations.models import evaluating
from manifold_unlearn.arrays import generator, row_blocks
from manifold_unlearn.attack.results import AttackCurve
from manifold_unlearn.attack.targets import (
    Control,
    Targets,
    answer_scores,
    control_targets,
    encode_targets,
    frozen,
    mean_log_likelihood,
)


@dataclass(frozen=True)
class SoftPromptConfig:
    r"""Budget of a soft prompt.

    Attributes
    ----------
    n_tokens : int, default=4
        Vectors inserted.
    steps : tuple of int, default=(1, 2, 5, 10, 20, 50)
        Ascending gradient steps at which is measured; the last is the budget.
    universal : bool, default=False
        One prompt for all items; else one each.
    place : {"suffix", "prefix"}, default="suffix"
    ending : str, default=""
        What every prompt keeps behind a suffix: ``"\nAnswer:"``.
    optimizer : {"adam", "sign"}, default="adam"
        Or signed gradient steps of a constant size, as published.
    learning_rate : float, default=0.1
        Over the root mean square of the embedding table's entries.
    control : {"random", "others", "perturbed"}, default="random"
        Answers of the control: see :data:`manifold_unlearn.attack.targets.Control`.
    batch_size : int, default=32
    """

    n_tokens: int = 4
    steps: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    universal: bool = False
    place: Literal["suffix", "prefix"] = "suffix"
    ending: str = ""
    optimizer: Literal["adam", "sign"] = "adam"
    learning_rate: float = 0.1
    control: Control = "random"
    batch_size: int = 32

    def __post_init__(self) -> None:
        if not self.steps or self.steps[0] < 1 or any(np.diff(self.steps) <= 0):
            raise ValueError(f"steps={self.steps} must be positive and ascending.")
        if self.n_tokens < 1 or self.batch_size < 1 or self.learning_rate <= 0:
            raise ValueError("n_tokens, batch_size and learning_rate must be positive.")
        if self.optimizer not in ("adam", "sign"):
            raise ValueError(f"optimizer={self.optimizer!r} is not 'adam' or 'sign'.")


def soft_prompt_attack(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    held_out: Sequence[Item] = (),
    config: SoftPromptConfig | None = None,
    random_state: int = 0,
) -> AttackCurve:
    """Probability of each answer by the steps spent on vectors that are put into its prompt.

    A few free vectors make a model say almost anything, so raw success means little: judge by
    ``gap``, what the attack gains over the same attack on answers that nobody was told, or, for a
    universal prompt, by ``held_out``.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Left bit-identical.
    tokenizer : transformers.PreTrainedTokenizerBase
    items : sequence of Item
        With answers; the vectors are optimized on them.
    held_out : sequence of Item, optional
        Measured under the universal prompt, never optimized on.
    config : SoftPromptConfig, optional
    random_state : int
        Of the first vectors (embeddings of random tokens) and the control's answers.

    Returns
    -------
    AttackCurve
        ``spent`` is gradient steps; 0 is the prompt without vectors. Values at each point are
        those of the vectors at that step with the least loss so far (per item, or on average for
        a universal prompt). Details: ``greedy_match`` (share of items whose answer is the
        greedy one throughout, at each point), ``control`` with ``means`` and ``greedy_match``,
        ``gap`` (means less the control's), ``held_out`` (means; null without).

    Raises
    ------
    ValueError
        No items, an item without an answer, ``held_out`` without ``universal``, items that do
        not fit the context with the vectors.

    References
    ----------
    Schwinn et al. (2024), arXiv 2402.09063: 20 vectors, 100 signed steps of 0.001. arXiv
    2502.15836: 1 to 10 vectors bring out random strings of over 400 characters whatever the
    training, hence the control.
    """
    if not items:
        raise ValueError("items is empty; give at least one item to attack.")
    config = config or SoftPromptConfig()
    if held_out and not config.universal:
        raise ValueError("held_out items need universal=True: the vectors of an item are its own.")
    encoding = partial(
        encode_targets,
        model,
        tokenizer,
        place=config.place,
        ending=config.ending,
        room=config.n_tokens,
    )
    targets, kept = encoding(items), encoding(held_out) if held_out else None
    draw = generator(random_state)
    wrong = control_targets(
        model,
        tokenizer,
        items,
        config.control,
        generator=draw,
        place=config.place,
        ending=config.ending,
        room=config.n_tokens,
    )
    start = _start(model, tokenizer, 1 if config.universal else len(items), config.n_tokens, draw)
    with evaluating(model), frozen(model):
        found = _optimize(model, targets, start, config, kept)
        control = _optimize(model, wrong, start, config, None)
    return AttackCurve(
        attack="soft prompt, universal" if config.universal else "soft prompt",
        metric="probability",
        unit="gradient steps",
        spent=np.array([0, *config.steps], dtype=np.float64),
        values=found.values,
        details={
            "n_tokens": config.n_tokens,
            "place": config.place,
            "optimizer": config.optimizer,
            "greedy_match": found.matches,
            "control": {
                "answers": config.control,
                "means": control.values.mean(1).tolist(),
                "greedy_match": control.matches,
            },
            "gap": (found.values.mean(1) - control.values.mean(1)).tolist(),
            "held_out": found.held_out if held_out else None,
        },
    )


@dataclass(frozen=True)
class _Found:
    """What the vectors bring out at each point."""

    values: np.ndarray
    matches: list[float]
    held_out: list[float]


def _start(
    model: Any, tokenizer: Any, n_prompts: int, n_tokens: int, draw: torch.Generator
) -> Tensor:
    special = set(tokenizer.all_special_ids)
    pool = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    ids = pool[torch.randint(len(pool), (n_prompts, n_tokens), generator=draw)]
    with torch.no_grad():
        return model.get_input_embeddings()(ids.to(model.device)).float()


def _optimize(
    model: Any, targets: Targets, start: Tensor, config: SoftPromptConfig, held_out: Targets | None
) -> _Found:
    values: list[np.ndarray] = []
    matches: list[float] = []
    others: list[float] = []

    def note(vectors: Tensor | None) -> None:
        log_p, match = _measure(model, targets, vectors, config.batch_size)
        values.append(log_p.exp().double().numpy())
        matches.append(float(match.double().mean()))
        if held_out is not None:
            log_p, _ = _measure(model, held_out, vectors, config.batch_size)
            others.append(float(log_p.exp().double().mean()))

    note(None)
    scale = float(model.get_input_embeddings().weight.detach().float().pow(2).mean().sqrt())
    moving = start.clone().requires_grad_()
    adam = torch.optim.Adam([moving], lr=config.learning_rate * scale)
    best = start.clone()
    least = torch.full((len(start),), torch.inf, device=start.device)
    for step in range(config.steps[-1] + 1):
        losses, slope = _losses(model, targets, moving, config)
        better = losses < least
        best[better], least = moving.detach()[better], torch.minimum(losses, least)
        if step in config.steps:
            note(best)
        if config.optimizer == "adam":
            moving.grad = slope
            adam.step()
        else:
            with torch.no_grad():
                moving -= config.learning_rate * scale * slope.sign()
    return _Found(np.stack(values), matches, others)


def _losses(
    model: Any, targets: Targets, vectors: Tensor, config: SoftPromptConfig
) -> tuple[Tensor, Tensor]:
    """Loss of each prompt, and its gradient."""
    slope = torch.zeros_like(vectors)
    losses = []
    for rows in row_blocks(len(targets), config.batch_size):
        part = vectors if config.universal else vectors[rows]
        loss = -mean_log_likelihood(model, targets[rows], part)
        slope += torch.autograd.grad(loss.sum(), vectors)[0]
        losses.append(loss.detach())
    every = torch.cat(losses)
    if config.universal:
        return every.mean(0, keepdim=True), slope / len(targets)
    return every, slope


def _measure(
    model: Any, targets: Targets, vectors: Tensor | None, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Mean log-probability of each answer, and whether it is the greedy one throughout."""
    found = []
    with torch.no_grad():
        for rows in row_blocks(len(targets), batch_size):
            shared = vectors is None or len(vectors) == 1
            part = vectors if vectors is None or shared else vectors[rows]
            found.append(answer_scores(model, targets[rows], part))
    log_p, match = zip(*found, strict=True)
    return torch.cat(log_p).cpu(), torch.cat(match).cpu()
