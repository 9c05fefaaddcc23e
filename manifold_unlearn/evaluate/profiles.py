"""Everything that is measured of one model, set by set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.evaluate.likelihood import BatchSize, Subject, greedy_answers
from manifold_unlearn.evaluate.multiple_choice import choice_questions, score_choices
from manifold_unlearn.evaluate.privacy import membership_inference, membership_scores
from manifold_unlearn.evaluate.results import Metric
from manifold_unlearn.evaluate.sampling import leak_at_k, sampled_leakage
from manifold_unlearn.evaluate.suites import (
    ScoredAnswers,
    answer_room,
    assess,
    assess_text,
    recall_of,
    score_answers,
)

N_OPTIONS = 4


@dataclass(frozen=True)
class EvaluationSets:
    """What models are asked.

    Attributes
    ----------
    forget, retain : sequence of Item
        Questions with answers.
    holdout : sequence of Item
        Questions with answers that no model was told; for membership inference.
    neutral : sequence of str
        Texts on other matters; for perplexity and divergence.
    """

    forget: Sequence[Item]
    retain: Sequence[Item]
    holdout: Sequence[Item] = ()
    neutral: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("forget", "retain"):
            if not getattr(self, name):
                raise ValueError(f"the {name} set is empty; give at least one question.")


@dataclass(frozen=True, eq=False)
class Profile:
    """All that is measured of one model.

    Attributes
    ----------
    metrics : dict of str to dict of str to Metric
        By set (``"forget"``, ``"retain"``) and name, one value an item.
    figures : dict of str to dict of str to float
        ``"neutral"``: perplexity, and ``kl`` to the reference; ``"membership"``: areas under the
        curve by score, near 1 where forget items are known to have been seen.
    said : dict of str to list of str
        Greedy answers by set; empty where none were generated.
    """

    metrics: dict[str, dict[str, Metric]]
    figures: dict[str, dict[str, float]]
    said: dict[str, list[str]]


def profile(
    subject: Subject,
    tokenizer: Any,
    sets: EvaluationSets,
    *,
    reference: Subject | None = None,
    include_eos: bool = False,
    generate: bool = True,
    max_new_tokens: int | None = None,
    n_samples: int = 0,
    choices: bool = False,
    batch_size: BatchSize = "auto",
) -> Profile:
    """Measure one model on all sets.

    Parameters
    ----------
    subject : Subject
        ``plain(model)``, or any function that opens to a model.
    tokenizer : transformers.PreTrainedTokenizerBase
    sets : EvaluationSets
    reference : Subject, optional
        A model of the same vocabulary: with neutral texts, the divergence from it is measured too.
    include_eos : bool, default=False
        Count the end-of-sequence token as a part of every answer, as TOFU does.
    generate : bool, default=True
        Also generate greedy answers, for ROUGE-L recall and fluency.
    max_new_tokens : int, optional
        Of the greedy answers. Default: the longest answer's tokens plus a quarter.
    n_samples : int, default=0
        Sampled answers to each forget question, for ``leak_at_<n_samples>``.
    choices : bool, default=False
        Also ask the items as multiple-choice questions, for models that can answer such.
    batch_size : int or "auto"

    Returns
    -------
    Profile
        Of both sets what :func:`assess` gives, ``exact_memorization`` and
        ``extraction_strength``; with perturbed answers ``accuracy`` (the answer ranks first among
        them), and with three ``choice_accuracy``, among four lettered options in all rotations.

    Raises
    ------
    ValueError
        A holdout set beside a forget set of plain texts; questions and plain texts in one set.
    """
    if sets.holdout and not sets.forget[0].answer:
        raise ValueError(
            "membership inference needs answers in the forget set, which is of plain texts; give "
            "questions, or leave the holdout set out."
        )
    metrics: dict[str, dict[str, Metric]] = {}
    said: dict[str, list[str]] = {}
    scored: dict[str, ScoredAnswers] = {}
    for name, items in (("forget", sets.forget), ("retain", sets.retain)):
        said[name] = []
        if items[0].answer:
            scored[name] = score_answers(
                subject, tokenizer, items, include_eos=include_eos, batch_size=batch_size
            )
            found = dict(scored[name].knowledge)
            if generate:
                room = max_new_tokens or answer_room(tokenizer, [item.pair[1] for item in items])
                questions = [item.question for item in items]
                said[name] = greedy_answers(
                    subject, tokenizer, questions, max_new_tokens=room, batch_size=batch_size
                )
                found["rouge_l_recall"] = recall_of(said[name], items)
            found |= scored[name].memorization()
        else:
            found = assess(subject, tokenizer, items, batch_size=batch_size)
        if "rank" in found:
            found["accuracy"] = Metric("accuracy", (found["rank"].values == 1).astype(np.float64))
        if choices and all(len(set(item.perturbed_answer)) >= N_OPTIONS - 1 for item in items):
            asked = choice_questions(items, n_options=N_OPTIONS)
            answered = score_choices(subject, tokenizer, asked, batch_size=batch_size)
            found["choice_accuracy"] = Metric("choice_accuracy", answered.accuracy.values)
        metrics[name] = found
    if n_samples:
        scores = sampled_leakage(subject, tokenizer, sets.forget, n_samples, batch_size=batch_size)
        name = f"leak_at_{n_samples}"
        metrics["forget"][name] = Metric(name, leak_at_k(scores, n_samples))
    figures: dict[str, dict[str, float]] = {}
    if sets.neutral:
        figures["neutral"] = assess_text(subject, tokenizer, sets.neutral, reference=reference)
    if sets.holdout:
        holdout = membership_scores(
            subject,
            tokenizer,
            [item.pair for item in sets.holdout],
            include_eos=include_eos,
            batch_size=batch_size,
        )
        figures["membership"] = {
            f"auc_{name}": membership_inference(values, holdout[name]).auc
            for name, values in scored["forget"].membership().items()
        }
    return Profile(metrics, figures, said)
