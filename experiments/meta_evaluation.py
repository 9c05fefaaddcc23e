"""Which metrics tell models with the knowledge from models without it, and stay when nothing comes?

Faithfulness: a pool of models fine-tuned from the told and the never-told one, some of which have
the knowledge of the forget people (told and trained on; or never told and then taught it) and some
of which do not (trained on retain people, on people of no one's world, on wrong answers).
Robustness: unlearned models, before and after relearning one half of the forgotten facts (the
metric reads the other half) beside the never-told model at equal budget, and rounded to few bits.
All models descend from one start, as in the published pool; told and never told are trained apart
from it all the same, so depth is also measured under a control of retain items.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from cli_from_dataclass import parse, write

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.attack.quantize import quantized
from manifold_unlearn.evaluate.depth import LayerDrop, cka_erasure, patching_drop, unlearning_depth
from manifold_unlearn.evaluate.depth_control import controlled_depth
from manifold_unlearn.evaluate.lens import frozen_head_drop
from manifold_unlearn.evaluate.likelihood import plain
from manifold_unlearn.evaluate.memorization import token_memorization
from manifold_unlearn.evaluate.meta import (
    faithfulness,
    meta_score,
    quantization_robustness,
    relearning_robustness,
    robustness,
)
from manifold_unlearn.evaluate.metrics import truth_ratio_preference
from manifold_unlearn.evaluate.suites import assess
from manifold_unlearn.finetune.objectives import objective
from manifold_unlearn.finetune.train import TrainConfig, fine_tune, train
from manifold_unlearn.testbed.models import Recipe, Testbed, load_testbed
from manifold_unlearn.testbed.world import FictionalWorld


@dataclass(frozen=True)
class Config:
    """The testbed, the pool, and the unlearned models."""

    seeds: tuple[int, ...] = (0,)
    n_people: int = 16
    n_forget: int = 4
    n_attributes: int = 4
    n_values: int = 8
    n_filler: int = 60
    d_model: int = 128
    n_layers: int = 2
    told_steps: int = 400
    pool_steps: tuple[int, ...] = (10, 40)
    pool_lrs: tuple[float, ...] = (3e-4, 1e-3)
    unlearners: tuple[str, ...] = ("graddiff", "npo", "simnpo", "rmu")
    unlearn_steps: int = 25
    unlearn_lr: float = 1e-3
    relearn_steps: int = 10
    relearn_lr: float = 1e-3
    bits: int = 4


PRESETS = {
    "quick": Config(),
    "full": Config(
        seeds=(0, 1, 2), n_people=32, n_forget=8, n_attributes=6, n_values=16, n_filler=400,
        n_layers=4, told_steps=600, pool_steps=(20, 80), pool_lrs=(1e-4, 3e-4, 1e-3),
        unlearn_steps=120, relearn_steps=30,
    ),
}  # fmt: skip
COMMAND = "python experiments/meta_evaluation.py --preset {}"
FAITHFUL = 0.9


def bed_of(config: Config, seed: int) -> Testbed:
    world = FictionalWorld(
        n_people=config.n_people, n_forget=config.n_forget, n_holdout=config.n_forget,
        n_attributes=config.n_attributes, n_values=config.n_values, n_filler=config.n_filler,
        random_state=seed,
    )  # fmt: skip
    recipe = Recipe(
        d_model=config.d_model, d_hidden=5 * config.d_model // 2, n_layers=config.n_layers,
        n_steps=config.told_steps,
    )  # fmt: skip
    return load_testbed(recipe, world=world, random_state=seed)


def wrong(items: tuple[Item, ...]) -> list[Item]:
    """The items with the first of their wrong answers as the right one."""
    return [replace(item, answer=item.perturbed_answer[0]) for item in items]


def pool(bed: Testbed, config: Config) -> Iterator[tuple[str, bool, Any]]:
    """Name, whether the model has the knowledge, and the model."""
    world = bed.world
    ways = (
        ("told, retain people", True, bed.told, world.retain),
        ("told, forget and retain people", True, bed.told, (*world.forget, *world.retain)),
        ("taught later", True, bed.never_told, (*world.forget, *world.retain)),
        ("never told, retain people", False, bed.never_told, world.retain),
        ("never told, other people", False, bed.never_told, (*world.holdout, *world.retain)),
        ("never told, wrong answers", False, bed.never_told, (*wrong(world.forget), *world.retain)),
    )  # fmt: skip
    yield "told", True, bed.told
    yield "never told", False, bed.never_told
    for name, knows, start, items in ways:
        for steps in config.pool_steps:
            for lr in config.pool_lrs:
                if name == "taught later" and steps == min(config.pool_steps):
                    continue  # too few to have learned it
                how = TrainConfig(lr=lr, steps=steps, random_state=bed.world.random_state)
                made = fine_tune(start, bed.tokenizer, list(items), config=how)
                yield f"{name}, {steps} steps of {lr:g}", knows, made.model


class Judge:
    """Every metric of a model, high for knowledge, on given items of one testbed."""

    def __init__(self, bed: Testbed, items: tuple[Item, ...]):
        self.bed, self.items = bed, items
        self.told, self.never = plain(bed.told), plain(bed.never_told)
        self.patched, self.patched_control = self.drops(patching_drop, self.never)
        self.read, self.read_control = self.drops(frozen_head_drop, self.never)

    def drops(self, measure: Any, subject: Any) -> tuple[LayerDrop, LayerDrop]:
        """Of the items, and of the retain people's as a control."""
        first, second = (
            measure(self.told, subject, self.bed.tokenizer, items)
            for items in (self.items, self.bed.world.retain)
        )
        return first, second

    def __call__(self, model: Any) -> dict[str, float]:
        tokenizer, items, subject = self.bed.tokenizer, self.items, plain(model)
        shown = assess(subject, tokenizer, items, generate=False)
        tokens = token_memorization(subject, tokenizer, items)
        drop, drop_control = self.drops(patching_drop, subject)
        read, read_control = self.drops(frozen_head_drop, subject)
        controlled = controlled_depth(
            drop, self.patched, control=drop_control, retrained_control=self.patched_control
        )
        controlled_lens = controlled_depth(
            read, self.read, control=read_control, retrained_control=self.read_control
        )
        cka = cka_erasure(self.told, subject, self.never, tokenizer, items)
        return {
            "probability": shown["probability"].mean,
            "paraphrase_probability": shown["paraphrase_probability"].mean,
            "truth_ratio": float(truth_ratio_preference(shown["truth_ratio"].values).mean()),
            **{name: metric.mean for name, metric in tokens.items()},
            "one_minus_unlearning_depth": 1 - unlearning_depth(drop, self.patched).score.mean,
            "one_minus_lens_depth": 1 - unlearning_depth(read, self.read).score.mean,
            "one_minus_controlled_depth": 1 - controlled.score,
            "one_minus_controlled_lens_depth": 1 - controlled_lens.score,
            "one_minus_cka_erasure": 1 - cka.score,
        }


def attacked(bed: Testbed, config: Config) -> Iterator[dict[str, Any]]:
    """Metrics of unlearned models and of the never-told one, whole, relearned and rounded."""
    taught, asked = bed.world.folds(2)
    judge = Judge(bed, asked)
    how = TrainConfig(lr=config.unlearn_lr, steps=config.unlearn_steps)
    again = TrainConfig(lr=config.relearn_lr, steps=config.relearn_steps)
    for name in ("never told", *config.unlearners):
        model = bed.never_told
        if name != "never told":
            model = train(
                bed.told, bed.tokenizer, bed.world.forget, bed.world.retain,
                objective=objective(name), config=how,
            ).model  # fmt: skip
        row = {"kind": "attacked", "model": name, "before": judge(model)}
        row["relearned"] = judge(fine_tune(model, bed.tokenizer, taught, config=again).model)
        with quantized(model, config.bits):
            row["quantized"] = judge(model)
        yield row


def judged(rows: list[dict], metric: str) -> dict[str, Any]:
    """Faithfulness and robustness of a metric, in both forms."""
    knows = [row for row in rows if row["kind"] == "pool"]
    sides = [[row["metrics"][metric] for row in knows if row["knows"] is k] for k in (True, False)]
    found: dict[str, Any] = {"faithfulness": faithfulness(*sides).to_json()}
    for form in ("symmetric", "one_directional"):
        R, Q = [], []
        for seed in {row["seed"] for row in rows}:
            there = [r for r in rows if r["kind"] == "attacked" and r["seed"] == seed]
            (never,) = [row for row in there if row["model"] == "never told"]
            for row in there:
                if row is never:
                    continue
                before, after = [row["before"][metric]], [row["relearned"][metric]]
                anew = never["before"][metric], never["relearned"][metric]
                R += relearning_robustness(before, after, *anew, form=form).tolist()
                Q += quantization_robustness(before, [row["quantized"][metric]], form=form).tolist()
        found[form] = robustness(np.array(R), np.array(Q)).to_json()
    found["score"] = meta_score(found["faithfulness"]["auc"], found["symmetric"]["score"])
    return found


def claims(rows: list[dict], command: str) -> list[dict]:
    metrics = {row["metric"]: row for row in rows if row["kind"] == "metric"}
    depth = metrics["one_minus_unlearning_depth"]
    cka = metrics["one_minus_cka_erasure"]
    areas = {name: round(row["faithfulness"]["auc"], 3) for name, row in metrics.items()}
    return [
        {
            "claim": "unlearning depth tells models with the knowledge from models without",
            "value": areas["one_minus_unlearning_depth"],
            "target": FAITHFUL,
            "holds": depth["faithfulness"]["auc"] >= FAITHFUL,
            "command": command,
        },
        {
            "claim": "unlearning depth is a better metric than CKA (faithfulness with robustness)",
            "value": [round(depth["score"], 3), round(cka["score"], 3)],
            "target": "first above second",
            "holds": depth["score"] > cka["score"],
            "command": command,
        },
        {
            "claim": "no metric is more faithful than unlearning depth",
            "value": areas,
            "target": "depth greatest",
            "holds": areas["one_minus_unlearning_depth"] >= max(areas.values()),
            "command": command,
        },
    ]


def run(config: Config, preset: str) -> dict[str, Any]:
    start = time.perf_counter()
    rows: list[dict] = []
    for seed in config.seeds:
        bed = bed_of(config, seed)
        judge = Judge(bed, bed.world.forget)
        for name, knows, model in pool(bed, config):
            rows.append({"kind": "pool", "seed": seed, "model": name, "knows": knows,
                         "metrics": judge(model)})  # fmt: skip
            print(seed, name, {k: round(v, 3) for k, v in rows[-1]["metrics"].items()}, flush=True)
        for row in attacked(bed, config):
            rows.append({"seed": seed, **row})
            print(seed, "attacked", row["model"], flush=True)
    names = list(rows[0]["metrics"])
    rows += [{"kind": "metric", "metric": name, **judged(rows, name)} for name in names]
    return {
        "config": asdict(config),
        "seconds": time.perf_counter() - start,
        "rows": rows,
        "claims": claims(rows, COMMAND.format(preset)),
    }


if __name__ == "__main__":
    preset, config = parse(PRESETS, __doc__)
    print(write("meta_evaluation", preset, run(config, preset)))
