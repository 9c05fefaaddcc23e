"""Options that are the fields of a recipe."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, TypeVar

from manifold_unlearn.recipe.manifold import ManifoldRecipe
from manifold_unlearn.recipe.subspace import SubspaceRecipe

Recipe = TypeVar("Recipe", SubspaceRecipe, ManifoldRecipe)


def add_recipe(
    command: argparse.ArgumentParser,
    kind: type[SubspaceRecipe] | type[ManifoldRecipe],
    title: str,
) -> None:
    """Add one option a field; what is not given keeps its default."""
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


def recipe_of(options: argparse.Namespace, kind: type[Recipe]) -> Recipe:
    """Return the recipe that the options say."""
    given: dict[str, Any] = {}
    for field in fields(kind):
        value = getattr(options, f"{kind.__name__}.{field.name}", None)
        if value is not None:
            given[field.name] = tuple(value) if isinstance(value, list) else value
    if kind is ManifoldRecipe and options.random_state is not None:
        given["random_state"] = options.random_state
    return kind(**given)
