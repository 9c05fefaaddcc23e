"""``manifold-unlearn demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

from manifold_unlearn.cli.inputs import Commands
from manifold_unlearn.cli.recipes import add_recipe, recipe_of
from manifold_unlearn.cli.table import print_table
from manifold_unlearn.recipe.subspace import SubspaceRecipe


def register(commands: Commands) -> None:
    """Add the sub-command."""
    command = commands.add_parser("demo", help="forget one topic of plain facts and report it")
    command.add_argument("--topic", default="book-authors", help="see --list-topics")
    command.add_argument("--list-topics", action="store_true", help="list the topics and stop")
    command.add_argument(
        "--model", default="smollm2-135m", help="id, directory, .gguf or short name"
    )
    command.add_argument("--bake", action="store_true", help="edit and save the weights")
    command.add_argument(
        "--sweep", action="store_true", help="choose the recipe anew on validation"
    )
    add_recipe(command, SubspaceRecipe, "recipe (default: the outcome of the sweep)")
    command.add_argument("--out", type=Path, default=Path("demo-out"))
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Forget one topic and show the verdict."""
    from manifold_unlearn.demo import DemoConfig, run_demo, summary_table
    from manifold_unlearn.testbed.facts import topics

    if options.list_topics:
        print("\n".join(topics()))
        return
    recipe = recipe_of(options, SubspaceRecipe)
    if options.sweep:
        from manifold_unlearn.sweep import choose_recipe

        recipe = choose_recipe(options.model, options.topic, say=print)
    config = DemoConfig(options.topic, options.model, options.bake, recipe)
    result, metrics = run_demo(config, options.out, say=print)
    print_table(*summary_table(result.changes, metrics))
    for row in metrics["verdict"]:
        sign = "<=" if row["claim"].startswith(("forget", "neutral")) else ">="
        word = "holds" if row["holds"] else "MISSED"
        print(f"{row['claim']}: {row['value']:.3f} (target {sign} {row['target']}) {word}")
    print(
        f"{metrics['seconds_in_all']:.0f} s, {metrics['peak_memory_gib']:.1f} GiB; "
        f"open {options.out / 'report.html'}"
    )
