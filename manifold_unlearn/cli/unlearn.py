"""``manifold-unlearn unlearn``."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from manifold_unlearn.cli.inputs import Commands, add_sets, include_eos, neutral_texts, read_sets
from manifold_unlearn.cli.recipes import add_recipe, recipe_of
from manifold_unlearn.cli.table import print_table
from manifold_unlearn.pipeline import METHODS
from manifold_unlearn.recipe.manifold import ManifoldRecipe
from manifold_unlearn.recipe.subspace import SubspaceRecipe


def register(commands: Commands) -> None:
    """Add the sub-command."""
    command = commands.add_parser("unlearn", help="make a model forget a set and keep another")
    command.add_argument("model")
    add_sets(command)
    command.add_argument("--method", default="subspace", choices=METHODS)
    command.add_argument("--bake", action="store_true", help="edit and save the weights")
    add_recipe(command, SubspaceRecipe, "--method subspace (default: the outcome of the sweep)")
    add_recipe(command, ManifoldRecipe, "--method manifold, hybrid")
    group = command.add_argument_group("training of a gradient method, or of the hybrid")
    group.add_argument("--lr", type=float, help="default 1e-5, of the hybrid 2e-3")
    group.add_argument(
        "--steps", type=int, help="default: 10 epochs over the forget set; hybrid 60"
    )
    group.add_argument("--batch-size", type=int, help="default 16, of the hybrid 32")
    group.add_argument("--random-state", type=int)
    command.add_argument("--neutral", type=Path, help="JSONL of texts for perplexity")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Forget, measure, save, report."""
    from manifold_unlearn.activations.models import load_model
    from manifold_unlearn.pipeline import unlearn
    from manifold_unlearn.report import Report, before_after_bars

    sets = read_sets(options)
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
        include_eos=include_eos(options),
        neutral=neutral_texts(options),
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
    print_table(columns, rows)
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


def _recipe_of_method(options: argparse.Namespace) -> SubspaceRecipe | ManifoldRecipe | None:
    """Return the recipe of the method chosen; None of a baseline."""
    if options.method == "subspace":
        return recipe_of(options, SubspaceRecipe)
    return recipe_of(options, ManifoldRecipe) if options.method in ("manifold", "hybrid") else None


def _training(options: argparse.Namespace) -> Any:
    """Return the training asked for; None where nothing is said of it."""
    from manifold_unlearn.finetune.train import TrainConfig
    from manifold_unlearn.recipe.manifold import HYBRID_TRAINING

    names = ("lr", "steps", "batch_size", "random_state")
    given = {name: v for name in names if (v := getattr(options, name)) is not None}
    usual = HYBRID_TRAINING if options.method == "hybrid" else TrainConfig()
    return replace(usual, **given) if given else None
