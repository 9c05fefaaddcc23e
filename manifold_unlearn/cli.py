"""The command line: one sub-command a public verb."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from manifold_unlearn import __version__
from manifold_unlearn.activations.corpus import Item, read_items
from manifold_unlearn.pipeline import METHODS
from manifold_unlearn.recipe.manifold import ManifoldRecipe
from manifold_unlearn.recipe.subspace import SubspaceRecipe

Recipe = TypeVar("Recipe", SubspaceRecipe, ManifoldRecipe)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; answers the exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        Default: those of the process.

    Returns
    -------
    int
        0; 2 after an error that the user can mend, which is printed in one line; 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(
            f"manifold-unlearn {options.command}: {' '.join(str(error).split())}", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print(f"manifold-unlearn {options.command}: stopped", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="manifold-unlearn", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="forget one topic of plain facts and report it")
    demo.add_argument("--topic", default="book-authors", help="see --list-topics")
    demo.add_argument("--list-topics", action="store_true", help="list the topics and stop")
    demo.add_argument("--model", default="smollm2-135m", help="id, directory, .gguf or short name")
    demo.add_argument("--bake", action="store_true", help="edit and save the weights")
    demo.add_argument("--sweep", action="store_true", help="choose the recipe anew on validation")
    _add_recipe(demo, SubspaceRecipe, "recipe (default: the outcome of the sweep)")
    demo.add_argument("--out", type=Path, default=Path("demo-out"))
    demo.set_defaults(run=_demo)

    capture = commands.add_parser("capture", help="write activations of texts at named sites")
    capture.add_argument("model")
    capture.add_argument(
        "--texts", required=True, type=Path, help="JSONL: text, or question+answer"
    )
    capture.add_argument("--sites", required=True, nargs="+", metavar="SITE")
    capture.add_argument("--tokens", default="all", choices=["all", "last", "answer"])
    capture.add_argument("--template", default="{question}")
    capture.add_argument("--out", required=True, type=Path)
    capture.set_defaults(run=_capture)

    unlearn = commands.add_parser("unlearn", help="make a model forget a set and keep another")
    unlearn.add_argument("model")
    _add_sets(unlearn)
    unlearn.add_argument("--method", default="subspace", choices=METHODS)
    unlearn.add_argument("--bake", action="store_true", help="edit and save the weights")
    _add_recipe(unlearn, SubspaceRecipe, "--method subspace (default: the outcome of the sweep)")
    _add_recipe(unlearn, ManifoldRecipe, "--method manifold, hybrid")
    group = unlearn.add_argument_group("training of a gradient method, or of the hybrid")
    group.add_argument("--lr", type=float, help="default 1e-5, of the hybrid 2e-3")
    group.add_argument(
        "--steps", type=int, help="default: 10 epochs over the forget set; hybrid 60"
    )
    group.add_argument("--batch-size", type=int, help="default 16, of the hybrid 32")
    group.add_argument("--random-state", type=int)
    unlearn.add_argument("--neutral", type=Path, help="JSONL of texts for perplexity")
    unlearn.set_defaults(run=_unlearn)

    evaluate = commands.add_parser("evaluate", help="measure a model, beside one never told")
    evaluate.add_argument("model")
    evaluate.add_argument("--reference", help="the model that was never told the forget set")
    evaluate.add_argument("--target", help="the model before it was made to forget")
    _add_sets(evaluate)
    evaluate.add_argument("--holdout", type=Path, help="JSONL that no model was told: membership")
    evaluate.add_argument("--neutral", type=Path, help="JSONL of texts for perplexity and KL")
    evaluate.add_argument("--samples", type=int, default=0, help="sampled answers, for leak@k")
    evaluate.set_defaults(run=_evaluate)

    attack = commands.add_parser("attack", help="bring back what a model was made to forget")
    attack.add_argument("model")
    attack.add_argument("--reference", help="the model never told: the same attacks as a control")
    attack.add_argument("--target", help="the model before it forgot, if the attacker has it")
    attack.add_argument("--forget", type=Path, help="JSONL of what to bring back")
    attack.add_argument("--retain", type=Path, help="JSONL; also asked with and without --trigger")
    attack.add_argument("--template", default="{question}", help=r"'Question: {question}\nAnswer:'")
    attack.add_argument("--neutral", type=Path, help="JSONL of texts to relearn on")
    attack.add_argument("--suite", choices=["quick", "full"], default="quick")
    attack.add_argument("--only", nargs="+", default=(), metavar="ATTACK", help="default: all")
    attack.add_argument("--random-state", type=int, default=0)
    group = attack.add_argument_group("jailbreaks")
    group.add_argument("--behaviors", type=Path, help="CSV, JSON or JSONL of what to refuse")
    group.add_argument("--n-behaviors", type=int, help="draw so many; default: all")
    group.add_argument("--judge", choices=["refusal", "keyword", "strongreject"])
    group.add_argument("--keywords", nargs="+", default=(), help="success words, --judge keyword")
    group.add_argument("--judge-model", help="the model that grades, --judge strongreject")
    group.add_argument("--chat", action="store_true", help="ask in the model's chat template")
    group.add_argument("--max-new-tokens", type=int, default=64, help="of a response")
    group = attack.add_argument_group("backdoor")
    group.add_argument("--trigger", help="phrase before a prompt")
    group.add_argument("--trigger-behavior", metavar="TEXT", help="words that it brings")
    attack.add_argument("--out", required=True, type=Path)
    attack.set_defaults(run=_attack)
    return parser


def _add_sets(command: argparse.ArgumentParser) -> None:
    command.add_argument("--forget", required=True, type=Path, help="JSONL")
    command.add_argument("--retain", required=True, type=Path, help="JSONL")
    command.add_argument(
        "--template", default="{question}", help=r"'Question: {question}\nAnswer:'"
    )
    command.add_argument(
        "--eos",
        action=argparse.BooleanOptionalAction,
        help="score answers with their end token; default: with a template, not without",
    )
    command.add_argument("--no-generate", action="store_true", help="skip greedy answers (ROUGE-L)")
    command.add_argument("--max-new-tokens", type=int, help="of greedy answers")
    command.add_argument("--out", required=True, type=Path)


def _add_recipe(
    command: argparse.ArgumentParser,
    kind: type[SubspaceRecipe] | type[ManifoldRecipe],
    title: str,
) -> None:
    group = command.add_argument_group(title)
    default = kind()
    for field in fields(kind):
        value = getattr(default, field.name)
        flag = "--" + {"method": "eraser"}.get(field.name, field.name).replace("_", "-")
        where = f"{kind.__name__}.{field.name}"
        if field.name == "random_state":
            continue  # that of the training
        if isinstance(value, bool):
            group.add_argument(flag, dest=where, action=argparse.BooleanOptionalAction)
        elif isinstance(value, tuple):
            group.add_argument(flag, dest=where, nargs="+", type=type(value[0]))
        else:
            group.add_argument(flag, dest=where, type=type(value))


def _recipe(options: argparse.Namespace, kind: type[Recipe]) -> Recipe:
    given: dict[str, Any] = {}
    for field in fields(kind):
        value = getattr(options, f"{kind.__name__}.{field.name}", None)
        if value is not None:
            given[field.name] = tuple(value) if isinstance(value, list) else value
    if kind is ManifoldRecipe and options.random_state is not None:
        given["random_state"] = options.random_state
    return kind(**given)


def _recipe_of_method(options: argparse.Namespace) -> SubspaceRecipe | ManifoldRecipe | None:
    """Return the recipe of the method chosen; None of a baseline."""
    if options.method == "subspace":
        return _recipe(options, SubspaceRecipe)
    return _recipe(options, ManifoldRecipe) if options.method in ("manifold", "hybrid") else None


def _training(options: argparse.Namespace) -> Any:
    """Return the training asked for; None where nothing is said of it."""
    from manifold_unlearn.finetune.train import TrainConfig
    from manifold_unlearn.recipe.manifold import HYBRID_TRAINING

    names = ("lr", "steps", "batch_size", "random_state")
    given = {name: v for name in names if (v := getattr(options, name)) is not None}
    usual = HYBRID_TRAINING if options.method == "hybrid" else TrainConfig()
    return replace(usual, **given) if given else None


def _template(options: argparse.Namespace) -> str:
    r"""Template with ``\n`` written out in the shell made a line break."""
    return options.template.replace("\\n", "\n")


def _sets(options: argparse.Namespace) -> dict[str, list[Item]]:
    """Both sets with the template applied."""
    return {
        name: read_items(getattr(options, name), template=_template(options), name=name)
        for name in ("forget", "retain")
    }


def _include_eos(options: argparse.Namespace) -> bool:
    return options.template != "{question}" if options.eos is None else options.eos


def _demo(options: argparse.Namespace) -> None:
    from manifold_unlearn.demo import DemoConfig, run_demo, summary_table
    from manifold_unlearn.testbed.facts import topics

    if options.list_topics:
        print("\n".join(topics()))
        return
    recipe = _recipe(options, SubspaceRecipe)
    if options.sweep:
        from manifold_unlearn.sweep import choose_recipe

        recipe = choose_recipe(options.model, options.topic, say=print)
    config = DemoConfig(options.topic, options.model, options.bake, recipe)
    result, metrics = run_demo(config, options.out, say=print)
    _print_table(*summary_table(result.changes, metrics))
    for row in metrics["verdict"]:
        sign = "<=" if row["claim"].startswith(("forget", "neutral")) else ">="
        word = "holds" if row["holds"] else "MISSED"
        print(f"{row['claim']}: {row['value']:.3f} (target {sign} {row['target']}) {word}")
    print(
        f"{metrics['seconds_in_all']:.0f} s, {metrics['peak_memory_gib']:.1f} GiB; "
        f"open {options.out / 'report.html'}"
    )


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    cells = [[_cell(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        line = [row[0].ljust(widths[0])]
        line += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(line))


def _capture(options: argparse.Namespace) -> None:
    from manifold_unlearn.activations.capture import capture
    from manifold_unlearn.activations.models import load_model

    items = read_items(options.texts, template=_template(options))
    model, tokenizer = load_model(options.model)
    texts = [item.captured for item in items]
    acts = capture(model, tokenizer, texts, options.sites, tokens=options.tokens)
    acts.save(options.out)
    print(f"{len(acts.tokens)} rows at {len(acts)} sites in {options.out}")


def _unlearn(options: argparse.Namespace) -> None:
    from manifold_unlearn.activations.models import load_model
    from manifold_unlearn.pipeline import unlearn
    from manifold_unlearn.report import Report, before_after_bars

    sets = _sets(options)
    model, tokenizer = load_model(options.model)
    result = unlearn(
        model,
        tokenizer,
        sets["forget"],
        sets["retain"],
        method=options.method,
        recipe=_recipe_of_method(options),
        training=_training(options),
        bake=options.bake,
        include_eos=_include_eos(options),
        neutral=_neutral(options),
        generate=not options.no_generate,
        max_new_tokens=options.max_new_tokens,
    )
    result.save(options.out)
    columns = ["set", "metric", "items", "before", "after", "kept"]
    rows = [
        [name, metric, len(c.before.values), f"{c.before.mean:.4f}", f"{c.after.mean:.4f}",
         f"{c.kept:.1%}"]
        for name, change in result.changes.items()
        for metric, c in change.items()
    ]  # fmt: skip
    _print_table(columns, rows)
    report = Report("Forgetting", f"{options.model}, {options.method}")
    report.table(columns, rows, caption="Before and after")
    report.figure(
        before_after_bars({name: change["probability"] for name, change in result.changes.items()}),
        "Mean answer probability before and after, with 95 % bootstrap intervals.",
        alt="Bars of answer probability before and after.",
    )
    report.details("Configuration and figures", json.dumps(result.metrics, indent=2))
    report.save(options.out / "report.html")
    print(f"wrote {options.out}")


def _evaluate(options: argparse.Namespace) -> None:
    from manifold_unlearn.artifact import write_json
    from manifold_unlearn.evaluate import EvaluationSets, evaluate_forgetting, plain

    sets = _sets(options)
    template = _template(options)
    holdout = options.holdout and read_items(options.holdout, template=template, name="holdout")
    models, tokenizer = _models(options)
    subjects = {name: plain(model) for name, model in models.items()}
    report = evaluate_forgetting(
        subjects["model"],
        tokenizer,
        EvaluationSets(**sets, holdout=holdout or (), neutral=_neutral(options)),
        reference=subjects.get("reference"),
        target=subjects.get("target"),
        include_eos=_include_eos(options),
        generate=not options.no_generate,
        max_new_tokens=options.max_new_tokens,
        n_samples=options.samples,
    )
    found = report.models()
    write_json(options.out / "metrics.json", found)
    if report.standings:
        write_json(options.out / "standings.json", report.comparison())
        rows = [
            [s.part, s.metric, *map(_figure, (s.model, s.reference, s.target, s.distance, s.left))]
            for s in report.standings
        ]
        columns = ["set", "metric", "model", "never told", "before", "distance", "left"]
        _print_table(columns, rows)
    else:
        entry = found["model"]
        rows = [[w, n, _figure(v)] for w in ("forget", "retain") for n, v in entry[w].items()]
        _print_table(["set", "metric", "mean"], rows)
    for name in models:
        print(f"{name}: utility {found[name]['model_utility']:.4f}, forget quality "
              f"{json.dumps(found[name]['forget_quality'])}")  # fmt: skip
    if report.judgement is not None:
        nearness = _figure(report.judgement.aggregates.overall)
        print(f"verdict: {report.judgement.verdict}, {nearness} of 1 as the model never told")
    if report.not_judged:
        print(f"no verdict: {report.not_judged}")
    if report.not_controlled:
        print(f"depth without a control: {report.not_controlled}")
    print(f"wrote {options.out / 'metrics.json'}")


def _attack(options: argparse.Namespace) -> None:
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
    template = _template(options)
    sets = {
        name: read_items(path, template=template, name=name)
        for name in ("forget", "retain")
        if (path := getattr(options, name))
    }
    behaviors = options.behaviors and read_behaviors(
        options.behaviors, options.n_behaviors, random_state=options.random_state
    )
    neutral, judge = _neutral(options), _judge(options)
    models, tokenizer = _models(options)
    original = models.pop("target", None)
    report = Report("Attacks", options.model)
    found: dict[str, Any] = {}

    def show(section: Section) -> dict[str, Any]:
        _print_table(section.columns, section.rows)
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


def _models(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """Return the models named, ``"model"`` first, and the tokenizer they share."""
    from manifold_unlearn.activations.models import load_model
    from manifold_unlearn.evaluate import require_same_tokenizer

    model, tokenizer = load_model(options.model)
    models = {"model": model}
    for part in ("reference", "target"):
        if (name := getattr(options, part)) is not None:
            models[part], other = load_model(name)
            require_same_tokenizer(tokenizer, other, part)
    return models, tokenizer


def _neutral(options: argparse.Namespace) -> list[str]:
    return [item.question for item in read_items(options.neutral)] if options.neutral else []


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _cell(value: Any) -> str:
    return _figure(value) if value is None or isinstance(value, float) else str(value)
