"""Which weights a run may change: all, those that a pattern names, or low-rank additions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class LoRA:
    """Low-rank additions to linear layers in place of the weights themselves; needs peft.

    Attributes
    ----------
    rank : int
    alpha : float
        The addition is scaled by ``alpha / rank``.
    targets : str or tuple of str
        Modules that get one, as peft names them: ``"all-linear"`` (without the output embedding), a
        regular expression over module paths, or the ends of paths, as ``("down_proj",)``.
    merge : bool
        Give back a plain model with the additions merged in; else the peft model.

    References
    ----------
    Hu et al. (2021), LoRA, arXiv 2106.09685.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str | tuple[str, ...] = "all-linear"
    merge: bool = True


def attach(model: Any, lora: LoRA, *, random_state: int) -> Any:
    """Model of peft around ``model``, whose linear layers it replaces; the start is a no-op.

    Raises
    ------
    ImportError
        peft is not installed.
    ValueError
        The rank is not positive, or no module fits the targets.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'manifold-unlearn[lora]'") from error
    if lora.rank < 1:
        raise ValueError(f"LoRA rank={lora.rank} must be at least 1.")
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        wrapped = get_peft_model(model, config)
    _draw(wrapped, random_state)
    return wrapped


def _draw(wrapped: nn.Module, random_state: int) -> None:
    """Draw the first factors anew, from the seed of the run alone."""
    generator = torch.Generator().manual_seed(random_state)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name:
                bound = parameter.shape[1] ** -0.5
                fresh = torch.rand(parameter.shape, generator=generator) * 2 * bound - bound
                parameter.copy_(fresh)


def choose(model: nn.Module, pattern: str) -> dict[str, nn.Parameter]:
    """Parameters that ``"all"`` or a regular expression names; it is searched in their paths.

    Raises
    ------
    ValueError
        Nothing matches, or the expression is not one.
    """
    named = dict(model.named_parameters())
    if pattern == "all":
        return named
    try:
        found = {name: value for name, value in named.items() if re.search(pattern, name)}
    except re.error as error:
        raise ValueError(
            f"trainable={pattern!r} is not 'all' or a regular expression ({error})."
        ) from error
    if not found:
        raise ValueError(
            f"trainable={pattern!r} matches none of {len(named)} parameters; they are named like "
            f"{', '.join(list(named)[1:4])}."
        )
    return found


@contextmanager
def only(model: nn.Module, trainable: dict[str, nn.Parameter]) -> Iterator[None]:
    """Let gradients flow to the chosen parameters alone; afterwards none is left behind."""
    before = {name: value.requires_grad for name, value in model.named_parameters()}
    try:
        for name, value in model.named_parameters():
            value.requires_grad_(name in trainable)
            value.grad = None
        yield
    finally:
        for name, value in model.named_parameters():
            value.requires_grad_(before[name])
            value.grad = None
