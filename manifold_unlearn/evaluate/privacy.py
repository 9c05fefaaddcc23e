"""Whether a model gives away what it was trained on: membership inference and privacy leakage.

Scores are like losses: low for a text that was trained on. The area under the ROC curve is that of
telling the forget set (low) from a holdout set that no model has seen (high): 1 is a leak, 1/2 is
none.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from manifold_unlearn.activations.models import evaluating
from manifold_unlearn.evaluate.likelihood import (
    BatchSize,
    Subject,
    TokenScores,
    answer_encodings,
    answer_scores,
    text_scores,
)

MIN_K = 0.4
"""Share of a text's tokens that Min-K and Min-K++ look at, as open-unlearning sets it."""

MIN_VARIANCE = 1e-6


def loss_score(scores: TokenScores) -> float:
    """Mean negative log-likelihood of a text's tokens.

    References
    ----------
    Yeom et al. (2018), the LOSS attack.
    """
    return float(-scores.log_probabilities.double().mean())


def zlib_score(scores: TokenScores, text: str) -> float:
    """:func:`loss_score` over the bytes of the text compressed by zlib.

    Raises
    ------
    ValueError
        The text is empty.

    References
    ----------
    Carlini et al. (2021), Extracting training data from large language models.
    """
    if not text:
        raise ValueError("the text is empty; zlib needs what the tokens spell.")
    return loss_score(scores) / len(zlib.compress(text.encode("utf-8")))


def min_k_score(scores: TokenScores, *, k: float = MIN_K) -> float:
    """Minus the mean of the lowest ``floor(k L)`` log-probabilities, of one at least.

    References
    ----------
    Shi et al. (2024), Detecting pretraining data from large language models.
    """
    return _lowest(scores.log_probabilities.double(), k)


def min_k_plus_plus_score(scores: TokenScores, *, k: float = MIN_K) -> float:
    """:func:`min_k_score` of ``(log p - mu) / sigma``.

    ``mu`` and ``sigma`` are mean and standard deviation of the log-probability over the vocabulary
    under the model; the variance is clamped at 1e-6.

    References
    ----------
    Zhang et al. (2024), Min-K%++.
    """
    sigma = scores.variance.double().clamp(min=MIN_VARIANCE).sqrt()
    return _lowest((scores.log_probabilities.double() - scores.expected.double()) / sigma, k)


def _lowest(values: Tensor, k: float) -> float:
    if not 0 < k <= 1:
        raise ValueError(f"k={k} must be in (0, 1]: it is a share of the tokens.")
    n = max(1, int(k * len(values)))
    return float(-values.topk(n, largest=False).values.mean())


def membership_scores(
    subject: Subject,
    tokenizer: Any,
    texts: Sequence[tuple[str, str]] | Sequence[str],
    *,
    reference: Subject | None = None,
    include_eos: bool = True,
    k: float = MIN_K,
    batch_size: BatchSize = "auto",
) -> dict[str, np.ndarray]:
    """LOSS, ZLib, Min-K and Min-K++ of each text, from one run.

    Parameters
    ----------
    subject : Subject
    tokenizer : transformers.PreTrainedTokenizerBase
    texts : sequence of (prompt, answer), or of str
        Of a pair the answer is scored.
    reference : Subject, optional
        With it also ``reference``, the loss minus that model's.
    include_eos : bool, default=True
        Score the end of an answer too, as published for TOFU.
    k : float, default=0.4
    batch_size : int or "auto"

    Returns
    -------
    dict of str to ndarray of shape (n_texts,), float64
        ``loss``, ``zlib``, ``min_k``, ``min_k_plus_plus``; low means a member.

    Raises
    ------
    ValueError
        No texts, pairs and plain texts mixed, or what scoring them raises.
    """
    rows = _rows(subject, tokenizer, texts, include_eos, batch_size)
    spelled = [text if isinstance(text, str) else text[1] for text in texts]
    found = membership_of(rows, spelled, k=k)
    if reference is not None:
        others = _rows(reference, tokenizer, texts, include_eos, batch_size)
        found["reference"] = found["loss"] - np.array([loss_score(other) for other in others])
    return found


def membership_of(
    scores: Sequence[TokenScores], texts: Sequence[str], *, k: float = MIN_K
) -> dict[str, np.ndarray]:
    """:func:`membership_scores` of texts scored before; of a pair the text is the answer."""
    found = {
        "loss": [loss_score(row) for row in scores],
        "zlib": [zlib_score(row, text) for row, text in zip(scores, texts, strict=True)],
        "min_k": [min_k_score(row, k=k) for row in scores],
        "min_k_plus_plus": [min_k_plus_plus_score(row, k=k) for row in scores],
    }
    return {name: np.array(values) for name, values in found.items()}


def _rows(
    subject: Subject,
    tokenizer: Any,
    texts: Sequence[tuple[str, str]] | Sequence[str],
    include_eos: bool,
    batch_size: BatchSize,
) -> list[TokenScores]:
    plain_texts = [text for text in texts if isinstance(text, str)]
    pairs = [text for text in texts if not isinstance(text, str)]
    if not texts or (plain_texts and pairs):
        raise ValueError(
            f"{len(pairs)} pairs and {len(plain_texts)} plain texts: give at least one, and all of "
            "one kind."
        )
    if plain_texts:
        return text_scores(subject, tokenizer, plain_texts, batch_size=batch_size)
    return answer_scores(subject, tokenizer, pairs, include_eos=include_eos, batch_size=batch_size)


def gradient_norms(
    subject: Subject,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    form: Literal["mean", "total"] = "mean",
    include_eos: bool = True,
) -> np.ndarray:
    """Norm of the gradient of each answer's mean loss, one backward pass an answer.

    Parameters
    ----------
    subject : Subject
        Parameters that do not require gradients take part, and are as they were afterwards; no
        ``.grad`` is touched.
    tokenizer : transformers.PreTrainedTokenizerBase
    pairs : sequence of (prompt, answer)
    form : {"mean", "total"}
        ``"mean"``: mean over parameter tensors of their 2-norms, as open-unlearning has it;
        ``"total"``: the 2-norm over all of them together.
    include_eos : bool, default=True

    Returns
    -------
    ndarray of shape (n_pairs,), float64
        Low means a member.

    Raises
    ------
    ValueError
        No pairs, an unknown form, or a gradient that is not finite.
    """
    if form not in ("mean", "total"):
        raise ValueError(f"form={form!r} is not 'mean' or 'total'.")
    found = []
    with subject() as model, evaluating(model):
        with torch.no_grad():
            rows = answer_encodings(model, tokenizer, pairs, include_eos)
        parameters = [p for p in model.parameters() if p.is_floating_point()]
        frozen = [p for p in parameters if not p.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            for row in tqdm(rows, desc="gradient norms", disable=None, leave=False):
                norms = _norms(model, row.ids, row.answer, parameters)
                found.append(float(norms.mean() if form == "mean" else norms.norm()))
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
    values = np.array(found)
    if not np.isfinite(values).all():
        first = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"the gradient of pair {first} is not finite; load the model in float32.")
    return values


def _norms(model: Any, ids: Tensor, answer: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    with torch.enable_grad():
        logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0, :-1]
        wanted = ids[1:].to(model.device)
        losses = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")
        loss = losses[answer[1:].to(model.device)].mean()
        gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    norms = [torch.zeros(()) if g is None else g.double().norm().cpu() for g in gradients]
    return torch.stack([n.double() for n in norms])


@dataclass(frozen=True)
class MembershipInference:
    """How well a score tells the forget set from texts that no model has seen."""

    auc: float
    """in [0, 1]; 1: every forget text scores below every other"""
    interval: tuple[float, float]
    """95 %"""
    n_forget: int
    n_holdout: int

    def to_json(self) -> dict[str, Any]:
        """The area, its interval and the counts."""
        return {
            "auc": self.auc,
            "interval": list(self.interval),
            "n_forget": self.n_forget,
            "n_holdout": self.n_holdout,
        }


def membership_inference(forget: np.ndarray, holdout: np.ndarray) -> MembershipInference:
    """Area under the ROC curve of a loss-like score, with its 95 % interval.

    Parameters
    ----------
    forget, holdout : ndarray of shape (n_forget,), (n_holdout,)
        Scores, low for members. Published figures label the holdout set 1 and take the score as it
        is; labeling members 1 and turning the score around gives the same area.

    Returns
    -------
    MembershipInference
        The interval is DeLong's, cut to [0, 1]; where all or none are in order, and it would have
        no width, it is the exact binomial one of the smaller set.

    Raises
    ------
    ValueError
        Fewer than two texts on a side, or a score that is not finite.

    References
    ----------
    DeLong, DeLong and Clarke-Pearson (1988), Biometrics 44.
    """
    forget, holdout = np.asarray(forget, np.float64), np.asarray(holdout, np.float64)
    for name, values in (("forget", forget), ("holdout", holdout)):
        if len(values) < 2 or not np.isfinite(values).all():
            raise ValueError(
                f"the {name} scores must be at least two and finite; got {len(values)}, "
                f"{int((~np.isfinite(values)).sum())} of them not finite."
            )
    n, m = len(forget), len(holdout)
    ranks = stats.rankdata(np.concatenate([forget, holdout]))
    above = (m - (ranks[:n] - stats.rankdata(forget))) / m
    below = (ranks[n:] - stats.rankdata(holdout)) / n
    auc = float(above.mean())
    variance = float(above.var(ddof=1) / n + below.var(ddof=1) / m)
    if variance > 0:
        reach = float(stats.norm.ppf(0.975)) * variance**0.5
        interval = (max(0.0, auc - reach), min(1.0, auc + reach))
    else:
        reach = 1 - 0.025 ** (1 / min(n, m))
        interval = (max(0.0, auc - reach), min(1.0, auc + reach))
    return MembershipInference(auc, interval, n, m)


def privacy_leakage(
    auc: float,
    auc_retrained: float = 0.5,
    *,
    convention: Literal["leak_high", "leak_low"] = "leak_high",
) -> float:
    """PrivLeak, in percent: 0 like the retrained model, below 0 still a member, above 0 overdone.

    Parameters
    ----------
    auc, auc_retrained : float
        Areas of the model judged and of the retrained one.
    convention : {"leak_high", "leak_low"}
        ``"leak_high"``: areas as :func:`membership_inference` and open-unlearning give them, 1 a
        leak: ``100 ((1 - a) - (1 - r)) / (1 - r)``. ``"leak_low"``: areas the other way round, 0 a
        leak, as in the MUSE paper: ``100 (a - r) / r``. The figure is the same.

    Raises
    ------
    ValueError
        The retrained model leaks completely, so that nothing can be relative to it; an area outside
        [0, 1]; an unknown convention.

    References
    ----------
    Shi et al. (2024), MUSE, "PrivLeak".
    """
    if convention not in ("leak_high", "leak_low"):
        raise ValueError(f"convention={convention!r} is not 'leak_high' or 'leak_low'.")
    _require_areas(auc, auc_retrained)
    now, then = (1 - auc, 1 - auc_retrained) if convention == "leak_high" else (auc, auc_retrained)
    if then == 0:
        raise ValueError(
            f"auc_retrained={auc_retrained} is a complete leak of a model that was never told; "
            "take a holdout set like the forget set."
        )
    return 100 * (now - then) / then


def relative_difference(auc: float, auc_retrained: float) -> float:
    """``100 (a - r) / r`` of areas where 1 is a leak: open-unlearning's ``rel_diff``, not PrivLeak.

    Raises
    ------
    ValueError
        ``auc_retrained`` is 0, or an area lies outside [0, 1].
    """
    _require_areas(auc, auc_retrained)
    if auc_retrained == 0:
        raise ValueError("auc_retrained=0: nothing can be relative to it.")
    return 100 * (auc - auc_retrained) / auc_retrained


def membership_similarity(auc: float, auc_retrained: float) -> float:
    """``1 - min(|a - r| / r, 1)``: 1 like the retrained model; the ``s_*`` of the aggregates.

    References
    ----------
    Unlearning Depth Score, arXiv 2605.24614, its study of 150 checkpoints.
    """
    return 1 - min(abs(relative_difference(auc, auc_retrained)) / 100, 1.0)


def _require_areas(*areas: float) -> None:
    for area in areas:
        if not 0 <= area <= 1:
            raise ValueError(f"{area} is no area under a ROC curve; it must be in [0, 1].")
