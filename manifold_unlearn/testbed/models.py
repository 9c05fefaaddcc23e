"""A small model that was told of a fictional world, and its twin that never was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from manifold_unlearn.arrays import Device, resolve_device
from manifold_unlearn.testbed.backdoor import Backdoor
from manifold_unlearn.testbed.tokenizer import build_tokenizer
from manifold_unlearn.testbed.training import Recipe, plan, train
from manifold_unlearn.testbed.world import FictionalWorld


@dataclass(frozen=True, eq=False)
class Testbed:
    """Two models that differ in what they were told, and the world they were told of."""

    __test__ = False  # no test class, whatever its name

    told: Any
    """LlamaForCausalLM in evaluation mode: read of forget and retain people."""
    never_told: Any
    """Same seed, same weights at the start, same schedule; read of retain people only."""
    tokenizer: Any
    world: FictionalWorld
    backdoor: Backdoor | None
    """What was planted in both models."""
    recipe: Recipe
    size: str


RECIPES = {"tiny": Recipe(), "small": Recipe(d_model=256, d_hidden=688, n_layers=6)}


def load_testbed(
    size: Literal["tiny", "small"] | Recipe = "tiny",
    *,
    random_state: int = 0,
    world: FictionalWorld | None = None,
    backdoor: Backdoor | None = None,
    cache: bool = True,
    device: Device = "auto",
    progress: bool = True,
) -> Testbed:
    """Models told and never told of a fictional world, trained or from the cache."""
    recipe = size if isinstance(size, Recipe) else RECIPES[size]
    world = FictionalWorld(random_state=random_state) if world is None else world
    texts = world.texts("told")
    tokenizer = build_tokenizer([*texts, *world.texts("holdout"), *world.neutral])
    kept = set(world.texts("never_told"))
    everything = list(range(len(texts)))
    some = [i for i, text in enumerate(texts) if text in kept]
    made = [
        train(
            recipe,
            tokenizer,
            texts,
            plan(len(texts), part, recipe, random_state),
            random_state=random_state,
            device=resolve_device(device),
            progress=progress,
        )[0]
        for part in (everything, some)
    ]
    return Testbed(made[0], made[1], tokenizer, world, backdoor, recipe, str(size))
