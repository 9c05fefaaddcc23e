"""Latent perturbation: how far the activations must be pushed until the answer comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.activations.capture import SINK_RATIO, recording
from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.activations.models import evaluating
from manifold_unlearn.activations.sites import find_decoder
from manifold_unlearn.arrays import generator, row_blocks
from manifold_unlearn.attack.results import AttackCurve
from manifold_unlearn.attack.targets import (
    Control,
    Targets,
    control_targets,
    encode_targets,
    frozen,
    token_log_likelihoods,
)
from manifold_unlearn.intervene.hooks import intervene


@dataclass(frozen=True)
class LatentConfig:
    """Budget of a latent perturbation.

    Attributes
    ----------
    epsilons : tuple of float
        Ascending bounds on the norm of each perturbed row's change, over the site's median norm.
    n_steps : int, default=8
        Gradient steps at each epsilon; each starts from the best of the one below.
    n_bisections : int, default=3
        Halvings, on the logarithmic scale, of each item's interval around its first success.
    tokens : {"prompt", "last"}, default="prompt"
        Perturb every token of the prompt but the special ones, or the last.
    threshold : float, default=0.5
        Length-normalized probability at which the answer counts as out.
    control : {"random", "others", "perturbed"}, default="random"
        Answers of the control: see :data:`manifold_unlearn.attack.targets.Control`.
    batch_size : int, default=32
    """

    epsilons: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)
    n_steps: int = 8
    n_bisections: int = 3
    tokens: Literal["prompt", "last"] = "prompt"
    threshold: float = 0.5
    control: Control = "random"
    batch_size: int = 32

    def __post_init__(self) -> None:
        grid = np.array(self.epsilons, dtype=np.float64)
        if not grid.size or grid[0] <= 0 or np.any(np.diff(grid) <= 0):
            raise ValueError(f"epsilons={self.epsilons} must be positive and ascending.")
        if self.n_steps < 1 or self.n_bisections < 0 or self.batch_size < 1:
            raise ValueError("n_steps and batch_size must be at least 1, n_bisections at least 0.")
        if self.tokens not in ("prompt", "last"):
            raise ValueError(f"tokens={self.tokens!r} is not 'prompt' or 'last'.")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold={self.threshold} must lie between 0 and 1.")


def latent_attack(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    site: str | None = None,
    config: LatentConfig | None = None,
    random_state: int = 0,
) -> AttackCurve:
    """Probability of each answer by the size of the best perturbation found at a site.

    A change is added to the prompt's rows at the site, each row's norm at most epsilon times the
    site's median norm, and moved by normalized projected gradient steps to where the answer is
    likeliest. What was merely covered comes out at a smaller epsilon than an answer that the
    model was never told; the same attack aiming at such answers is the control.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Left bit-identical and without hooks.
    tokenizer : transformers.PreTrainedTokenizerBase
    items : sequence of Item
        With answers.
    site : str, optional
        Default: the stream behind the middle block.
    config : LatentConfig, optional
    random_state : int
        Of the control's answers.

    Returns
    -------
    AttackCurve
        ``spent`` is epsilon, 0 first; values never fall. Details: ``epsilon_star`` (per item the
        smallest epsilon found to lift the answer to the threshold, None where none did),
        ``median_epsilon`` (None where fewer than half came out), ``gradient_steps`` (per item, at
        each point), ``control`` with the same figures and ``means``, ``gap`` (mean of the answers
        less the control's, at each point), ``site``, ``median_norm``.

    Raises
    ------
    ValueError
        No items, an item without an answer, a site that does not exist.

    References
    ----------
    Casper et al. (2024), arXiv 2403.05030 (latent adversarial attacks with bounded norms); the
    control after arXiv 2502.15836.
    """
    if not items:
        raise ValueError("items is empty; give at least one item to attack.")
    config = config or LatentConfig()
    name = site or f"layers.{len(find_decoder(model).blocks) // 2}"
    targets = encode_targets(model, tokenizer, items)
    draw = generator(random_state)
    wrong = control_targets(model, tokenizer, items, config.control, generator=draw)
    with evaluating(model), frozen(model):
        norm = _median_norm(model, targets, name, config.batch_size)
        found = _attack(model, targets, name, norm, config)
        control = _attack(model, wrong, name, norm, config)
    steps = [0, *(config.n_steps * (i + 1) for i in range(len(config.epsilons)))]
    gap = found.values.mean(1) - control.values.mean(1)
    return AttackCurve(
        attack="latent perturbation",
        metric="probability",
        unit="epsilon",
        spent=np.array([0.0, *config.epsilons]),
        values=found.values,
        details={
            "site": name,
            "median_norm": norm,
            "gradient_steps": steps,
            **found.summary(),
            "control": {
                "answers": config.control,
                "means": control.values.mean(1).tolist(),
                **control.summary(),
            },
            "gap": gap.tolist(),
        },
    )


@dataclass(frozen=True)
class _Found:
    """Probabilities at each epsilon, and each item's smallest epsilon (infinite: none)."""

    values: np.ndarray
    stars: np.ndarray

    def summary(self) -> dict[str, Any]:
        median = float(np.median(self.stars))
        return {
            "epsilon_star": [float(s) if np.isfinite(s) else None for s in self.stars],
            "median_epsilon": median if np.isfinite(median) else None,
        }


def _median_norm(model: Any, targets: Targets, site: str, batch_size: int) -> float:
    norms = []
    with torch.no_grad():
        for rows in row_blocks(len(targets), batch_size):
            part = targets[rows]
            with recording(model, [site]) as seen:
                token_log_likelihoods(model, part)
            hidden = seen[site][0][:, : part.head_ids.shape[1]].float().cpu()
            norms.append(torch.linalg.vector_norm(hidden[part.head_mask.bool()], dim=-1))
    every = torch.cat(norms)
    return float(every[every <= SINK_RATIO * every.median()].median())


def _attack(model: Any, targets: Targets, site: str, norm: float, config: LatentConfig) -> _Found:
    parts = [
        _attack_batch(model, targets[rows], site, norm, config)
        for rows in row_blocks(len(targets), config.batch_size)
    ]
    return _Found(
        np.concatenate([part.values for part in parts], axis=1),
        np.concatenate([part.stars for part in parts]),
    )


def _attack_batch(
    model: Any, targets: Targets, site: str, norm: float, config: LatentConfig
) -> _Found:
    chosen = _chosen(targets, config.tokens).to(model.device)
    start = torch.zeros(())
    log_p, width = _score(model, targets, site, start)
    best = torch.zeros(*chosen.shape, width, device=model.device)
    n = len(targets)
    curve = [log_p]
    low = torch.zeros(n, dtype=torch.float64)
    high = torch.full_like(low, torch.inf)
    low_delta = best
    goal = float(np.log(config.threshold))
    high[log_p >= goal] = 0.0
    for epsilon in config.epsilons:
        radius = torch.full((n,), epsilon)
        best, log_p = _ascend(model, targets, site, best, curve[-1], radius * norm, chosen, config)
        curve.append(log_p)
        out = log_p >= goal
        first = out & torch.isinf(high)
        high[first] = epsilon
        still = ~out
        low[still] = epsilon
        low_delta = torch.where(still.to(best.device)[:, None, None], best, low_delta)
    smallest = min(config.epsilons) / 2**4
    for _ in range(config.n_bisections):
        open_ = torch.isfinite(high) & (high > 0)
        if not open_.any():
            break
        middle = (low.clamp(min=smallest) * high).sqrt()
        middle = torch.where(open_, middle, smallest)
        floor = torch.full((n,), -torch.inf)
        delta, log_p = _ascend(
            model, targets, site, low_delta, floor, middle * norm, chosen, config
        )
        out = open_ & (log_p >= goal)
        high = torch.where(out, middle, high)
        low = torch.where(open_ & ~out, middle, low)
        keep = (open_ & ~out).to(delta.device)[:, None, None]
        low_delta = torch.where(keep, delta, low_delta)
    return _Found(torch.stack(curve).exp().double().numpy(), high.numpy())


def _chosen(targets: Targets, tokens: str) -> Tensor:
    """Rows of the head that may move, ``(n_items, head width)`` bool."""
    chosen = ~targets.special
    chosen[:, -1] |= ~chosen.any(1)  # a prompt of special tokens alone
    if tokens == "last":
        last = torch.zeros_like(chosen)
        last[:, -1] = True
        return last
    return chosen


def _score(model: Any, targets: Targets, site: str, delta: Tensor) -> tuple[Tensor, int]:
    """Mean log-probability of each answer ``(n_items,)`` with the change added, and the width."""
    width = 0

    def push(hidden: Tensor) -> Tensor:
        nonlocal width
        width = hidden.shape[-1]
        if delta.ndim == 0:
            return hidden
        change = torch.nn.functional.pad(delta, (0, 0, 0, hidden.shape[1] - delta.shape[1]))
        return hidden + change.to(hidden.dtype)

    gradient = torch.enable_grad() if delta.requires_grad else torch.no_grad()
    with intervene(model, {site: push}), gradient:
        found = token_log_likelihoods(model, targets)
    counts = targets.answer.sum(1).to(found.device)
    return (found.sum(1) / counts).cpu(), width


def _ascend(
    model: Any,
    targets: Targets,
    site: str,
    start: Tensor,
    start_log_p: Tensor,
    radius: Tensor,
    chosen: Tensor,
    config: LatentConfig,
) -> tuple[Tensor, Tensor]:
    """Best change within the radius, and its log-probability; never below the start's."""
    bound = radius.to(start.device, start.dtype)[:, None, None]
    stride = bound * 2.5 / config.n_steps
    delta, best, best_log_p = start, start, start_log_p
    for step in range(config.n_steps + 1):
        last = step == config.n_steps
        moving = delta.detach().requires_grad_(not last)
        log_p, _ = _score(model, targets, site, moving)
        better = log_p.detach() > best_log_p
        best = torch.where(better.to(best.device)[:, None, None], moving.detach(), best)
        best_log_p = torch.maximum(best_log_p, log_p.detach())
        if last:
            break
        (slope,) = torch.autograd.grad(log_p.sum(), moving)
        slope = torch.where(chosen[..., None], slope, 0.0)
        slope = slope / slope.norm(dim=-1, keepdim=True).amax(1, keepdim=True).clamp(min=1e-30)
        delta = moving.detach() + stride * slope
        length = delta.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        delta = delta * (bound / length).clamp(max=1.0)
    return best, best_log_p
