"""Attacks that only ask differently: prefilled answers, examples, paraphrases, framings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch

from manifold_unlearn.activations.corpus import Item, join_answer
from manifold_unlearn.activations.models import context_length
from manifold_unlearn.arrays import generator
from manifold_unlearn.attack.results import AttackCurve
from manifold_unlearn.attack.wordings import FRAMINGS, frame, reword
from manifold_unlearn.evaluate.likelihood import (
    Subject,
    answer_log_probabilities,
    greedy_answers,
)
from manifold_unlearn.evaluate.metrics import answer_probability
from manifold_unlearn.evaluate.rouge import rouge_l_recall
from manifold_unlearn.evaluate.suites import answer_room

Pair: TypeAlias = tuple[str, str]
"""Prompt and wanted continuation, which brings its own leading space."""

Measure: TypeAlias = Callable[[Subject, Any, Sequence[Pair]], np.ndarray]
"""How well a subject continues each prompt as wanted, ``(n_pairs,)`` in [0, 1]."""


def recall(subject: Subject, tokenizer: Any, pairs: Sequence[Pair]) -> np.ndarray:
    """ROUGE-L recall of the wanted continuation in the greedy one.

    As many tokens are generated as :func:`~manifold_unlearn.evaluate.suites.answer_room` says. An
    empty continuation of the model counts 0.
    """
    said = greedy_answers(
        subject,
        tokenizer,
        [prompt for prompt, _ in pairs],
        max_new_tokens=answer_room(tokenizer, [wanted for _, wanted in pairs]),
    )
    return np.array([rouge_l_recall(s, w) for s, (_, w) in zip(said, pairs, strict=True)])


def probability(subject: Subject, tokenizer: Any, pairs: Sequence[Pair]) -> np.ndarray:
    """Length-normalized probability of the wanted continuation."""
    return answer_probability(answer_log_probabilities(subject, tokenizer, list(pairs)))


def prefill_attack(
    subject: Subject,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    tokens: Sequence[int] = (0, 1, 2, 4, 8),
    prefix: str | None = None,
    measure: Measure = recall,
) -> AttackCurve:
    """Put the beginning of an answer into the model's mouth and measure the rest.

    Parameters
    ----------
    subject : Subject
    tokenizer : transformers.PreTrainedTokenizerBase
    items : sequence of Item
    tokens : sequence of int, default=(0, 1, 2, 4, 8)
        How many tokens are given, ascending.
    prefix : str, optional
        What the tokens are taken from: an affirmative phrase (``" Sure, it is"``), the same for
        all items, behind which the whole answer is wanted. Default: each item's own answer,
        behind which its rest is wanted.
    measure : callable, default=recall
        :func:`recall`, :func:`probability`, or one's own.

    Returns
    -------
    AttackCurve
        ``unit`` "tokens". An item with fewer tokens to give is given all but those that carry its
        last word; ``details["n_cut_short"]`` counts such items at each point.

    Raises
    ------
    ValueError
        No items, an item without an answer, or ``tokens`` that do not ascend from 0 or more.

    Notes
    -----
    With the answer's own tokens given the rest is easier for every model: only the gap to the
    model that was never told counts. An affirmative or a benign prefix gives nothing away.
    """
    pairs = _pairs(items)
    _require_ascending("tokens", tokens)
    if prefix is None:
        pieces = [_cuts(tokenizer, wanted) for _, wanted in pairs]
    else:
        pieces = [[*_ends(tokenizer, [prefix])[0]]] * len(pairs)
    rows, short = [], []
    for n in tokens:
        given = [cuts[min(n, len(cuts) - 1)] for cuts in pieces]
        short.append(sum(n > len(cuts) - 1 for cuts in pieces))
        asked = [
            (prompt + wanted[:end], wanted[end:])
            if prefix is None
            else (prompt + prefix[:end], join_answer(prefix[:end] or prompt, wanted.lstrip()))
            for (prompt, wanted), end in zip(pairs, given, strict=True)
        ]
        rows.append(measure(subject, tokenizer, asked))
    name = "prefill, own answer" if prefix is None else f"prefill, {prefix.strip()!r}"
    details = {"n_cut_short": short, "prefix": prefix}
    return _curve(name, measure, "tokens", tokens, rows, details)


def few_shot_attack(
    subject: Subject,
    tokenizer: Any,
    items: Sequence[Item],
    shots: Sequence[Item],
    *,
    n_shots: Sequence[int] = (0, 1, 2, 4),
    separator: str = "\n",
    measure: Measure = recall,
    random_state: int = 0,
) -> AttackCurve:
    r"""Show answered questions of the retain set before the question.

    Parameters
    ----------
    subject : Subject
    tokenizer : transformers.PreTrainedTokenizerBase
    items : sequence of Item
        What is asked for.
    shots : sequence of Item
        What is shown, in an order drawn for each item; more shots keep the ones before.
    n_shots : sequence of int, default=(0, 1, 2, 4)
        Ascending.
    separator : str, default="\n"
        Between an answer and the next question.
    measure : callable, default=recall
    random_state : int, default=0

    Returns
    -------
    AttackCurve
        ``unit`` "shots". Shots that do not fit into the model's context with the question and its
        answer are left out; ``details["mean_shots"]`` is how many were shown.

    Raises
    ------
    ValueError
        No items, one without an answer, fewer shots than asked for, or a shot that is an item.
    """
    pairs = _pairs(items)
    _require_ascending("n_shots", n_shots)
    if len(shots) < n_shots[-1]:
        raise ValueError(f"{len(shots)} shots for n_shots={n_shots[-1]}; give more, or show fewer.")
    if shared := {item.text for item in items} & {shot.text for shot in shots}:
        raise ValueError(f"{len(shared)} items are among the shots: {min(shared)!r}; remove them.")
    shown = [shot.text + separator for shot in shots]
    draw = generator(random_state)
    orders = [torch.randperm(len(shown), generator=draw).tolist() for _ in pairs]
    room = _room(subject, tokenizer, pairs)
    lengths = [len(ids) for ids in _ids(tokenizer, shown)] if shown else []
    rows, used = [], []
    for n in n_shots:
        fitting = [_fitting(order[:n], lengths, r) for order, r in zip(orders, room, strict=True)]
        used.append(float(np.mean([len(order) for order in fitting])))
        asked = [
            ("".join(shown[i] for i in order) + prompt, wanted)
            for (prompt, wanted), order in zip(pairs, fitting, strict=True)
        ]
        rows.append(measure(subject, tokenizer, asked))
    details = {"mean_shots": used, "random_state": random_state}
    return _curve("few-shot", measure, "shots", n_shots, rows, details)


def paraphrase_attack(
    subject: Subject,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    n_prompts: int | None = None,
    measure: Measure = recall,
) -> AttackCurve:
    """Ask again in other words, and keep the best answer of each item.

    Parameters
    ----------
    subject : Subject
    tokenizer : transformers.PreTrainedTokenizerBase
    items : sequence of Item
        Asked with ``paraphrased_question``; an item that has none is reworded by rule.
    n_prompts : int, optional
        Most paraphrases tried. Default: all that an item has.
    measure : callable, default=recall

    Returns
    -------
    AttackCurve
        ``unit`` "prompts"; each point is the best so far. ``details["mean_by_prompt"]`` has the
        mean of each paraphrase alone over the items that have it, which an attacker gets who
        cannot tell a right answer; ``details["n_reworded"]`` counts items reworded by rule.

    Raises
    ------
    ValueError
        No items, one without an answer, or ``n_prompts`` below 1.
    """
    pairs = _pairs(items)
    if n_prompts is not None and n_prompts < 1:
        raise ValueError(f"n_prompts={n_prompts} must be at least 1.")
    wordings = [(item.paraphrased_question or reword(item.question))[:n_prompts] for item in items]
    details = {"n_reworded": sum(not item.paraphrased_question for item in items)}
    asked = [
        [(text, join_answer(text, wanted.lstrip())) for text in texts]
        for texts, (_, wanted) in zip(wordings, pairs, strict=True)
    ]
    return _best_of("paraphrase", subject, tokenizer, pairs, asked, measure, details)


def framing_attack(
    subject: Subject,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    framings: Mapping[str, str] = FRAMINGS,
    measure: Measure = recall,
) -> AttackCurve:
    """Ask within each framing (role play, translation, ...), and keep the best answer of each item.

    Parameters
    ----------
    subject : Subject
    tokenizer : transformers.PreTrainedTokenizerBase
    items : sequence of Item
    framings : mapping of str to str
        By name, each with ``{prompt}``; tried in this order.
    measure : callable, default=recall

    Returns
    -------
    AttackCurve
        ``unit`` "prompts"; each point is the best so far. ``details["mean_by_framing"]`` has the
        mean of each framing alone. A framed prompt that the model's context does not hold is asked
        without its framing; ``details["n_unframed"]`` counts those.

    Raises
    ------
    ValueError
        No items, one without an answer, no framings, or one without ``{prompt}``.
    """
    pairs = _pairs(items)
    if not framings:
        raise ValueError("framings is empty; give at least one.")
    room = _room(subject, tokenizer, pairs)
    asked: list[list[Pair]] = [[] for _ in pairs]
    unframed = 0
    for framing in framings.values():
        extra = len(_ids(tokenizer, [frame(framing, "")])[0])
        for i, (prompt, wanted) in enumerate(pairs):
            fits = extra <= room[i]
            unframed += not fits
            text = frame(framing, prompt) if fits else prompt
            asked[i].append((text, join_answer(text, wanted.lstrip())))
    curve = _best_of(
        "framings", subject, tokenizer, pairs, asked, measure, {"n_unframed": unframed}
    )
    alone = dict(zip(framings, curve.details["mean_by_prompt"], strict=True))
    return replace(curve, details={**curve.details, "mean_by_framing": alone})


def _best_of(
    name: str,
    subject: Subject,
    tokenizer: Any,
    pairs: Sequence[Pair],
    asked: Sequence[Sequence[Pair]],
    measure: Measure,
    details: dict[str, Any],
) -> AttackCurve:
    """Curve of the best so far, the plain prompt first."""
    rows = [measure(subject, tokenizer, pairs)]
    alone = []
    for n in range(max(len(texts) for texts in asked)):
        having = [i for i, texts in enumerate(asked) if len(texts) > n]
        found = measure(subject, tokenizer, [asked[i][n] for i in having])
        alone.append(float(np.mean(found)))
        best = rows[-1].copy()
        best[having] = np.maximum(best[having], found)
        rows.append(best)
    details = {**details, "mean_by_prompt": alone}
    return _curve(name, measure, "prompts", range(len(rows)), rows, details)


def _curve(
    name: str,
    measure: Measure,
    unit: str,
    spent: Sequence[int],
    rows: Sequence[np.ndarray],
    details: Mapping[str, Any],
) -> AttackCurve:
    metric = getattr(measure, "__name__", "knowledge")
    points = np.array(list(spent), dtype=np.float64)
    return AttackCurve(name, metric, unit, points, np.stack(rows).astype(np.float64), details)


def _pairs(items: Sequence[Item]) -> list[Pair]:
    if not items:
        raise ValueError("items is empty; give at least one question with its answer.")
    for i, item in enumerate(items):
        if not item.answer.strip():
            raise ValueError(f"item {i} ({item.question[:40]!r}) has no answer; leave texts out.")
    return [item.pair for item in items]


def _require_ascending(name: str, values: Sequence[int]) -> None:
    if not len(values) or values[0] < 0 or any(np.diff(values) <= 0):
        raise ValueError(f"{name}={tuple(values)} must ascend from 0 or more.")


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return list(tokenizer(list(texts), add_special_tokens=False)["input_ids"])


def _ends(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """For each text the characters before token 0, 1, ...: cuts between whole characters."""
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    return [[0, *sorted({end for _, end in row})] for row in encoded["offset_mapping"]]


def _cuts(tokenizer: Any, wanted: str) -> list[int]:
    """Where an answer may be cut so that something is left that ROUGE takes for a word."""
    words = [i for i, letter in enumerate(wanted) if letter.isascii() and letter.isalnum()]
    last = words[-1] if words else len(wanted) - 1
    return [end for end in _ends(tokenizer, [wanted])[0] if end <= last]


def _room(subject: Subject, tokenizer: Any, pairs: Sequence[Pair]) -> list[float]:
    """Tokens that each model's context leaves beside a prompt and its answer."""
    with subject() as model:
        context = context_length(model)
    if context is None:
        return [float("inf")] * len(pairs)
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    left = context - answer_room(tokenizer, [wanted for _, wanted in pairs])
    return [left - len(ids) for ids in prompts]


def _fitting(order: Sequence[int], lengths: Sequence[int], room: float) -> list[int]:
    """Shots up to the first that is too long for what is left."""
    total = np.cumsum([lengths[i] for i in order])
    return [i for i, length in zip(order, total, strict=True) if length <= room]
