"""The one loop: a model, what to forget and retain, and an objective give a changed copy."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from manifold_unlearn.activations.models import context_length, evaluating
from manifold_unlearn.activations.tokens import Encoding
from manifold_unlearn.arrays import Device, generator, resolve_device
from manifold_unlearn.finetune.batches import Example, LabeledBatch, encode_examples, epochs
from manifold_unlearn.finetune.losses import negative_log_likelihood
from manifold_unlearn.finetune.rules import Descent, Objective, Rule, Run, Terms, logits_of
from manifold_unlearn.finetune.trainable import LoRA, attach, choose, only

OnStep: TypeAlias = "Callable[[int, Any], object]"
"""Called with 0 and the model before the first update, then with their number after each."""


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Attributes
    ----------
    lr : float
        Highest learning rate.
    steps : int, optional
        Updates. None: ``epochs`` over the forget set.
    epochs : int
        Read where ``steps`` is None.
    batch_size : int
        Forget items an update; as many retain items beside them.
    schedule : {"linear", "constant", "cosine"}
        Of the learning rate after warm-up; the first and the last end at 0.
    warmup_steps : int
        Updates over which the learning rate rises to ``lr``.
    optimizer : {"adamw", "sgd"}
    weight_decay, momentum : float
        The second is read by ``"sgd"`` only.
    clip : float, optional
        Largest norm of the gradient of one update.
    trainable : str or LoRA
        ``"all"``, a regular expression over parameter names, or low-rank additions.
    include_eos : bool
        End answers with the end-of-sequence token, which then carries loss.
    max_length : int, optional
        Cut longer texts to this many tokens. None: a text beyond the model's context is an error.
    random_state : int
        Fixes the order of the items and all that is drawn. Dropout is off.
    device : str or torch.device
        ``"auto"`` is where the model is.
    """

    lr: float = 1e-5
    steps: int | None = None
    epochs: int = 10
    batch_size: int = 16
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    warmup_steps: int = 0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.01
    momentum: float = 0.9
    clip: float | None = 1.0
    trainable: str | LoRA = "all"
    include_eos: bool = False
    max_length: int | None = None
    random_state: int = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        positive = {"lr": self.lr, "epochs": self.epochs, "batch_size": self.batch_size}
        positive |= {"steps": 1 if self.steps is None else self.steps}
        positive |= {"clip": 1 if self.clip is None else self.clip}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be positive and finite.")
        for name in ("warmup_steps", "weight_decay", "momentum"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if self.schedule not in ("linear", "constant", "cosine"):
            raise ValueError(f"schedule={self.schedule!r} is not 'linear', 'constant' or 'cosine'.")
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer={self.optimizer!r} is not 'adamw' or 'sgd'.")

    def n_steps(self, n_forget: int) -> int:
        """Updates of a run over so many forget items."""
        return self.steps or self.epochs * math.ceil(n_forget / self.batch_size)

    def lr_at(self, step: int, n_steps: int) -> float:
        """Learning rate of update ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, n_steps - self.warmup_steps)
        if self.schedule == "linear":
            return self.lr * (1 - done)
        return self.lr * (0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1)


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What a run brings back.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        The changed model, in evaluation mode, without gradients; a peft model after LoRA that was
        not merged.
    losses : dict of str to ndarray (n_steps,), float64
        Each weighted term of the loss, on the batch of each update and before it; NaN where an
        update had no such term.
    n_steps : int
    seconds : float
        Wall time.
    trained : tuple of str
        Parameters that were allowed to change.
    """

    model: Any
    losses: dict[str, np.ndarray]
    n_steps: int
    seconds: float
    trained: tuple[str, ...]


@dataclass(frozen=True)
class Likelihood:
    """Plain fine-tuning on the first set, as an objective."""

    name: str = "fine-tune"
    needs_retain: bool = False

    def bind(self, run: Run) -> Rule:
        """Return the rule that descends the mean NLL of a token."""

        def terms(forget: LabeledBatch, retain: LabeledBatch | None) -> Terms:
            del retain
            logits = logits_of(run.model, forget)
            return {"nll": negative_log_likelihood(logits, forget.labels)}

        return Descent(run, terms)


def fine_tune(
    model: Any,
    tokenizer: Any,
    items: Sequence[Example],
    *,
    config: TrainConfig | None = None,
    on_step: OnStep | None = None,
    in_place: bool = False,
) -> TrainResult:
    """Train a copy of a model to answer: mean negative log-likelihood of the answer tokens.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    items : sequence of Item, str or (prompt, answer)
        All tokens of a plain text carry loss, of a pair those of the answer.
    config, on_step, in_place
        As in :func:`train`.

    Returns
    -------
    TrainResult

    Raises
    ------
    ValueError, FloatingPointError
        As :func:`train`.
    """
    return train(
        model,
        tokenizer,
        items,
        (),
        objective=Likelihood(),
        config=config,
        on_step=on_step,
        in_place=in_place,
    )


def train(
    model: Any,
    tokenizer: Any,
    forget: Sequence[Example],
    retain: Sequence[Example],
    *,
    objective: Objective,
    config: TrainConfig | None = None,
    on_step: OnStep | None = None,
    in_place: bool = False,
) -> TrainResult:
    """Train a copy of a model on an objective of what to forget and what to retain.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Unchanged whatever happens, an interrupt included, unless ``in_place``.
    tokenizer : transformers.PreTrainedTokenizerBase
    forget, retain : sequence of Item, str or (prompt, answer)
        The second may be empty for objectives without a retain term.
    objective : Objective
        Of :mod:`manifold_unlearn.finetune`, or one's own.
    config : TrainConfig, optional
    on_step : callable, optional
        ``on_step(step, model)``, with 0 before the first update and then after every one. An
        exception that it raises ends the run.
    in_place : bool, default=False
        Change the model itself and spare the memory of a copy; an exception restores its weights
        to the bit. Not with LoRA.

    Returns
    -------
    TrainResult

    Raises
    ------
    ValueError
        An empty set, an answer that tokenizes to nothing, a trainable pattern that matches
        nothing, weights that are not finite.
    FloatingPointError
        A loss or gradient that is not finite; names the step and the loss.
    """
    config = config or TrainConfig()
    if in_place and isinstance(config.trainable, LoRA):
        raise ValueError("in_place=True does not go with LoRA; leave it False.")
    _require_finite_weights(model)
    context = context_length(model)
    rows = partial(
        encode_examples,
        tokenizer,
        context=context,
        max_length=config.max_length,
        include_eos=config.include_eos,
    )
    forget_rows = rows(forget, name="forget")
    wanted = len(retain) or objective.needs_retain
    retain_rows = rows(retain, name="retain") if wanted else []
    start = time.perf_counter()
    device = resolve_device(config.device, next(model.parameters()))
    if in_place and device != next(model.parameters()).device:
        raise ValueError(
            f"in_place=True cannot move the model to device={config.device}; move it before."
        )
    with _changing(model, in_place) as changed:
        changed.to(device)
        if isinstance(config.trainable, LoRA):
            changed = attach(changed, config.trainable, random_state=config.random_state)
            trainable = {n: p for n, p in changed.named_parameters() if p.requires_grad}
        else:
            trainable = choose(changed, config.trainable)
        run = Run(
            model=changed,
            tokenizer=tokenizer,
            forget=forget_rows,
            retain=retain_rows,
            forget_examples=forget,
            parameters=trainable,
            steps=config.n_steps(len(forget_rows)),
            batch_size=config.batch_size,
            random_state=config.random_state,
            include_eos=config.include_eos,
            max_length=config.max_length,
        )
        with evaluating(changed), only(changed, trainable):
            losses = _loop(run, objective, config, on_step)
        if isinstance(config.trainable, LoRA) and config.trainable.merge:
            changed = changed.merge_and_unload()
        if not in_place:
            changed.eval()
    return TrainResult(
        model=changed,
        losses=losses,
        n_steps=run.steps,
        seconds=time.perf_counter() - start,
        trained=tuple(trainable),
    )


def _loop(
    run: Run, objective: Objective, config: TrainConfig, on_step: OnStep | None
) -> dict[str, np.ndarray]:
    rule = objective.bind(run)
    optimizer = _optimizer(list(run.parameters.values()), config)
    forget_order = _order(run.forget, run.batch_size, run.random_state)
    retain_order = _order(run.retain, run.batch_size, run.random_state + 1)
    log: dict[str, np.ndarray] = {}
    if on_step is not None:
        on_step(0, run.model)
    progress = tqdm(range(run.steps), desc=objective.name, unit="step", disable=None, leave=False)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = config.lr_at(step, run.steps)
        batch = run.batch(run.forget, next(forget_order))
        beside = run.batch(run.retain, next(retain_order)) if run.retain else None
        terms = rule.gradients(step, batch, beside)
        _require_finite_gradient(run, config.clip, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rule.settle(step)
        for name, term in terms.items():
            log.setdefault(name, np.full(run.steps, np.nan))[step] = float(term.detach())
        progress.set_postfix({name: f"{float(term.detach()):.3g}" for name, term in terms.items()})
        if on_step is not None:
            on_step(step + 1, run.model)
    return log


def _order(rows: Sequence[Encoding], batch_size: int, random_state: int) -> Iterator[Tensor]:
    return epochs(len(rows), batch_size, generator(random_state))


def _optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)


def _require_finite_gradient(run: Run, clip: float | None, step: int) -> None:
    """Clip the gradient; one that is not finite is an error, not a silent NaN."""
    norm = torch.nn.utils.clip_grad_norm_(run.parameters.values(), clip or math.inf)
    if not bool(torch.isfinite(norm)):
        raise FloatingPointError(
            f"step {step + 1}: the norm of the gradient is {float(norm)}. Lower lr, or train in "
            "float32 or bfloat16; the caller's model is unchanged."
        )


def _require_finite_weights(model: nn.Module) -> None:
    for name, value in model.named_parameters():
        if not bool(torch.isfinite(value.detach()).all()):
            raise ValueError(
                f"the weight {name} holds NaN or infinity; load the model again, or repair it."
            )


@contextmanager
def _changing(model: Any, in_place: bool) -> Iterator[Any]:
    """Give a copy to change, or the model itself, whose weights come back after an exception."""
    if not in_place:
        yield copy.deepcopy(model)
        return
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    try:
        yield model
    except BaseException:
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(before[name])
        raise
