"""Moving a model's states along a path, and reading what it says at every waypoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from manifold_unlearn.activations.models import context_length, evaluating
from manifold_unlearn.activations.prefill import CHUNK_SIZE, require_chunk_size
from manifold_unlearn.activations.tokens import Encoding, TokenSelection, encode, select
from manifold_unlearn.intervene.hooks import intervene
from manifold_unlearn.steer.answer_tokens import (
    Answers,
    AnswerTokens,
    score_answers,
    tokenize_answers,
)
from manifold_unlearn.steer.continuation import Rows, WaypointEdit, greedy
from manifold_unlearn.steer.passes import BatchSize, Walk
from manifold_unlearn.steer.paths import How, ManifoldPath
from manifold_unlearn.steer.traversal import Traversal


def traverse(
    model: Any,
    tokenizer: Any,
    prompts: str | Sequence[str],
    path: ManifoldPath | Mapping[str, ManifoldPath],
    site: str | None = None,
    *,
    how: How = "replace",
    tokens: TokenSelection = "last",
    answers: Answers | None = None,
    top: int = 10,
    max_new_tokens: int = 0,
    while_generating: bool = False,
    batch_size: BatchSize = "auto",
    use_cache: bool | Literal["auto"] = "auto",
    chunk_size: int = CHUNK_SIZE,
    progress: bool | None = None,
) -> Traversal:
    """What a model says while its states are moved along a path, waypoint by waypoint.

    Waypoints and prompts are decoded together in batches. What comes before the first moved token
    is the same at every waypoint: it is read once, in chunks if it is long, and each waypoint goes
    on from a copy of its keys and values. On exit, also by an exception, no hook is left; the
    weights are never touched.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        May stand in a block of :func:`~manifold_unlearn.intervene.hooks.intervene`; the path is
        then followed behind that edit.
    tokenizer : transformers.PreTrainedTokenizerBase
    prompts : str or sequence of str
    path : ManifoldPath, or mapping of str to ManifoldPath
        One path for ``site``, or for each of several sites its own, of as many waypoints.
    site : str, optional
        See :mod:`manifold_unlearn.activations.sites`. Not with a mapping.
    how : {"replace", "add", "coordinates"}, default="replace"
        What becomes of a chosen row ``h`` at waypoint ``t``: the waypoint itself; ``h`` plus the
        way from the first waypoint; or ``h`` with the coordinates in ``path.basis`` alone replaced,
        ``h + basis (c_t - basis' (h - mean))``.
    tokens : {"last", "all"} or sequence of bool masks, default="last"
        Tokens of each prompt that are moved, all of them to the same waypoint.
    answers : sequence of str or int, or mapping of str to such, optional
        Continuations whose probabilities are read: texts, which bring their leading space, or
        token ids. A mapping names answers with several spellings, whose probabilities are summed.
        Answers of several tokens are scored by teacher forcing.
    top : int, default=10
        How many of the likeliest next tokens to keep.
    max_new_tokens : int, default=0
        Tokens to generate, greedily, from each prompt at each waypoint.
    while_generating : bool, default=False
        Move the tokens after the prompt as well: those generated, and those of an answer that are
        given to score the rest of it.
    batch_size : int or "auto", default="auto"
        Sequences (a waypoint of a prompt) in a pass; ``"auto"`` holds up to 4,096 tokens.
    use_cache : bool or "auto", default="auto"
        Read the beginning once. ``"auto"`` does where the model's cache allows it; False reads
        every sequence as a whole, at the price of that many plain forward passes.
    chunk_size : int, default=512
        Tokens of a beginning read at a time.
    progress : bool, optional
        Show a progress bar. Default: only on a terminal.

    Returns
    -------
    Traversal

    Raises
    ------
    ValueError
        No prompt or site, paths of different numbers of waypoints or of another width than the
        site, a prompt without a chosen token, a sequence longer than the model's context, answers
        of which one begins with another, or probabilities that are not numbers (names the waypoint
        and the prompt).

    Examples
    --------
    >>> traversal = traverse(  # doctest: +SKIP
    ...     model, tokenizer, ["What day comes after Monday? "], path, "layers.12",
    ...     answers=[" Tuesday", " Wednesday"],
    ... )
    >>> traversal.distributions[:, 0]  # (n_waypoints, 3): the third is anything else
    """  # fmt: skip
    paths = _paths(path, site)
    if how not in get_args(How):
        raise ValueError(f"how={how!r} is not one of {', '.join(map(repr, get_args(How)))}.")
    if min(top, max_new_tokens) < 0:
        raise ValueError(f"top={top} and max_new_tokens={max_new_tokens} must not be negative.")
    if batch_size != "auto" and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1, or 'auto'.")
    require_chunk_size(chunk_size)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    context = context_length(model)
    encoded = encode(tokenizer, prompts, context=context)
    asked = tokenize_answers(tokenizer, answers, model.config.get_text_config().vocab_size)
    _require_room(encoded, asked, context)
    walk = Walk(
        model,
        [WaypointEdit(p, how) for p in paths.values()],
        encoded,
        _chosen(encoded, tokens),
        use_cache=use_cache,
        continues=asked.n_forced > 0 or max_new_tokens > 1,
        chunk_size=chunk_size,
    )
    reader = _Reader(walk, tokenizer, asked, top, max_new_tokens, while_generating, context)
    n_waypoints = next(iter(paths.values())).n_waypoints
    readings: list[_Reading] = []
    with (
        torch.no_grad(),
        evaluating(model),
        intervene(model, dict(zip(paths, walk.edits, strict=True))),
        tqdm(
            total=n_waypoints * len(prompts),
            desc="traverse",
            unit="state",
            disable=None if progress is None else not progress,
            leave=False,
        ) as bar,
    ):
        for index, rows in walk.passes(n_waypoints, batch_size):
            readings.append(reader.read(rows, index))
            bar.update(len(index))
    return _traversal(readings, paths, prompts, asked, how, tokenizer, bool(max_new_tokens))


def _paths(
    path: ManifoldPath | Mapping[str, ManifoldPath], site: str | None
) -> dict[str, ManifoldPath]:
    if isinstance(path, Mapping):
        if site is not None:
            raise ValueError(f"site={site!r} beside a mapping of paths, which names its sites.")
        if not path:
            raise ValueError("path is empty; give at least one site with its path.")
        lengths = {name: p.n_waypoints for name, p in path.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"the paths have different numbers of waypoints, {lengths}; use resampled(n)."
            )
        return dict(path)
    if site is None:
        raise ValueError("site is missing; name where the path lies, such as 'layers.0'.")
    return {site: path}


def _require_room(encoded: Sequence[Encoding], asked: AnswerTokens, context: int | None) -> None:
    longest = max(range(len(encoded)), key=lambda i: len(encoded[i]))
    needed = len(encoded[longest]) + asked.n_forced
    if context is not None and needed > context:
        raise ValueError(
            f"prompt {longest} with an answer has {needed} tokens; the model takes {context}. "
            "Shorten the prompt or the answers."
        )


def _chosen(encoded: Sequence[Encoding], tokens: TokenSelection) -> list[Tensor]:
    masks = select(encoded, tokens)
    if without := [i for i, mask in enumerate(masks) if not bool(mask.any())]:
        raise ValueError(
            f"no token of prompt {without[0]} is chosen; choose one, or leave the prompt out."
        )
    return masks


@dataclass(frozen=True)
class _Reading:
    """What is read of some sequences; all on the CPU, rows as in ``index``."""

    index: Tensor
    log_probabilities: Tensor
    top_tokens: Tensor
    top_probabilities: Tensor
    texts: list[str]


class _Reader:
    """Reads off rows that stand behind their prompts what was asked for."""

    def __init__(
        self,
        walk: Walk,
        tokenizer: Any,
        asked: AnswerTokens,
        top: int,
        max_new_tokens: int,
        moved: bool,
        context: int | None,
    ):
        self.walk = walk
        self.tokenizer = tokenizer
        self.asked = asked
        self.top = top
        self.max_new_tokens = max_new_tokens
        self.moved = moved
        self.context = context
        config = getattr(walk.model, "generation_config", None)
        ends = getattr(config, "eos_token_id", None)
        known = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
        self.ends = torch.tensor(sorted({i for i in known if i is not None}), dtype=torch.int64)

    def read(self, rows: Rows, index: Tensor) -> _Reading:
        logits = rows.logits[:, -1].float()
        total = logits.logsumexp(-1, keepdim=True)
        if not bool(torch.isfinite(total).all()):
            t, p = index[int((~torch.isfinite(total[:, 0].cpu())).nonzero()[0, 0])].tolist()
            raise ValueError(
                f"the probabilities at waypoint {t} of prompt {p} are not numbers; the path leads "
                "where the model overflows. Shorten it, or load the model in float32 or bfloat16."
            )
        likeliest, tokens = logits.topk(min(self.top, logits.shape[1]), dim=-1)
        if self.asked.names:
            found = score_answers(self.asked, logits, lambda ids: self._force(rows, ids))
        else:
            found = logits.new_zeros(len(logits), 0)
        return _Reading(
            index,
            found.cpu(),
            tokens.cpu(),
            (likeliest - total).exp().cpu(),
            self._generate(rows),
        )

    def _force(self, rows: Rows, ids: Tensor) -> Tensor:
        given = ids[None].expand(len(rows.ids), -1)
        where = torch.full_like(given, self.moved, dtype=torch.bool)
        led = self.walk.go_on(rows, given, torch.ones_like(given), where, n_kept=len(ids))
        return led.logits

    def _generate(self, rows: Rows) -> list[str]:
        if not self.max_new_tokens:
            return []
        said = greedy(
            self.walk.model,
            self.walk.edits,
            rows,
            max_new_tokens=self.max_new_tokens,
            moved=self.moved,
            ends=self.ends.to(rows.ids.device),
            context=self.context,
        )
        return self.tokenizer.batch_decode([row.tolist() for row in said], skip_special_tokens=True)


def _traversal(
    readings: Sequence[_Reading],
    paths: Mapping[str, ManifoldPath],
    prompts: Sequence[str],
    asked: AnswerTokens,
    how: str,
    tokenizer: Any,
    generated: bool,
) -> Traversal:
    times = next(iter(paths.values())).times.cpu()
    shape = (len(times), len(prompts))
    index = torch.cat([reading.index for reading in readings])
    order = (index[:, 0] * shape[1] + index[:, 1]).argsort()

    def gathered(name: str) -> Tensor:
        values = torch.cat([getattr(reading, name) for reading in readings])
        return values[order].reshape(*shape, -1)

    logs, tokens = gathered("log_probabilities"), gathered("top_tokens")
    texts: list[str] = [text for reading in readings for text in reading.texts]
    sorted_texts = [texts[i] for i in order.tolist()] if generated else []
    ids = torch.unique(tokens).tolist()
    spelled = tokenizer.batch_decode([[i] for i in ids]) if ids else []
    return Traversal(
        times=times,
        log_probabilities=logs,
        other=(1 - logs.exp().sum(-1)).clamp(0, 1),
        top_tokens=tokens,
        top_probabilities=gathered("top_probabilities"),
        prompts=tuple(prompts),
        answers=asked.names,
        sites=tuple(paths),
        how=how,
        token_texts=dict(zip(ids, spelled, strict=True)),
        texts=tuple(tuple(sorted_texts[t * shape[1] : (t + 1) * shape[1]]) for t in range(shape[0]))
        if generated
        else (),
    )
