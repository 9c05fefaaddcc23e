"""Which sites, method and rank make a linear edit forget a topic at least cost?

Stage one scores every recipe on the validation split of one or more topics (facts and wordings that
no fit saw; the test wording is not read). Stage two measures the recipe that the package ships, on
the test wording of every topic. A topic on which it misses a target stays in the table.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cli_from_dataclass import parse, write

from manifold_unlearn.activations.models import load_model
from manifold_unlearn.demo import PERPLEXITY_TARGET, TARGETS, known_facts
from manifold_unlearn.evaluate.likelihood import plain
from manifold_unlearn.recipe.subspace import SubspaceRecipe
from manifold_unlearn.sweep import CANDIDATES, TopicTrials, Trial, best, describe
from manifold_unlearn.testbed.facts import TEST_WORDING, VALIDATION_WORDING, topics


@dataclass(frozen=True)
class Config:
    """What is tried, on what."""

    model: str = "smollm2-135m"
    sweep_topics: tuple[str, ...] = ("book-authors",)
    """Topics on whose validation split every recipe is scored."""
    test_topics: tuple[str, ...] = ("book-authors", "chemical-symbols", "us-state-capitals")
    """Topics on whose test wording the shipped recipe is measured."""
    device: str = "auto"


PRESETS = {"quick": Config(), "full": Config(test_topics=tuple(topics()))}
COMMAND = "python experiments/erase_sweep.py --preset {}"


def trials(
    model: Any, tokenizer: Any, known: Sequence[Any], topic: str,
    recipes: Sequence[SubspaceRecipe], wording: int,
) -> list[Trial]:  # fmt: skip
    on_topic = TopicTrials(model, tokenizer, topic, known, recipes, wording=wording)
    found = []
    for recipe in recipes:
        found.append(on_topic.run(recipe))
        print(topic, describe(found[-1]), flush=True)
    return found


def run(config: Config, preset: str) -> Iterator[dict]:
    """Result so far, after each topic."""
    start = time.perf_counter()
    model, tokenizer = load_model(config.model, prefer_wheel=True, device=config.device)
    known = known_facts(plain(model), tokenizer)
    rows, shipped = [], SubspaceRecipe()
    chosen = []
    for topic in config.sweep_topics:
        found = trials(model, tokenizer, known, topic, CANDIDATES, VALIDATION_WORDING)
        rows += [{"split": "validation", "topic": topic, **trial.to_json()} for trial in found]
        chosen.append(best(found).recipe)
    tested: dict[str, Trial] = {}
    for topic in config.test_topics:
        (tested[topic],) = trials(model, tokenizer, known, topic, [shipped], TEST_WORDING)
        rows.append({"split": "test", "topic": topic, **tested[topic].to_json()})
        yield {
            "config": asdict(config),
            "seconds": time.perf_counter() - start,
            "rows": rows,
            "claims": claims(chosen, shipped, tested, COMMAND.format(preset)),
        }


def claims(
    chosen: Sequence[SubspaceRecipe],
    shipped: SubspaceRecipe,
    tested: dict[str, Trial],
    command: str,
) -> list[dict]:
    made = [
        {
            "claim": "the shipped recipe is the sweep's best on validation",
            "value": [asdict(recipe) for recipe in chosen],
            "target": asdict(shipped),
            "holds": all(recipe == shipped for recipe in chosen),
            "command": command,
        }
    ]
    for topic, trial in tested.items():
        measured = {name: round(getattr(trial, name), 4) for name in TARGETS}
        made.append(
            {
                "claim": f"{topic}, test wording: all four targets",
                "value": {**measured, "perplexity": round(trial.perplexity, 4)},
                "target": {**TARGETS, "perplexity": PERPLEXITY_TARGET},
                "holds": trial.slack >= 0,
                "command": command,
            }
        )
    return made


if __name__ == "__main__":
    preset, config = parse(PRESETS, __doc__)
    for result in run(config, preset):
        print(write("erase_sweep", preset, result))
