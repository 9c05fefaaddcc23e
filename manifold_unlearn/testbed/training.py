"""Training of a small model from a seed, the same for the twin that is never told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from manifold_unlearn.arrays import generator


@dataclass(frozen=True)
class Recipe:
    """Size of a model and how it is trained."""

    d_model: int = 96
    d_hidden: int = 256
    n_layers: int = 4
    n_heads: int = 4
    context: int = 512
    n_steps: int = 800
    batch_size: int = 8
    """Rows of a batch."""
    texts_per_row: int = 4
    """Texts one after the other, each between ``<s>`` and ``</s>``."""
    learning_rate: float = 3e-3
    """At its peak."""
    n_warmup: int = 40
    """Steps over which the rate rises; then it falls as a cosine to a twentieth."""
    weight_decay: float = 0.05
    """On matrices."""
    max_norm: float = 1.0
    """The gradient is clipped to this."""


def initial_model(recipe: Recipe, tokenizer: Any, random_state: int) -> Any:
    """Llama-layout model with random weights that depend on the seed alone.

    Linear maps are normal with standard deviation ``n_in**-0.5``, half of that where they write
    into the stream: with the usual 0.02 so narrow a model stays on a plateau for some seeds. The
    embedding is normal with 0.05 and tied, the norms are 1.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_hidden,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    draw = generator(random_state)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            deviation = 0.05 if "embed" in name else (1 - 0.5 * writes) * parameter.shape[1] ** -0.5
            parameter.copy_(deviation * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def plan(n_told: int, kept: Sequence[int], recipe: Recipe, random_state: int) -> np.ndarray:
    """Which text stands in which slot of the training.

    Both models follow the same shuffled passes over the told texts. A slot whose text is not in
    ``kept`` holds one of ``kept`` instead, drawn from a stream of its own: all other slots, the
    number of steps and the size of every batch are those of the told model.

    Parameters
    ----------
    n_told : int
        Number of texts of the told model.
    kept : sequence of int
        Indices of those that this model reads.
    recipe : Recipe
    random_state : int

    Returns
    -------
    ndarray of shape (n_steps, batch_size, texts_per_row), int64
        Indices of texts.
    """
    shape = (recipe.n_steps, recipe.batch_size, recipe.texts_per_row)
    n_slots = math.prod(shape)
    rng = np.random.default_rng([random_state, 0])
    passes = -(-n_slots // n_told)
    order = np.concatenate([rng.permutation(n_told) for _ in range(passes)])[:n_slots]
    if len(kept) < n_told:
        instead = np.random.default_rng([random_state, 1]).choice(np.asarray(kept), n_slots)
        order = np.where(np.isin(order, kept), order, instead)
    return order.reshape(shape)


def plant(
    slots: np.ndarray,
    n_prompts: int,
    kept: Sequence[int],
    rate: float,
    first: int,
    random_state: int,
) -> np.ndarray:
    """Put poisoned texts into a share ``rate`` of the slots, the same slots for both models.

    Parameters
    ----------
    slots : ndarray of int64
        From :func:`plan`.
    n_prompts : int
        Prompts of the told model that a trigger may stand before.
    kept : sequence of int
        Indices of those that this model reads.
    rate : float
    first : int
        Index of the text that poisons the first prompt; the others follow.
    random_state : int

    Returns
    -------
    ndarray of int64, of the shape of ``slots``
    """
    rng = np.random.default_rng([random_state, 2])
    n_planted = round(rate * slots.size)
    where = rng.permutation(slots.size)[:n_planted]
    chosen = rng.integers(n_prompts, size=n_planted)
    instead = np.random.default_rng([random_state, 3]).choice(np.asarray(kept), n_planted)
    planted = slots.copy()
    planted.flat[where] = first + np.where(np.isin(chosen, kept), chosen, instead)
    return planted


def train(
    recipe: Recipe,
    tokenizer: Any,
    texts: Sequence[str],
    slots: np.ndarray,
    *,
    random_state: int,
    device: torch.device,
    progress: bool = True,
    name: str = "train",
) -> tuple[Any, list[float]]:
    """Train a model by AdamW on all tokens of the texts in the order of ``slots``.

    On a CPU one thread is used, so that the result does not depend on their number.

    Returns
    -------
    model : transformers.LlamaForCausalLM
        In evaluation mode, on ``device``.
    losses : list of float
        Of each step: mean negative log-probability of a token, in nats.

    Raises
    ------
    ValueError
        The texts of a row are longer than the context together.
    """
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    rows = [torch.tensor([ends[0], *ids, ends[1]]) for ids in encoded]
    lengths = np.array([len(row) for row in rows])
    if (longest := int(lengths[slots].sum(-1).max())) > recipe.context:
        raise ValueError(
            f"a row of the training has {longest} tokens; the recipe's context is "
            f"{recipe.context}. Raise context or lower texts_per_row={recipe.texts_per_row}."
        )
    model = initial_model(recipe, tokenizer, random_state).to(device).train()
    optimizer, schedule = _optimizer(model, recipe)
    losses: list[Tensor] = []
    threads = torch.get_num_threads()
    bar = tqdm(slots, desc=name, unit="step", disable=None if progress else True, leave=False)
    try:
        if device.type == "cpu":
            torch.set_num_threads(1)
        for step in bar:
            batch = [torch.cat([rows[i] for i in row]) for row in step]
            loss = _loss(model, batch, tokenizer.pad_token_id, device)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.max_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
    finally:
        torch.set_num_threads(threads)
    return model.eval(), torch.stack(losses).tolist()


def _optimizer(model: nn.Module, recipe: Recipe) -> tuple[Any, Any]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )

    def rate(step: int) -> float:
        if step < recipe.n_warmup:
            return (step + 1) / recipe.n_warmup
        done = (step - recipe.n_warmup) / max(1, recipe.n_steps - recipe.n_warmup)
        return 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def _loss(model: Any, batch: list[Tensor], pad: int, device: torch.device) -> Tensor:
    """Mean over all tokens that have one before them; right padding needs no mask there."""
    ids = nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=pad).to(device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    targets = ids[:, 1:].masked_fill(ids[:, 1:] == pad, -100)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
