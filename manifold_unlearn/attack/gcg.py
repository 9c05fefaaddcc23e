"""Greedy coordinate gradient: a suffix of real tokens that brings an answer out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.activations.models import evaluating
from manifold_unlearn.arrays import generator
from manifold_unlearn.attack.knowledge import measured, probability_of
from manifold_unlearn.attack.results import AttackCurve
from manifold_unlearn.attack.targets import (
    Targets,
    answer_scores,
    encode_targets,
    frozen,
    token_log_likelihoods,
)
from manifold_unlearn.evaluate.likelihood import plain

N_FIRST = 256
"""Tokens tried, repeated, as the first suffix."""


@dataclass(frozen=True)
class GCGConfig:
    r"""Budget of a search for a suffix.

    The defaults are quick. Published runs use 20 tokens, width 512, top 256, 250 to 500 steps.

    Attributes
    ----------
    n_tokens : int, default=6
    n_steps : int, default=20
    search_width : int, default=32
        Candidates a step.
    top_k : int, default=32
        Replacements considered at each position, those of steepest descent.
    n_replace : int, default=1
        Tokens that a candidate changes.
    mellowmax : float, optional
        Sharpness of a mellowmax over the answer tokens' losses, in place of their mean: the higher,
        the more the worst token counts.
    ascii_only : bool, default=True
        Use only tokens whose text is printable ASCII.
    universal : bool, default=False
        One suffix for all items; else one each.
    ending : str, default=""
        What every prompt keeps behind the suffix: ``"\nAnswer:"``.
    points : tuple of int, default=(1, 2, 5, 10, 20)
        Steps after which is measured; the last step is always one.
    batch_size : int, default=256
        Sequences a forward pass; halved whenever memory runs out.
    """

    n_tokens: int = 6
    n_steps: int = 20
    search_width: int = 32
    top_k: int = 32
    n_replace: int = 1
    mellowmax: float | None = None
    ascii_only: bool = True
    universal: bool = False
    ending: str = ""
    points: tuple[int, ...] = (1, 2, 5, 10, 20)
    batch_size: int = 256

    def __post_init__(self) -> None:
        for name in ("n_tokens", "n_steps", "search_width", "top_k", "n_replace", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.n_replace > self.n_tokens:
            raise ValueError(f"n_replace={self.n_replace} exceeds n_tokens={self.n_tokens}.")
        if self.mellowmax is not None and self.mellowmax <= 0:
            raise ValueError(f"mellowmax={self.mellowmax} must be positive, or None.")


@dataclass(frozen=True, eq=False)
class Suffix:
    """The best suffix found for some items.

    Attributes
    ----------
    text : str
        Stands between the prompt and its ending, its own white space included.
    ids : Tensor of shape (n_tokens,), int64
    losses : ndarray of shape (n_steps + 1,), float64
        Loss of the best suffix so far; never rises.
    passes : ndarray of shape (n_steps + 1,), int64
        Sequences run up to each step; one with a gradient counts as one.
    n_dropped : int
        Candidates that did not survive decoding and encoding.
    texts : tuple of str
        Best suffix after each step.
    greedy : ndarray of shape (n_items,), bool
        Whether the whole answer is the greedy one behind the suffix.
    """

    text: str
    ids: Tensor
    losses: np.ndarray
    passes: np.ndarray
    n_dropped: int
    texts: tuple[str, ...]
    greedy: np.ndarray


def gcg_attack(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    config: GCGConfig | None = None,
    random_state: int = 0,
) -> AttackCurve:
    """Probability of each answer by the sequences run in search of a suffix.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Left bit-identical.
    tokenizer : transformers.PreTrainedTokenizerBase
    items : sequence of Item
        With answers.
    config : GCGConfig, optional
    random_state : int
        The same number finds the same suffixes.

    Returns
    -------
    AttackCurve
        Measured on the strings, prompt with suffix tokenized anew, as an attacker would send them.
        ``spent`` is forward passes of one sequence an item, 0 without a suffix. Details:
        ``suffixes``, ``losses`` and ``forward_passes`` (of each suffix, at each step), ``success``
        (per item: the answer is the greedy one), ``dropped`` (candidates), ``config``.

    Raises
    ------
    ValueError
        As :func:`find_suffix`.

    References
    ----------
    Zou et al. (2023), arXiv 2307.15043, algorithms 1 and 2. Several prompts are attacked at once
    there one after the other, here together from the start.
    """
    if not items:
        raise ValueError("items is empty; give at least one item to attack.")
    config = config or GCGConfig()
    groups = [list(items)] if config.universal else [[item] for item in items]
    found = [
        find_suffix(model, tokenizer, group, config=config, random_state=random_state)
        for group in tqdm(groups, desc="gcg", unit="suffix", disable=None, leave=False)
    ]
    steps = sorted({s for s in config.points if 0 < s < config.n_steps} | {config.n_steps})
    values = [measured(probability_of(items), plain(model), tokenizer)]
    for step in steps:
        attacked = [
            with_suffix(item, suffix.texts[step], config.ending)
            for suffix, group in zip(found, groups, strict=True)
            for item in group
        ]
        values.append(measured(probability_of(attacked), plain(model), tokenizer))
    passes = np.stack([suffix.passes for suffix in found]).sum(0) / len(items)
    return AttackCurve(
        attack="gcg, universal" if config.universal else "gcg",
        metric="probability",
        unit="forward passes",
        spent=np.array([0.0, *passes[steps]]),
        values=np.stack(values),
        details={
            "suffixes": [suffix.text for suffix in found],
            "losses": [suffix.losses.tolist() for suffix in found],
            "forward_passes": [suffix.passes.tolist() for suffix in found],
            "success": [bool(s) for suffix in found for s in suffix.greedy],
            "dropped": sum(suffix.n_dropped for suffix in found),
            "config": asdict(config),
        },
    )


def with_suffix(item: Item, suffix: str, ending: str = "") -> Item:
    """Item whose prompt has the suffix before its ending."""
    return replace(item, question=item.question.removesuffix(ending) + suffix + ending)


def find_suffix(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    config: GCGConfig | None = None,
    random_state: int = 0,
) -> Suffix:
    """Suffix that makes the answers of all items together as likely as the budget allows.

    Each step takes the gradient of the loss with respect to the one-hot tokens of the best suffix,
    draws candidates from the replacements of steepest descent, drops those that are other tokens
    once decoded and encoded in their place in the first prompt, and keeps the best candidate if it
    is better.

    Parameters
    ----------
    model, tokenizer, items, config, random_state
        As in :func:`gcg_attack`.

    Raises
    ------
    ValueError
        No items, an item without an answer, a prompt that does not end on ``config.ending``, a
        sequence that does not fit the context, or a tokenizer of which no repeated token survives
        decoding and encoding.
    """
    if not items:
        raise ValueError("items is empty; give at least one item to attack.")
    config = config or GCGConfig()
    search = _Search(model, tokenizer, items, config, random_state)
    with evaluating(model), frozen(model):
        return search.run()


def token_gradient(
    model: Any, targets: Targets, ids: Tensor, *, mellowmax: float | None = None
) -> Tensor:
    """Gradient of the loss with respect to the one-hot tokens of a suffix.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    targets : Targets
    ids : Tensor of shape (n_tokens,), int64
    mellowmax : float, optional

    Returns
    -------
    Tensor of shape (n_tokens, n_vocabulary), float32
    """
    embed = model.get_input_embeddings()
    with torch.no_grad():
        rows = embed(ids.to(model.device))
        table = embed(torch.arange(embed.weight.shape[0], device=model.device))
    moving = rows.clone().requires_grad_()
    loss = item_losses(token_log_likelihoods(model, targets, moving[None]), targets, mellowmax)
    (slope,) = torch.autograd.grad(loss.mean(), moving)
    return (slope @ table.T).float()


def item_losses(log_p: Tensor, targets: Targets, mellowmax: float | None = None) -> Tensor:
    """Mean, or mellowmax, of the negative log-probabilities of each item's answer tokens.

    Mellowmax of ``n`` losses is ``log(mean(exp(w * loss))) / w``: near the mean for a small ``w``,
    near the largest for a large one.
    """
    answer = targets.answer.to(log_p.device)
    counts = answer.sum(1)
    if mellowmax is None:
        return -log_p.sum(1) / counts
    scaled = torch.where(answer, -mellowmax * log_p, -torch.inf)
    return (scaled.logsumexp(1) - counts.log()) / mellowmax


class _Search:
    """State of one search: what may be used, what is best so far, what it cost."""

    def __init__(
        self, model: Any, tokenizer: Any, items: Sequence[Item], config: GCGConfig, seed: int
    ):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.targets = encode_targets(
            model, tokenizer, items, ending=config.ending, room=config.n_tokens
        )
        self.generator = generator(seed)
        self.batch_size = config.batch_size
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self.allowed = allowed_tokens(tokenizer, vocabulary, ascii_only=config.ascii_only)
        self.head_text = items[0].question.removesuffix(config.ending)
        head = self.targets.head_ids[0][self.targets.head_mask[0].bool()]
        tail = self.targets.tail_ids[0][self.targets.tail_mask[0].bool() & ~self.targets.answer[0]]
        self.head, self.tail = head.tolist(), tail.tolist()
        self.n_dropped = 0

    def run(self) -> Suffix:
        best = self._first()
        text = self._texts([best.tolist()])[0]
        assert text is not None
        loss = float(self._losses(best[None])[0])
        losses, passes, texts = [loss], [len(self.targets)], [text]
        steps = range(self.config.n_steps)
        for _ in tqdm(steps, desc="gcg", unit="step", disable=None, leave=False):
            candidates, candidate_texts = self._candidates(best)
            spent = len(self.targets)
            if len(candidates):
                scores = self._losses(candidates)
                spent += len(candidates) * len(self.targets)
                lowest = int(scores.argmin())
                if float(scores[lowest]) < loss:
                    best, loss = candidates[lowest], float(scores[lowest])
                    text = candidate_texts[lowest]
            losses.append(loss)
            passes.append(passes[-1] + spent)
            texts.append(text)
        rows = self.model.get_input_embeddings()(best.to(self.model.device))
        with torch.no_grad():
            _, greedy = answer_scores(self.model, self.targets, rows[None])
        return Suffix(
            text=text,
            ids=best,
            losses=np.array(losses),
            passes=np.array(passes),
            n_dropped=self.n_dropped,
            texts=tuple(texts),
            greedy=greedy.cpu().numpy(),
        )

    def _first(self) -> Tensor:
        """One allowed token, repeated, that stays itself in the prompt."""
        pool = self.allowed.nonzero()[:, 0]
        order = pool[torch.randperm(len(pool), generator=self.generator)][:N_FIRST]
        rows = order[:, None].repeat(1, self.config.n_tokens)
        for row, text in zip(rows, self._texts(rows.tolist()), strict=True):
            if text is not None:
                return row
        raise ValueError(
            f"no repeated token of {len(order)} tried survives decoding and encoding behind "
            f"{self.head_text[-20:]!r}; end the prompt on a whole word, or allow other tokens "
            "with ascii_only=False."
        )

    def _candidates(self, best: Tensor) -> tuple[Tensor, list[str]]:
        config, n = self.config, len(best)
        slope = token_gradient(self.model, self.targets, best, mellowmax=config.mellowmax).cpu()
        slope[:, ~self.allowed] = torch.inf
        k = min(config.top_k, int(self.allowed.sum()))
        steepest = (-slope).topk(k, dim=1).indices
        width = config.search_width
        where = torch.rand(width, n, generator=self.generator).argsort(1)[:, : config.n_replace]
        which = torch.randint(k, where.shape, generator=self.generator)
        rows = best.repeat(width, 1).scatter(1, where, steepest[where, which])
        rows = torch.unique(rows[(rows != best).any(1)], dim=0)
        texts = self._texts(rows.tolist()) if len(rows) else []
        kept = [i for i, text in enumerate(texts) if text is not None]
        self.n_dropped += len(rows) - len(kept)
        return rows[kept], [text for text in texts if text is not None]

    def _texts(self, rows: Sequence[Sequence[int]]) -> list[str | None]:
        """Text of each suffix, None where encoding it in the first prompt gives other tokens."""
        whole = [[*self.head, *row, *self.tail] for row in rows]
        strings = self.tokenizer.batch_decode(
            whole, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        again = self.tokenizer(strings, return_attention_mask=False, verbose=False)["input_ids"]
        special = set(self.tokenizer.all_special_ids)
        same = [
            back[: len(ids)] == ids and special.issuperset(back[len(ids) :])
            for ids, back in zip(whole, again, strict=True)
        ]
        return [self._between(text, kept) for text, kept in zip(strings, same, strict=True)]

    def _between(self, text: str, same: bool) -> str | None:
        ending = self.config.ending
        if not same or not text.startswith(self.head_text) or not text.endswith(ending):
            return None
        return text[len(self.head_text) : len(text) - len(ending)]

    def _losses(self, rows: Tensor) -> Tensor:
        """Loss of each suffix over all items ``(n_candidates,)``, in batches that fit memory."""
        n_items, found = len(self.targets), []
        start = 0
        while start < len(rows):
            size = max(1, self.batch_size // n_items)
            try:
                found.append(self._losses_of(rows[start : start + size]))
            except RuntimeError as error:
                if not _out_of_memory(error) or size == 1:
                    raise
                self.batch_size = max(n_items, size * n_items // 2)
                continue
            start += size
        return torch.cat(found)

    def _losses_of(self, rows: Tensor) -> Tensor:
        n_items = len(self.targets)
        every = self.targets[torch.arange(n_items).repeat(len(rows))]
        with torch.no_grad():
            embedded = self.model.get_input_embeddings()(rows.to(self.model.device))
            log_p = token_log_likelihoods(
                self.model, every, embedded.repeat_interleave(n_items, dim=0)
            )
            losses = item_losses(log_p, every, self.config.mellowmax)
        return losses.view(len(rows), n_items).mean(1).cpu()


def allowed_tokens(tokenizer: Any, vocabulary: int, *, ascii_only: bool = True) -> Tensor:
    """Tokens that a suffix may use, ``(vocabulary,)`` bool.

    Special and added tokens never, nor ids that the tokenizer does not know; with ``ascii_only``
    only tokens whose text is printable ASCII.

    Raises
    ------
    ValueError
        None is left.
    """
    known = min(len(tokenizer), vocabulary)
    allowed = torch.zeros(vocabulary, dtype=torch.bool)
    texts = tokenizer.batch_decode([[i] for i in range(known)])
    usable = [bool(t) and (not ascii_only or (t.isascii() and t.isprintable())) for t in texts]
    allowed[:known] = torch.tensor(usable)
    never = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    allowed[[i for i in never if i < vocabulary]] = False
    if not allowed.any():
        raise ValueError("no token may be used; pass ascii_only=False.")
    return allowed


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()
