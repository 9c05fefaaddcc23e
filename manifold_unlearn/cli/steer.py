"""``manifold-unlearn steer``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

from manifold_unlearn.activations.corpus import Item, read_items
from manifold_unlearn.cli.inputs import Commands, template_of
from manifold_unlearn.cli.table import print_table
from manifold_unlearn.steer.between import PathKind, path_between
from manifold_unlearn.steer.paths import How
from manifold_unlearn.steer.vectors import Method

SHOWN = 6
"""Waypoints whose texts the terminal shows."""


def register(commands: Commands) -> None:
    """Add the sub-command."""
    command = commands.add_parser(
        "steer", help="push a model along a vector, or lead it along a path, and read what it says"
    )
    command.add_argument("model")
    command.add_argument("--prompts", required=True, type=Path, help="JSONL of what to go on from")
    command.add_argument("--template", default="{question}", help="of the prompts")
    command.add_argument("--sites", required=True, nargs="+", metavar="SITE")
    command.add_argument(
        "--tokens", choices=["all", "last"], help="moved; default: all, along a path the last"
    )
    command.add_argument("--max-new-tokens", type=int, default=16)
    group = command.add_argument_group("a vector")
    group.add_argument("--positive", type=Path, help="JSONL of texts with the concept")
    group.add_argument("--negative", type=Path, help="JSONL of as many without it")
    group.add_argument("--method", choices=get_args(Method), default="mean_difference")
    group.add_argument("--control-vector", type=Path, help="GGUF, instead of fitting one")
    group.add_argument("--strengths", nargs="+", type=float, default=[0.0, 0.5, 1.0, 2.0])
    group.add_argument("--concept", nargs="+", default=(), help="words that express the concept")
    group.add_argument("--others", nargs="+", default=(), help="words that could stand instead")
    group.add_argument("--neutral", type=Path, help="JSONL of questions that must stay answered")
    group = command.add_argument_group("a path, at one site")
    group.add_argument("--examples", type=Path, help="JSONL of texts, each with its topic")
    group.add_argument("--start", help="topic at which the path begins")
    group.add_argument("--end", help="topic at which it ends")
    group.add_argument("--path", choices=get_args(PathKind), default="spline")
    group.add_argument("--periodic", action="store_true", help="the topics close a circle")
    group.add_argument("--order", nargs="+", help="all topics in order; default: as first seen")
    group.add_argument("--waypoints", type=int, default=20)
    group.add_argument("--how", choices=get_args(How), default="coordinates")
    group.add_argument("--answers", nargs="+", default=(), help="what may be said, with its space")
    command.add_argument("--out", required=True, type=Path)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Steer by a vector or along a path."""
    _require_one_form(options)
    prompts = [item.question for item in read_items(options.prompts, template=template_of(options))]
    along = _traverse if options.examples else _sweep
    along(options, prompts)
    print(f"wrote {options.out}")


def _require_one_form(options: argparse.Namespace) -> None:
    """Raise where the options do not say one thing, before a model is loaded."""
    pairs, path = ("positive", "negative"), ("examples", "start", "end")
    for together in (pairs, path, ("concept", "others")):
        given = [name for name in together if getattr(options, name)]
        if given and len(given) < len(together):
            needed = " ".join("--" + name for name in together)
            raise ValueError(f"--{given[0]} needs the others of {needed}; give all, or none.")
    forms = [bool(options.positive), bool(options.control_vector), bool(options.examples)]
    if sum(forms) != 1:
        raise ValueError(
            "give one of: --positive and --negative; --control-vector; --examples with --start "
            "and --end."
        )
    if options.examples and len(options.sites) > 1:
        raise ValueError(f"a path is followed at one site; --sites names {len(options.sites)}.")
    if not options.examples and not options.concept:
        raise ValueError(
            "a vector is judged by words that it should bring; give --concept and --others."
        )


def _sweep(options: argparse.Namespace, prompts: list[str]) -> None:
    from manifold_unlearn.activations.models import load_model
    from manifold_unlearn.artifact import write_json
    from manifold_unlearn.evaluate import plain
    from manifold_unlearn.evaluate.steering import SteeringProbe, steered_at, steering_sweep
    from manifold_unlearn.report import Report

    neutral = tuple(read_items(options.neutral)) if options.neutral else ()
    probe = SteeringProbe(
        tuple(prompts), tuple(options.concept), tuple(options.others), neutral=neutral
    )
    sides = [
        [item.captured for item in read_items(getattr(options, side), name=side)]
        for side in ("positive", "negative")
        if getattr(options, side)
    ]
    model, tokenizer = load_model(options.model)
    edit = _vectors(options, model, tokenizer, sides)
    curve = steering_sweep(
        steered_at(model, edit, tokens=options.tokens or "all"),
        plain(model),
        tokenizer,
        probe,
        options.strengths,
        name=str(options.control_vector or options.method),
        max_new_tokens=options.max_new_tokens,
    )
    found = curve.to_json()
    edit.save(options.out / "edit")
    write_json(options.out / "steering.json", found)
    columns = ["strength", "log odds", "share of words", "perplexity", "repeated", "neutral"]
    rows = [
        [f"{p.strength:g}", p.log_odds.mean, p.concept_share.mean, p.perplexity, p.repetition.mean,
         None if p.neutral is None else p.neutral.mean]
        for p in curve.points
    ]  # fmt: skip
    print_table(columns, rows)
    for point in curve.points:
        print(f"{point.strength:g}: {' '.join(point.said[0].split())}")
    report = Report("Steering", f"{options.model}, {curve.name} at {', '.join(edit)}")
    report.table(columns, rows, caption="Concept and cost by strength, means over the prompts")
    report.table(
        ["prompt", *(f"{point.strength:g}" for point in curve.points)],
        [[prompt, *(point.said[i] for point in curve.points)] for i, prompt in enumerate(prompts)],
        caption="What is said at each strength",
    )
    report.details("Figures", json.dumps(found, indent=2))
    report.save(options.out / "report.html")


def _vectors(options: argparse.Namespace, model: Any, tokenizer: Any, sides: list[Any]) -> Any:
    """Return the edit: fitted, or that of a file at the sites named."""
    from manifold_unlearn.intervene.edit import Edit
    from manifold_unlearn.steer.contrast import fit_vectors
    from manifold_unlearn.steer.formats import read_control_vector

    if sides:
        positive, negative = sides
        return fit_vectors(
            model, tokenizer, positive, negative, options.sites, method=options.method
        )
    stored = read_control_vector(options.control_vector).edit
    if missing := [site for site in options.sites if site not in stored]:
        raise ValueError(f"{options.control_vector} has no {missing}; it has {list(stored)}.")
    return Edit({site: stored[site] for site in options.sites})


def _traverse(options: argparse.Namespace, prompts: list[str]) -> None:
    from manifold_unlearn.activations.capture import capture
    from manifold_unlearn.activations.models import load_model
    from manifold_unlearn.artifact import write_json
    from manifold_unlearn.intervene.edit import Edit
    from manifold_unlearn.report import Report, probability_ribbons
    from manifold_unlearn.steer.along import PathSteering
    from manifold_unlearn.steer.traverse import traverse

    examples = read_items(options.examples, name="examples")
    topics = _topics(examples)
    (site,) = options.sites
    model, tokenizer = load_model(options.model)
    texts = [item.captured for item in examples]
    states = capture(model, tokenizer, texts, site, tokens="last")[site]
    path = path_between(
        states,
        topics,
        options.start,
        options.end,
        options.waypoints,
        kind=options.path,
        periodic=options.periodic,
        order=options.order,
    )
    walk = traverse(
        model,
        tokenizer,
        prompts,
        path,
        site,
        how=options.how,
        tokens=options.tokens or "last",
        answers=tuple(options.answers),
        max_new_tokens=options.max_new_tokens,
        while_generating=options.tokens == "all",
    )
    Edit({site: PathSteering(path, how=options.how)}).save(options.out / "edit")
    found = walk.to_json()
    write_json(options.out / "steering.json", found)
    answers = [answer.strip() for answer in walk.answers]
    columns = ["time", *answers, "likeliest token", "text"]
    rows = [
        [f"{time:.2f}", *walk.mean_distributions[i, : len(answers)].tolist(),
         walk.top_strings(i)[0][0].strip(), " ".join(walk.texts[i][0].split())]
        for i, time in enumerate(walk.times.tolist())
    ]  # fmt: skip
    few = sorted({round(i * (len(rows) - 1) / (SHOWN - 1)) for i in range(SHOWN)})
    print_table(columns, [rows[i] for i in few])
    way = f"from {options.start} to {options.end}"
    report = Report("Traversal", f"{options.model} at {site}, {options.path} {way}")
    if answers:
        report.figure(
            probability_ribbons(
                walk.times,
                {options.path: walk.mean_distributions[:, :-1]},
                answers,
                cyclic=options.periodic,
            ),
            f"Probabilities of the answers {way}, means over the prompts.",
            alt="Areas of the answers' probabilities along the path.",
        )
    report.table(columns, rows, caption=f"What is said {way}; token and text of the first prompt")
    report.details("Figures", json.dumps(found, indent=2))
    report.save(options.out / "report.html")


def _topics(examples: list[Item]) -> list[str]:
    """Return the topic of each example; raise where one has none."""
    for number, item in enumerate(examples):
        if not item.topic:
            raise ValueError(f"example {number} ({item.question!r}) has no topic; give each one.")
    return [item.topic for item in examples]
