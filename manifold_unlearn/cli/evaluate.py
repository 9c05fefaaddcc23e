"""``manifold-unlearn evaluate``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from manifold_unlearn.activations.corpus import read_items
from manifold_unlearn.cli.inputs import (
    Commands,
    add_sets,
    include_eos,
    load_models,
    neutral_texts,
    read_sets,
    template_of,
)
from manifold_unlearn.cli.table import figure, print_table


def register(commands: Commands) -> None:
    """Add the sub-command."""
    command = commands.add_parser("evaluate", help="measure a model, beside one never told")
    command.add_argument("model")
    command.add_argument("--reference", help="the model that was never told the forget set")
    command.add_argument("--target", help="the model before it was made to forget")
    add_sets(command)
    command.add_argument("--holdout", type=Path, help="JSONL that no model was told: membership")
    command.add_argument("--neutral", type=Path, help="JSONL of texts for perplexity and KL")
    command.add_argument("--samples", type=int, default=0, help="sampled answers, for leak@k")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure the models and judge."""
    from manifold_unlearn.artifact import write_json
    from manifold_unlearn.evaluate import EvaluationSets, evaluate_forgetting, plain

    sets = read_sets(options)
    template = template_of(options)
    holdout = options.holdout and read_items(options.holdout, template=template, name="holdout")
    models, tokenizer = load_models(options)
    subjects = {name: plain(model) for name, model in models.items()}
    report = evaluate_forgetting(
        subjects["model"],
        tokenizer,
        EvaluationSets(**sets, holdout=holdout or (), neutral=neutral_texts(options)),
        reference=subjects.get("reference"),
        target=subjects.get("target"),
        include_eos=include_eos(options),
        generate=not options.no_generate,
        max_new_tokens=options.max_new_tokens,
        n_samples=options.samples,
    )
    found = report.models()
    write_json(options.out / "metrics.json", found)
    if report.standings:
        write_json(options.out / "standings.json", report.comparison())
        rows = [
            [s.part, s.metric, *map(figure, (s.model, s.reference, s.target, s.distance, s.left))]
            for s in report.standings
        ]
        columns = ["set", "metric", "model", "never told", "before", "distance", "left"]
        print_table(columns, rows)
    else:
        entry = found["model"]
        rows = [[w, n, figure(v)] for w in ("forget", "retain") for n, v in entry[w].items()]
        print_table(["set", "metric", "mean"], rows)
    for name in models:
        print(f"{name}: utility {found[name]['model_utility']:.4f}, forget quality "
              f"{json.dumps(found[name]['forget_quality'])}")  # fmt: skip
    if report.judgement is not None:
        nearness = figure(report.judgement.aggregates.overall)
        print(f"verdict: {report.judgement.verdict}, {nearness} of 1 as the model never told")
    if report.not_judged:
        print(f"no verdict: {report.not_judged}")
    if report.not_controlled:
        print(f"depth without a control: {report.not_controlled}")
    print(f"wrote {options.out / 'metrics.json'}")
