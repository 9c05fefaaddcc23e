"""``manifold-unlearn capture``."""

from __future__ import annotations

import argparse
from pathlib import Path

from manifold_unlearn.activations.corpus import read_items
from manifold_unlearn.cli.inputs import Commands, template_of


def register(commands: Commands) -> None:
    """Add the sub-command."""
    command = commands.add_parser("capture", help="write activations of texts at named sites")
    command.add_argument("model")
    command.add_argument(
        "--texts", required=True, type=Path, help="JSONL: text, or question+answer"
    )
    command.add_argument("--sites", required=True, nargs="+", metavar="SITE")
    command.add_argument("--tokens", default="all", choices=["all", "last", "answer"])
    command.add_argument("--template", default="{question}")
    command.add_argument("--out", required=True, type=Path)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write the activations of the texts."""
    from manifold_unlearn.activations.capture import capture
    from manifold_unlearn.activations.models import load_model

    items = read_items(options.texts, template=template_of(options))
    model, tokenizer = load_model(options.model)
    texts = [item.captured for item in items]
    acts = capture(model, tokenizer, texts, options.sites, tokens=options.tokens)
    acts.save(options.out)
    print(f"{len(acts.tokens)} rows at {len(acts)} sites in {options.out}")
