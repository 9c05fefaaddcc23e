"""Logit lens: what the states of each block already say when they are read out as the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.activations.models import evaluating
from manifold_unlearn.activations.sites import find_decoder
from manifold_unlearn.evaluate.depth import LayerDrop
from manifold_unlearn.evaluate.forced import (
    Entities,
    Forced,
    force,
    named_sites,
    predicting_states,
    require_equal_shapes,
)
from manifold_unlearn.evaluate.likelihood import BatchSize, Subject
from manifold_unlearn.evaluate.results import Metric


@dataclass(frozen=True, eq=False)
class LensProfile:
    """What the output of each block says of each answer; all arrays ``(n_items, n_sites)``."""

    sites: tuple[str, ...]
    log_probability: np.ndarray
    """float64, mean over the answer's tokens, nats"""
    rank: np.ndarray
    """float64, mean over the tokens of each one's rank in the vocabulary; 1 is the likeliest"""
    accuracy: np.ndarray
    """float64, share of the tokens that are the likeliest"""


@dataclass(frozen=True, eq=False)
class LensLeak:
    """What a lens reads above chance, the layer chosen on items other than those it is read on."""

    above_chance: Metric
    sites: tuple[str, str]
    """Chosen on the one half of the items for the other, and the other way round"""


def logit_lens(
    subject: Subject,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    head: Subject | None = None,
    entities: Entities | None = None,
    include_eos: bool = False,
    batch_size: BatchSize = "auto",
) -> LensProfile:
    """Answer as the output of each block gives it through final norm and unembedding.

    The states are those that predict the answer's tokens, prompt and answer being given.

    Parameters
    ----------
    subject : Subject
    tokenizer : transformers.PreTrainedTokenizerFast
    items : sequence of Item
    head : Subject, optional
        Whose final norm and unembedding read the states. Default: the subject's own; the last
        block is then the model itself. With the told model's a subject that only spoiled its
        head shows what it still carries.
    entities : sequence of str or (str, str), optional
        Look at the entity in each answer alone; see
        :func:`~manifold_unlearn.evaluate.forced.force`.
    include_eos : bool, default=False
    batch_size : int or "auto"

    Returns
    -------
    LensProfile

    Raises
    ------
    ValueError
        Subject and head differ in shape, or what
        :func:`~manifold_unlearn.evaluate.forced.force` refuses, or a log-probability that is not
        finite.

    References
    ----------
    nostalgebraist (2020), interpreting GPT: the logit lens.
    """
    if head is not None:
        require_equal_shapes({"subject": subject, "head": head})
    forced = force(
        head or subject,
        tokenizer,
        items,
        entities=entities,
        include_eos=include_eos,
        batch_size=batch_size,
    )
    return _profile(subject, head or subject, forced, batch_size)


def _profile(subject: Subject, head: Subject, forced: Forced, batch_size: BatchSize) -> LensProfile:
    sites = named_sites(subject, "blocks")
    parts, item = [], []
    for made, states in predicting_states(subject, forced, sites, batch_size, desc="logit lens"):
        with head() as model, torch.no_grad(), evaluating(model):
            read = [_read_out(model, states[site], made.token) for site in sites]
        parts.append(torch.stack(read))
        item.append(made.item)
    values = torch.cat(parts, dim=2)  # (n_sites, 3, n_tokens)
    mean = forced.per_item(values, torch.cat(item)).transpose(1, 2, 0)
    if not np.isfinite(mean[0]).all():
        i, site = np.argwhere(~np.isfinite(mean[0]))[0]
        raise ValueError(
            f"the log-probability of item {i} read out at {sites[site]!r} is not finite; the model "
            "has weights or states that are not. Repair it, or use float32."
        )
    return LensProfile(sites, mean[0], mean[1], mean[2])


def _read_out(model: Any, states: Tensor, token: Tensor) -> Tensor:
    """Log-probability, rank and correctness of each token: ``(3, n_tokens)`` float32."""
    norm = find_decoder(model).final_norm
    unembed = model.get_output_embeddings()
    logits = unembed(norm(states.to(unembed.weight.device, unembed.weight.dtype))).float()
    if cap := getattr(model.config.get_text_config(), "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    log_p = logits.log_softmax(-1)
    own = log_p.gather(1, token.to(log_p.device)[:, None])
    rank = 1 + (log_p > own).sum(-1)
    return torch.stack([own[:, 0], rank.float(), (rank == 1).float()]).cpu()


def frozen_head_drop(
    told: Subject,
    source: Subject,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    entities: Entities | None = None,
    include_eos: bool = False,
    batch_size: BatchSize = "auto",
) -> LayerDrop:
    """Fall of the answers' log-probability, read out by the told model's head at each block.

    The logit-lens score published beside the unlearning depth is
    :func:`~manifold_unlearn.evaluate.depth.unlearning_depth` of two such drops. No block of the
    told model runs on the source's states, so what later blocks could still make of them is missed.

    Parameters
    ----------
    told, source : Subject
    tokenizer : transformers.PreTrainedTokenizerFast
    items : sequence of Item
    entities : sequence of str or (str, str), optional
    include_eos : bool, default=False
    batch_size : int or "auto"

    Returns
    -------
    LayerDrop
        At each block ``mean_t(log p_told(y_t) - log p_source(y_t))``, both through the told
        model's final norm and unembedding, nats.

    Raises
    ------
    ValueError
        As :func:`logit_lens`.

    References
    ----------
    Unlearning depth score (arXiv 2605.24614), its logit-lens baseline.
    """
    require_equal_shapes({"told": told, "source": source})
    forced = force(
        told,
        tokenizer,
        items,
        entities=entities,
        include_eos=include_eos,
        batch_size=batch_size,
    )
    before = _profile(told, told, forced, batch_size)
    after = _profile(source, told, forced, batch_size)
    return LayerDrop(before.sites, before.log_probability - after.log_probability)


def lens_choice(
    subject: Subject,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    head: Subject | None = None,
    batch_size: BatchSize = "auto",
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Whether each block's read-out prefers the right answer to the perturbed ones.

    Answers are compared by their mean log-probability a token. Where an item has a paraphrased
    answer, that one is the right answer, as in the truth ratio: the perturbed ones share its words.

    Parameters
    ----------
    subject, tokenizer, items, head, batch_size
        As for :func:`logit_lens`.

    Returns
    -------
    sites : tuple of str
    right : ndarray of shape (n_items, n_sites), float64
        1 where the right answer is ahead of all perturbed ones, else 0.
    chance : ndarray of shape (n_items,), float64
        ``1 / (1 + n_perturbed)``. Answers that differ in style are told apart without any
        knowledge: compare with the model that was never told.

    Raises
    ------
    ValueError
        An item has no perturbed answer, or as :func:`logit_lens`.
    """
    asked: list[Item] = []
    for i, item in enumerate(items):
        if not item.perturbed_answer:
            raise ValueError(f"item {i} has no perturbed_answer to choose from; leave it out.")
        answers = (item.paraphrased_answer or item.answer, *item.perturbed_answer)
        asked += [replace(item, answer=answer) for answer in answers]
    profile = logit_lens(subject, tokenizer, asked, head=head, batch_size=batch_size)
    sizes = [1 + len(item.perturbed_answer) for item in items]
    ends = np.cumsum(sizes)
    right = np.array(
        [
            (profile.log_probability[end - size] > profile.log_probability[end - size + 1 : end])
            .all(axis=0)
            .astype(np.float64)
            for size, end in zip(sizes, ends, strict=True)
        ]
    )
    return profile.sites, right, 1 / np.array(sizes, dtype=np.float64)


def lens_leak(
    sites: Sequence[str],
    values: np.ndarray,
    chance: float | np.ndarray,
    *,
    random_state: int = 0,
) -> LensLeak:
    """What the best layer reads above chance; the layer is chosen on other items.

    The maximum over layers of a mean exceeds the truth. Here each half of the items is read at the
    layer that is best on the other half, so an item never takes part in choosing its layer.

    Parameters
    ----------
    sites : sequence of str
    values : ndarray of shape (n_items, n_sites), float
        Accuracy of a :class:`LensProfile`, or choices of :func:`lens_choice`.
    chance : float or ndarray of shape (n_items,)
        What an ignorant model reads: of choices as given; of accuracy what the model that was
        never told reads of the same item.
    random_state : int, default=0
        Of the halves.

    Returns
    -------
    LensLeak

    Raises
    ------
    ValueError
        Fewer than two items, or shapes that do not fit.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(sites):
        raise ValueError(f"values of shape {values.shape} for {len(sites)} sites; one column each.")
    n = len(values)
    if n < 2:
        raise ValueError(f"{n} items cannot be halved to choose a layer; give at least 2.")
    order = np.random.default_rng(random_state).permutation(n)
    read = np.empty(n)
    chosen = []
    for test, validation in (
        (order[: n // 2], order[n // 2 :]),
        (order[n // 2 :], order[: n // 2]),
    ):
        best = int(values[validation].mean(axis=0).argmax())
        read[test] = values[test, best]
        chosen.append(sites[best])
    above = read - np.broadcast_to(np.asarray(chance, dtype=np.float64), (n,))
    return LensLeak(Metric("lens_leak", above), (chosen[0], chosen[1]))
