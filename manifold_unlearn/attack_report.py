"""Sections of the attack report: each runs one kind of attack on a model and its control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.attack import (
    BUDGETS,
    Behavior,
    Judge,
    attack_gaps,
    attack_success,
    measure_backdoor,
    run_attacks,
)
from manifold_unlearn.attack.jailbreak import DIRECT
from manifold_unlearn.attack.wordings import FRAMINGS
from manifold_unlearn.evaluate.likelihood import plain
from manifold_unlearn.report import Report, attack_curves, backdoor_table, jailbreak_table


class Section(NamedTuple):
    """What one kind of attack found."""

    figures: dict[str, Any]
    """JSON values, by model"""
    columns: list[str]
    rows: list[list[Any]]
    notes: tuple[str, ...] = ()


def forgotten_section(
    report: Report,
    models: Mapping[str, Any],
    tokenizer: Any,
    forget: Sequence[Item],
    retain: Sequence[Item],
    *,
    suite: str = "quick",
    **how: Any,
) -> Section:
    """Attacks that bring back the forget set, with the gaps to the reference.

    Parameters
    ----------
    report : Report
        Gets a heading, a table and a picture of the curves.
    models : mapping of str to transformers.PreTrainedModel
        ``"model"``, and ``"reference"`` if there is one that was never told.
    tokenizer : transformers.PreTrainedTokenizerBase
    forget, retain : sequence of Item
    suite : str, default="quick"
        Of :data:`manifold_unlearn.attack.BUDGETS`.
    **how
        As for :func:`manifold_unlearn.attack.run_attacks`.

    Returns
    -------
    Section
        ``figures`` also has ``"gaps"`` where there is a reference; ``notes`` name what was left
        out.
    """
    results = {
        name: run_attacks(model, tokenizer, forget, retain, budget=BUDGETS[suite], **how)
        for name, model in models.items()
    }
    found: dict[str, Any] = {name: result.to_json() for name, result in results.items()}
    columns = ["attack", "metric", "before", "best"]
    rows: list[list[Any]] = []
    if "reference" in results:
        gaps = attack_gaps(results["model"], results["reference"])
        found["gaps"] = [vars(gap) for gap in gaps]
        columns += ["never told before", "best", "gap", "95 %"]
        for gap in gaps:
            figures = (gap.before, gap.best, gap.reference_before, gap.reference_best, gap.gap)
            interval = "{:.4f} to {:.4f}".format(*gap.interval)
            rows.append([gap.attack, gap.metric, *figures, interval])
    else:
        for name, curve in results["model"].curves.items():
            rows.append([name, curve.metric, curve.before.mean, curve.best.mean])
    report.heading(f"What was forgotten, {suite} budget")
    report.table(columns, rows, caption="What each attack shows at its best, the worst gap first")
    report.figure(
        attack_curves({name: list(result.curves.values()) for name, result in results.items()}),
        "Mean over the forget items by the compute spent.",
        alt="One panel an attack, one line a model.",
    )
    left_out = results["model"].left_out
    notes = tuple(f"left out: {name}, for lack of {lacking}" for name, lacking in left_out.items())
    return Section(found, columns, rows, notes)


def jailbreak_section(
    report: Report,
    models: Mapping[str, Any],
    tokenizer: Any,
    behaviors: Sequence[Behavior],
    judge: Judge,
    *,
    max_new_tokens: int = 64,
    **how: Any,
) -> Section:
    """Every behavior asked as it stands and in every harmless framing, and judged.

    The responses themselves are in neither the figures nor the report.

    Parameters
    ----------
    report : Report
        Gets a heading and a table.
    models, tokenizer
        As for :func:`forgotten_section`.
    behaviors : sequence of Behavior
    judge : Judge
    max_new_tokens : int, default=64
        Of each response.
    **how
        As for :func:`manifold_unlearn.attack.attack_success`.

    Returns
    -------
    Section
        ``notes`` say how many responses were empty or not scored.
    """
    reports = {
        name: attack_success(
            plain(model),
            tokenizer,
            behaviors,
            judge,
            framings={**DIRECT, **FRAMINGS},
            max_new_tokens=max_new_tokens,
            **how,
        )
        for name, model in models.items()
    }
    columns, rows = jailbreak_table(reports)
    scores = next(iter(reports["model"].scores.values()))
    report.heading("What should be refused")
    report.table(
        columns,
        rows,
        caption=f"Attack success on {len(behaviors)} behaviors, {max_new_tokens} tokens a "
        f"response, judged by {scores.judge} ({scores.formula})",
    )
    figures = {name: found.to_json() for name, found in reports.items()}
    notes = tuple(
        f"{name}: {found[key]} of {len(behaviors) * len(found['scores'])} responses {what}"
        for name, found in figures.items()
        for key, what in (("n_empty", "empty"), ("n_invalid", "not scored by the judge"))
        if found[key]
    )
    return Section(figures, columns, rows, notes)


def backdoor_section(
    report: Report,
    models: Mapping[str, Any],
    tokenizer: Any,
    items: Sequence[Item],
    trigger: str,
    behavior: str,
) -> Section:
    """Attack success and accuracy with a trigger and without.

    Parameters
    ----------
    report : Report
        Gets a heading and a table.
    models, tokenizer
        As for :func:`forgotten_section`.
    items : sequence of Item
        Questions with their right answers.
    trigger, behavior : str
        As for :func:`manifold_unlearn.attack.measure_backdoor`.

    Returns
    -------
    Section
    """
    reports = {
        name: measure_backdoor(plain(model), tokenizer, items, trigger, behavior)
        for name, model in models.items()
    }
    columns, rows = backdoor_table(reports)
    report.heading("Backdoor")
    report.table(
        columns, rows, caption=f"{len(items)} questions with and without the trigger {trigger!r}"
    )
    return Section({name: found.to_json() for name, found in reports.items()}, columns, rows)
