"""Options that several sub-commands have: what is asked, of which models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, TypeAlias

from manifold_unlearn.activations.corpus import Item, read_items

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_sets(command: argparse.ArgumentParser) -> None:
    """Add what is to be forgotten and retained, and how it is asked."""
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


def template_of(options: argparse.Namespace) -> str:
    r"""Template with ``\n`` written out in the shell made a line break."""
    return options.template.replace("\\n", "\n")


def read_sets(options: argparse.Namespace) -> dict[str, list[Item]]:
    """Both sets with the template applied."""
    return {
        name: read_items(getattr(options, name), template=template_of(options), name=name)
        for name in ("forget", "retain")
    }


def include_eos(options: argparse.Namespace) -> bool:
    """Whether answers are scored with their end token."""
    return options.template != "{question}" if options.eos is None else options.eos


def neutral_texts(options: argparse.Namespace) -> list[str]:
    """Return the texts of ``--neutral``; none without it."""
    return [item.question for item in read_items(options.neutral)] if options.neutral else []


def load_models(options: argparse.Namespace) -> tuple[dict[str, Any], Any]:
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
