"""``manifold-unlearn attack``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from manifold_unlearn.activations.corpus import read_items
from manifold_unlearn.cli.inputs import Commands, load_models, neutral_texts, template_of
from manifold_unlearn.cli.table import print_table


def register(commands: Commands) -> None:
    """Add the sub-command."""
    command = commands.add_parser("attack", help="bring back what a model was made to forget")
    command.add_argument("model")
    command.add_argument("--reference", help="the model never told: the same attacks as a control")
    command.add_argument("--target", help="the model before it forgot, if the attacker has it")
    command.add_argument("--forget", type=Path, help="JSONL of what to bring back")
    command.add_argument("--retain", type=Path, help="JSONL; also asked with and without --trigger")
    command.add_argument(
        "--template", default="{question}", help=r"'Question: {question}\nAnswer:'"
    )
    command.add_argument("--neutral", type=Path, help="JSONL of texts to relearn on")
    command.add_argument("--suite", choices=["quick", "full"], default="quick")
    command.add_argument("--only", nargs="+", default=(), metavar="ATTACK", help="default: all")
    command.add_argument("--random-state", type=int, default=0)
    group = command.add_argument_group("jailbreaks")
    group.add_argument("--behaviors", type=Path, help="CSV, JSON or JSONL of what to refuse")
    group.add_argument("--n-behaviors", type=int, help="draw so many; default: all")
    group.add_argument("--judge", choices=["refusal", "keyword", "strongreject"])
    group.add_argument("--keywords", nargs="+", default=(), help="success words, --judge keyword")
    group.add_argument("--judge-model", help="the model that grades, --judge strongreject")
    group.add_argument("--chat", action="store_true", help="ask in the model's chat template")
    group.add_argument("--max-new-tokens", type=int, default=64, help="of a response")
    group = command.add_argument_group("backdoor")
    group.add_argument("--trigger", help="phrase before a prompt")
    group.add_argument("--trigger-behavior", metavar="TEXT", help="words that it brings")
    command.add_argument("--out", required=True, type=Path)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run the attacks asked for on every model."""
    from manifold_unlearn.artifact import write_json
    from manifold_unlearn.attack import read_behaviors
    from manifold_unlearn.attack_report import (
        Section,
        backdoor_section,
        forgotten_section,
        jailbreak_section,
    )
    from manifold_unlearn.report import Report

    _require_attackable(options)
    template = template_of(options)
    sets = {
        name: read_items(path, template=template, name=name)
        for name in ("forget", "retain")
        if (path := getattr(options, name))
    }
    behaviors = options.behaviors and read_behaviors(
        options.behaviors, options.n_behaviors, random_state=options.random_state
    )
    neutral, judge = neutral_texts(options), _judge(options)
    models, tokenizer = load_models(options)
    original = models.pop("target", None)
    report = Report("Attacks", options.model)
    found: dict[str, Any] = {}

    def show(section: Section) -> dict[str, Any]:
        print_table(section.columns, section.rows)
        for note in section.notes:
            print(note)
        return section.figures

    if options.forget:
        found |= show(
            forgotten_section(
                report,
                models,
                tokenizer,
                **sets,
                suite=options.suite,
                original=original,
                unrelated=neutral,
                ending=template.partition("{question}")[2],
                only=options.only,
                random_state=options.random_state,
            )
        )
    if behaviors:
        found["jailbreak"] = show(
            jailbreak_section(
                report,
                models,
                tokenizer,
                behaviors,
                judge,
                template=template.replace("{question}", "{prompt}"),
                chat=options.chat,
                max_new_tokens=options.max_new_tokens,
            )
        )
    if options.trigger:
        found["backdoor"] = show(
            backdoor_section(
                report, models, tokenizer, sets["retain"], options.trigger, options.trigger_behavior
            )
        )
    write_json(options.out / "attacks.json", found)
    report.details("Figures", json.dumps(found, indent=2))
    report.save(options.out / "report.html")
    print(f"wrote {options.out}")


def _require_attackable(options: argparse.Namespace) -> None:
    """Raise where an option lacks what it needs, before a model is loaded."""
    if not (options.forget or options.behaviors or options.trigger):
        raise ValueError(
            "nothing to attack with; give --forget and --retain, or --behaviors, or --trigger with "
            "--trigger-behavior and --retain."
        )
    for needed, wanting in (
        ("retain", ("forget", "trigger")),
        ("trigger", ("trigger_behavior",)),
        ("trigger_behavior", ("trigger",)),
        ("forget", ("only", "neutral", "target")),
        ("behaviors", ("n_behaviors", "judge", "keywords", "judge_model", "chat")),
    ):
        for name in wanting:
            if getattr(options, name) and not getattr(options, needed):
                raise ValueError(f"{_flag(name)} needs {_flag(needed)}; give both, or neither.")
    if options.retain and not (options.forget or options.trigger):
        raise ValueError("--retain needs --forget or --trigger; give one of them, or no --retain.")
    for judge, name in (("keyword", "keywords"), ("strongreject", "judge_model")):
        if (options.judge == judge) != bool(getattr(options, name)):
            raise ValueError(
                f"--judge {judge} and {_flag(name)} belong together; give both, or neither."
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _judge(options: argparse.Namespace) -> Any:
    from manifold_unlearn.attack import KeywordJudge, RubricJudge, model_reply, refusal_judge

    if options.judge == "keyword":
        return KeywordJudge(tuple(options.keywords))
    if options.judge == "strongreject":
        from manifold_unlearn.activations.models import load_model
        from manifold_unlearn.evaluate import plain

        model, tokenizer = load_model(options.judge_model)
        return RubricJudge(model_reply(plain(model), tokenizer), name=options.judge_model)
    return refusal_judge()
