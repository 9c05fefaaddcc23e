"""Log-probabilities of answers and texts, and greedy answers: what every metric is made of."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from manifold_unlearn.activations.models import context_length, evaluating
from manifold_unlearn.activations.tokens import Batch, Encoding, batches, encode

Subject: TypeAlias = "Callable[[], AbstractContextManager[Any]]"
"""What is measured: opens to a model, perhaps one that is being intervened on."""

N_SEAMS = 16
"""Pairs on which the two ways to tokenize a prompt and its answer are compared."""

BatchSize: TypeAlias = "int | Literal['auto']"

_Reader: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From logits ``(n, vocabulary)`` and the ids ``(n,)`` that follow, what is kept: ``(n, k)``."""

LOWEST = -1e4
"""Log-probability below which a token adds nothing to the moments of the vocabulary."""


class TokenScores(NamedTuple):
    """What a model makes of each token of a sequence; all ``(n_tokens,)``."""

    log_probabilities: Tensor
    """float32, natural logarithms"""
    correct: Tensor
    """bool: the token is the likeliest of the vocabulary"""
    expected: Tensor
    """float32: mean of ``log p`` over the vocabulary under the model itself"""
    variance: Tensor
    """float32: variance of ``log p`` over the vocabulary under the model itself"""

    def up_to(self, n_tokens: int) -> TokenScores:
        """Scores of the first tokens."""
        return TokenScores(*(values[:n_tokens] for values in self))


def plain(model: Any) -> Subject:
    """Return the subject that is a model as it stands."""
    return lambda: nullcontext(model)


def answer_log_probabilities(
    subject: Subject,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    include_eos: bool = False,
    cut: bool = False,
    batch_size: BatchSize = "auto",
) -> list[Tensor]:
    """Log-probability of each answer token, given the prompt and the answer so far.

    Logits are computed where an answer token is predicted, nowhere else, and a prompt that several
    answers share is run once. Where tokenizing prompt and answer together gives other tokens than
    one after the other, the way that is likelier on the first pairs is used for all: a model was
    trained on one of the two.

    Parameters
    ----------
    subject : Subject
        ``plain(model)``, or any function that opens to a model.
    tokenizer : transformers.PreTrainedTokenizerBase
    pairs : sequence of (prompt, answer)
        The answer brings its own leading space.
    include_eos : bool, default=False
        Count the end-of-sequence token as the answer's last.
    cut : bool, default=False
        Score of an answer what the model's context holds, instead of refusing it.
    batch_size : int or "auto"

    Returns
    -------
    list of Tensor
        For each pair ``(n_answer_tokens,)`` float32, natural logarithms.

    Raises
    ------
    ValueError
        A pair whose prompt or answer has no tokens, or that exceeds the model's context.
    """
    with subject() as model, torch.no_grad(), evaluating(model):
        rows = answer_encodings(model, tokenizer, pairs, include_eos, batch_size, cut=cut)
        return score_log_probabilities(model, rows, batch_size)


def answer_scores(
    subject: Subject,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    include_eos: bool = False,
    batch_size: BatchSize = "auto",
) -> list[TokenScores]:
    """Log-probability of each answer token, whether it is the argmax, and the vocabulary's moments.

    Teacher-forced, from the same run as :func:`answer_log_probabilities`, whose parameters and
    errors it shares.

    Returns
    -------
    list of TokenScores
        One a pair, of ``n_answer_tokens``.
    """
    with subject() as model, torch.no_grad(), evaluating(model):
        rows = answer_encodings(model, tokenizer, pairs, include_eos, batch_size)
        return score_tokens(model, rows, batch_size)


def answer_encodings(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    include_eos: bool = False,
    batch_size: BatchSize = "auto",
    *,
    cut: bool = False,
) -> list[Encoding]:
    """Pairs as tokens, at the seams of prompt and answer in the way the model finds likelier."""
    context = context_length(model)
    rows, whole = (
        encode(
            tokenizer,
            list(pairs),
            max_length=context if cut else None,
            context=context,
            append_eos=include_eos,
            joint=joint,
        )
        for joint in (False, True)
    )
    seams = [i for i, (a, b) in enumerate(zip(rows, whole, strict=True)) if _differ(a, b)]
    if sample := seams[:N_SEAMS]:
        tried = [rows[i] for i in sample] + [whole[i] for i in sample]
        scores = score_log_probabilities(model, tried, batch_size)
        if _mean(scores[len(sample) :]) > _mean(scores[: len(sample)]):
            return [whole[i] if i in set(seams) else row for i, row in enumerate(rows)]
    return rows


def _differ(row: Encoding, whole: Encoding) -> bool:
    """Whether two tokenizations of a pair are both usable and not the same."""
    usable = bool(whole.answer.any()) and not bool(whole.answer[0])
    return usable and not torch.equal(row.ids, whole.ids)


def _mean(scores: Sequence[Tensor]) -> float:
    return float(torch.stack([row.mean() for row in scores]).mean())


def score_log_probabilities(
    model: Any, rows: Sequence[Encoding], batch_size: BatchSize = "auto"
) -> list[Tensor]:
    """Log-probabilities of the answer tokens of rows from :func:`answer_encodings`."""
    return [row[:, 0] for row in _score(model, rows, batch_size, _log_probability)]


def score_tokens(
    model: Any, rows: Sequence[Encoding], batch_size: BatchSize = "auto"
) -> list[TokenScores]:
    """All scores of the answer tokens of rows from :func:`answer_encodings`."""
    return [_unpack(row) for row in _score(model, rows, batch_size, _all_scores)]


def _log_probability(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(1, ids[:, None].to(logits.device)).cpu()


def _all_scores(logits: Tensor, ids: Tensor) -> Tensor:
    """Columns in the order of :class:`TokenScores`."""
    ids = ids.to(logits.device)
    log_p = logits.float().log_softmax(-1)
    likelier, p = log_p.clamp(min=LOWEST), log_p.exp()
    expected = (p * likelier).sum(-1)
    variance = (p * (likelier - expected[:, None]).square()).sum(-1)
    right = log_p.gather(1, ids[:, None])[:, 0]
    correct = (log_p.argmax(-1) == ids).float()
    return torch.stack([right, correct, expected, variance], dim=1).cpu()


def _unpack(row: Tensor) -> TokenScores:
    return TokenScores(row[:, 0], row[:, 1].bool(), row[:, 2], row[:, 3])


def require_numbers(rows: Sequence[Tensor], what: str) -> None:
    """Raise ``ValueError`` where a model gave NaN instead of log-probabilities."""
    for i, row in enumerate(rows):
        if bool(row.isnan().any()):
            raise ValueError(
                f"{what} {i}: the model's log-probabilities are NaN. Its weights, or what edits "
                "them, hold NaN or overflow; check them, or load it in float32 or bfloat16."
            )


def _score(
    model: Any, rows: Sequence[Encoding], batch_size: BatchSize, read: _Reader
) -> list[Tensor]:
    alike = _alike(rows)
    scores: list[Tensor] = [torch.empty(0)] * len(alike)
    prompts, answers = _by_prompt([rows[index[0]] for index in alike])
    made = batches(prompts, batch_size=batch_size, padding_side="left")
    for batch in tqdm(made, desc="score answers", unit="batch", disable=None, leave=False):
        _score_batch(model, batch, answers, batch_size, scores, read)
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for index, score in zip(alike, scores, strict=True):
        for i in index:
            found[i] = score
    require_numbers(found, "pair")
    return found


def _alike(rows: Sequence[Encoding]) -> list[list[int]]:
    """Indices of the rows, those together that are the same prompt and answer."""
    shared: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if not bool(row.answer.any()):
            raise ValueError(f"pair {i} has no answer; give one, or score texts.")
        start = int(row.answer.int().argmax())
        if start == 0:
            raise ValueError(f"pair {i} has no prompt tokens before its answer; give a prompt.")
        shared[(start, *row.ids.tolist())].append(i)
    return list(shared.values())


def _by_prompt(
    rows: Sequence[Encoding],
) -> tuple[list[Encoding], list[list[tuple[int, Tensor]]]]:
    """Distinct prompts, and for each its answers with their index among the rows."""
    shared: dict[tuple[int, ...], list[tuple[int, Tensor]]] = defaultdict(list)
    for i, row in enumerate(rows):
        start = int(row.answer.int().argmax())
        shared[tuple(row.ids[:start].tolist())].append((i, row.ids[start:]))
    prompts = [_encoding(ids) for ids in shared]
    return prompts, list(shared.values())


def _encoding(ids: Sequence[int] | Tensor) -> Encoding:
    none = torch.zeros(len(ids), dtype=torch.bool)
    return Encoding(torch.as_tensor(ids, dtype=torch.int64), none, none)


def _score_batch(
    model: Any,
    batch: Batch,
    answers: Sequence[Sequence[tuple[int, Tensor]]],
    batch_size: BatchSize,
    scores: list[Tensor],
    read: _Reader,
) -> None:
    """Run the prompts once, then their answers from the cache, those of like length together."""
    device = model.device
    of_row = [answers[i] for i in batch.index.tolist()]
    longer = [(r, i, ids) for r, group in enumerate(of_row) for i, ids in group if len(ids) > 1]
    out = model(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        position_ids=batch.position_ids.to(device),
        use_cache=bool(longer),
        logits_to_keep=1,
    )
    asked = [(r, i, ids[0]) for r, group in enumerate(of_row) for i, ids in group]
    first = read(out.logits[[r for r, _, _ in asked], -1], torch.stack([t for _, _, t in asked]))
    for row, (_, i, _) in zip(first, asked, strict=True):
        scores[i] = row[None]
    given = batches([_encoding(ids[:-1]) for _, _, ids in longer], batch_size=batch_size)
    for n, part in enumerate(given, start=1):
        chosen = [longer[k] for k in part.index.tolist()]
        source = torch.tensor([r for r, _, _ in chosen])
        cache = out.past_key_values
        if n < len(given):  # the last part may have the original
            cache = copy.deepcopy(cache)
        cache.batch_select_indices(source.to(device))
        mask = torch.cat([batch.attention_mask[source], part.attention_mask], dim=1)
        starts = batch.position_ids[source, -1:] + 1
        logits = model(
            input_ids=part.input_ids.to(device),
            attention_mask=mask.to(device),
            position_ids=(starts + part.position_ids).to(device),
            past_key_values=cache,
            use_cache=True,
        ).logits
        for row, (_, i, ids) in zip(logits, chosen, strict=True):
            scores[i] = torch.cat([scores[i], read(row[: len(ids) - 1], ids[1:])])


def greedy_answers(
    subject: Subject,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 32,
    batch_size: BatchSize = "auto",
) -> list[str]:
    """Greedy continuation of each prompt, decoded without special tokens.

    It ends where the model's context does, if that comes before ``max_new_tokens``.
    """
    texts = [""] * len(prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with subject() as model, torch.no_grad(), evaluating(model):
        context = context_length(model)
        rows = encode(tokenizer, list(prompts), context=context)
        by_room: dict[int, list[int]] = defaultdict(list)
        for i, row in enumerate(rows):
            room = max_new_tokens if context is None else context - len(row) + 1
            by_room[min(room, max_new_tokens)].append(i)
        made = [
            (room, [index[r] for r in batch.index.tolist()], batch)
            for room, index in by_room.items()
            for batch in batches(
                [rows[i] for i in index],
                batch_size=batch_size,
                padding_side="left",
                pad_id=pad or 0,
            )
        ]
        progress = tqdm(made, desc="greedy answers", unit="batch", disable=None, leave=False)
        for room, index, batch in progress:
            new = model.generate(
                input_ids=batch.input_ids.to(model.device),
                attention_mask=batch.attention_mask.to(model.device),
                max_new_tokens=room,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad,
            )[:, batch.input_ids.shape[1] :]
            decoded = tokenizer.batch_decode(new, skip_special_tokens=True)
            for i, text in zip(index, decoded, strict=True):
                texts[i] = text
    return texts


def text_log_probabilities(
    subject: Subject,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    reference: Subject | None = None,
    batch_size: BatchSize = "auto",
) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probability of each token of each text, and the divergence from a reference model.

    Parameters
    ----------
    subject, reference : Subject
        The reference must share the vocabulary. The two are run batch by batch, so that logits of
        one batch are all that is held.
    tokenizer : transformers.PreTrainedTokenizerBase
    texts : sequence of str
    batch_size : int or "auto"

    Returns
    -------
    log_probabilities : list of Tensor
        For each text ``(n_tokens - 1,)``: the first token is not predicted.
    divergences : list of Tensor
        Of the same shapes, ``KL(reference || subject)`` in nats; empty without a reference.
    """
    found = _read_texts(subject, reference, tokenizer, texts, batch_size)
    return found.log_probabilities, found.divergences


class TextDivergence(NamedTuple):
    """What two models make of texts; for each text ``(n_tokens - 1,)``."""

    log_probabilities: list[Tensor]
    reference_log_probabilities: list[Tensor]
    divergences: list[Tensor]
    """``KL(reference || subject)`` in nats"""


def text_divergence(
    subject: Subject,
    reference: Subject,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: BatchSize = "auto",
) -> TextDivergence:
    """Log-probabilities of both models and the divergence between them, from one run of each.

    Parameters are those of :func:`text_log_probabilities`.
    """
    return _read_texts(subject, reference, tokenizer, texts, batch_size)


def _read_texts(
    subject: Subject,
    reference: Subject | None,
    tokenizer: Any,
    texts: Sequence[str],
    batch_size: BatchSize,
) -> TextDivergence:
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    n_compared = len(texts) if reference is not None else 0
    theirs, kl = [torch.empty(0)] * n_compared, [torch.empty(0)] * n_compared
    with subject() as model:
        rows = encode(tokenizer, list(texts), context=context_length(model))
    made = batches(rows, batch_size=batch_size, token_budget=1024)
    for batch in tqdm(made, desc="score texts", unit="batch", disable=None, leave=False):
        log_q = _log_softmax(subject, batch)
        log_p = None if reference is None else _log_softmax(reference, batch)
        for r, i in enumerate(batch.index.tolist()):
            n, following = len(rows[i]) - 1, rows[i].ids[1:, None]
            q = log_q[r, :n]
            found[i] = q.gather(1, following)[:, 0]
            if log_p is not None:
                p = log_p[r, :n]
                theirs[i] = p.gather(1, following)[:, 0]
                kl[i] = (p.exp() * (p - q)).sum(-1).clamp(min=0)
    require_numbers(found, "text")
    require_numbers(theirs, "the reference's text")
    return TextDivergence(found, theirs, kl)


def text_scores(
    subject: Subject,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: BatchSize = "auto",
) -> list[TokenScores]:
    """As :func:`answer_scores`, of every token of a plain text but the first.

    Raises
    ------
    ValueError
        A text of fewer than two tokens, or longer than the model's context.
    """
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    with subject() as model, torch.no_grad(), evaluating(model):
        rows = encode(tokenizer, list(texts), context=context_length(model))
        if short := [i for i, row in enumerate(rows) if len(row) < 2]:
            raise ValueError(
                f"text {short[0]} ({texts[short[0]]!r}) has one token, and the first is not "
                "predicted; remove it."
            )
        made = batches(rows, batch_size=batch_size, token_budget=1024)
        for batch in tqdm(made, desc="score texts", unit="batch", disable=None, leave=False):
            logits = model(
                input_ids=batch.input_ids.to(model.device),
                attention_mask=batch.attention_mask.to(model.device),
                position_ids=batch.position_ids.to(model.device),
                use_cache=False,
            ).logits
            for r, i in enumerate(batch.index.tolist()):
                found[i] = _all_scores(logits[r, : len(rows[i]) - 1], rows[i].ids[1:])
    require_numbers(found, "text")
    return [_unpack(row) for row in found]


def _log_softmax(subject: Subject, batch: Batch) -> Tensor:
    with subject() as model, torch.no_grad(), evaluating(model):
        logits = model(
            input_ids=batch.input_ids.to(model.device),
            attention_mask=batch.attention_mask.to(model.device),
            position_ids=batch.position_ids.to(model.device),
            use_cache=False,
        ).logits
    return logits.float().log_softmax(-1).cpu()
