"""Sampled answers, the same for a prompt whatever its company, and what they leak at best of k."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.activations.models import context_length, evaluating
from manifold_unlearn.activations.tokens import Batch, batches, encode
from manifold_unlearn.evaluate.likelihood import BatchSize, Subject, require_numbers
from manifold_unlearn.evaluate.rouge import rouge_l_recall

ROWS = 64
"""Sequences that are sampled at a time if the batch size is left to us."""


def sample_answers(
    subject: Subject,
    tokenizer: Any,
    prompts: Sequence[str],
    n_samples: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 32,
    random_state: int = 0,
    batch_size: BatchSize = "auto",
) -> list[list[str]]:
    """Several sampled continuations of each prompt, decoded without special tokens.

    The random numbers of a sample follow from ``random_state``, the prompt and the sample's number,
    not from the batch: the other prompts, their order, the batch size and ``n_samples`` change
    nothing but floating-point rounding.

    Parameters
    ----------
    subject : Subject
        ``plain(model)``, or any function that opens to a model.
    tokenizer : transformers.PreTrainedTokenizerBase
    prompts : sequence of str
    n_samples : int
        Of each prompt.
    temperature : float, default=1.0
        Logits are divided by it.
    top_p : float, default=1.0
        Sample from the likeliest tokens that together have this probability.
    max_new_tokens : int, default=32
        Fewer where the model's context ends before.
    random_state : int, default=0
    batch_size : int or "auto"
        Prompts at a time; each is run once for all of its samples.

    Returns
    -------
    list of list of str
        ``n_samples`` for each prompt.

    Raises
    ------
    ValueError
        A parameter out of its range, no prompts, or a model that gives NaN.

    References
    ----------
    Holtzman et al. (2020), The curious case of neural text degeneration (top-p).
    """
    if n_samples < 1 or max_new_tokens < 1:
        raise ValueError(
            f"n_samples={n_samples} and max_new_tokens={max_new_tokens} must be at least 1."
        )
    if not temperature > 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature={temperature} must be above 0 and top_p={top_p} in (0, 1]. "
            "For the likeliest answer use greedy_answers."
        )
    texts: list[list[str]] = [[] for _ in prompts]
    with subject() as model, torch.no_grad(), evaluating(model):
        context = context_length(model)
        rows = encode(tokenizer, list(prompts), context=context)
        size = max(1, ROWS // n_samples) if batch_size == "auto" else batch_size
        ends = _end_tokens(model, tokenizer)
        by_room: dict[int, list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            room = max_new_tokens if context is None else context - len(row) + 1
            by_room[min(room, max_new_tokens)].append(i)
        made = [
            (room, [index[r] for r in batch.index.tolist()], batch)
            for room, index in by_room.items()
            for batch in batches([rows[i] for i in index], batch_size=size, padding_side="left")
        ]
        progress = tqdm(made, desc="sample answers", unit="batch", disable=None, leave=False)
        for room, index, batch in progress:
            draws = np.stack([uniforms(prompts[i], n_samples, room, random_state) for i in index])
            ids = _sample_batch(model, batch, draws, temperature, top_p, ends).flatten(0, 1)
            decoded = tokenizer.batch_decode(
                [row[row >= 0] for row in ids], skip_special_tokens=True
            )
            for r, i in enumerate(index):
                texts[i] = decoded[r * n_samples : (r + 1) * n_samples]
    return texts


def uniforms(prompt: str, n_samples: int, n_steps: int, random_state: int) -> np.ndarray:
    """Random numbers in [0, 1) of one prompt, ``(n_samples, n_steps)`` float64.

    A larger ``n_samples`` or ``n_steps`` adds to them and changes none.
    """
    seed = int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=16).digest(), "big")
    return np.stack(
        [
            np.random.default_rng([random_state, sample, seed]).random(n_steps)
            for sample in range(n_samples)
        ]
    )


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    found = tokenizer.eos_token_id if found is None else found
    if found is None:
        return []
    return [int(i) for i in found] if isinstance(found, list | tuple) else [int(found)]


def _sample_batch(
    model: Any,
    batch: Batch,
    draws: np.ndarray,
    temperature: float,
    top_p: float,
    ends: Sequence[int],
) -> Tensor:
    """Sampled ids ``(n_prompts, n_samples, n_steps)``, -1 behind an end token."""
    device = model.device
    n_prompts, n_samples, n_steps = draws.shape
    source = torch.arange(n_prompts).repeat_interleave(n_samples)
    uniform = torch.from_numpy(draws).flatten(0, 1)
    out = model(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        position_ids=batch.position_ids.to(device),
        use_cache=n_steps > 1,
        logits_to_keep=1,
    )
    cache = out.past_key_values
    if n_steps > 1:
        cache.batch_select_indices(source.to(device))
    mask, position = batch.attention_mask[source], batch.position_ids[source, -1:]
    final = torch.tensor(list(ends), dtype=torch.int64)
    done = torch.zeros(len(source), dtype=torch.bool)
    logits, chosen = out.logits[:, -1][source.to(device)], []
    for step in range(n_steps):
        picked = draw(logits, uniform[:, step], temperature=temperature, top_p=top_p)
        picked = torch.where(done, -1, picked)
        chosen.append(picked)
        done |= torch.isin(picked, final)
        if step + 1 == n_steps or bool(done.all()):
            break
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], dim=1)
        position = position + 1
        logits = model(
            input_ids=picked[:, None].clamp(min=0).to(device),
            attention_mask=mask.to(device),
            position_ids=position.to(device),
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    return torch.stack(chosen, dim=1).unflatten(0, (n_prompts, n_samples))


def draw(
    logits: Tensor, uniform: Tensor, *, temperature: float = 1.0, top_p: float = 1.0
) -> Tensor:
    """Tokens at given quantiles of the distributions that the logits describe.

    Parameters
    ----------
    logits : Tensor of shape (n_rows, n_vocabulary)
    uniform : float64 Tensor of shape (n_rows,)
        In [0, 1); the inverse of the cumulative distribution, in the order of the vocabulary, is
        taken there.
    temperature : float
    top_p : float

    Returns
    -------
    int64 Tensor of shape (n_rows,), on the CPU
    """
    p = (logits.double() / temperature).softmax(-1).cpu()
    if top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        p = p.masked_fill(
            torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, before >= top_p), 0
        )
    total = p.cumsum(-1)
    require_numbers(list(total[:, -1:]), "sampled sequence")
    at = uniform[:, None] * total[:, -1:]
    found = torch.searchsorted(total, at, right=True)[:, 0]
    return found.clamp(max=p.shape[-1] - 1)


def leak_at_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Expected largest leakage among ``k`` answers, from ``n >= k`` sampled ones, without bias.

    With the scores of an item in ascending order it is
    ``sum_i C(i - 1, k - 1) / C(n, k) * x_(i)``, the mean of the maximum over all subsets of size
    ``k``. ``k=1`` is the mean, ``k=n`` the maximum; for scores of 0 and 1 it is pass@k.

    Parameters
    ----------
    scores : ndarray of shape (n_items, n_samples)
    k : int

    Returns
    -------
    ndarray of shape (n_items,), float64

    Raises
    ------
    ValueError
        ``k`` is not in 1 .. n_samples, or a score is not finite.

    References
    ----------
    Leak@k is arXiv 2511.04934; the estimator is that of Chen et al. (2021) for pass@k, extended
    from 0/1 to any score.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite, (n_items, n_samples); got shape {scores.shape}.")
    n = scores.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k={k} must be from 1 to n_samples={n}. Sample more, or lower k.")
    rank = np.arange(k, n)
    ratios = rank / (rank - k + 1)  # C(i, k-1) / C(i-1, k-1)
    logs = np.concatenate([[0.0], np.log(ratios).cumsum()])
    weights = np.exp(logs - logs.max())
    return np.sort(scores, axis=1)[:, k - 1 :] @ (weights / weights.sum())


def sampled_leakage(
    subject: Subject,
    tokenizer: Any,
    items: Sequence[Item],
    n_samples: int,
    *,
    score: Callable[[str, str], float] = rouge_l_recall,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 32,
    random_state: int = 0,
    batch_size: BatchSize = "auto",
) -> np.ndarray:
    """Score of every sampled answer against the true one, for :func:`leak_at_k`.

    Parameters
    ----------
    subject, tokenizer, n_samples, temperature, top_p, max_new_tokens, random_state, batch_size
        As for :func:`sample_answers`.
    items : sequence of Item
    score : callable
        ``(said, true answer) -> float``.

    Returns
    -------
    ndarray of shape (n_items, n_samples), float64

    Raises
    ------
    ValueError
        No items, or one without an answer.
    """
    if not items or not all(item.answer for item in items):
        raise ValueError(f"{len(items)} items: leakage needs at least one, and answers to all.")
    said = sample_answers(
        subject,
        tokenizer,
        [item.question for item in items],
        n_samples,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        random_state=random_state,
        batch_size=batch_size,
    )
    return np.array(
        [
            [score(text, item.answer) for text in texts]
            for texts, item in zip(said, items, strict=True)
        ]
    )
