"""Does unlearning on the manifold come nearer to the model never told than what others do?

Every method is tuned on validation splits of the worlds (the same told model, other people to
forget, a twin of its own), the same number of settings each by the same judge, and judged on all
seeds beside the model that was never told: aggregates, forget quality, retained accuracy, depth,
what rounding and relearning bring back, what probes read, and what it cost. Controls: linear
erasers at the same places, and moves of the same length to random places.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cli_from_dataclass import RESULTS, parse, write
from scipy.stats import ks_2samp

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.attack import accuracy_of, probability_of
from manifold_unlearn.attack.quantize import quantization_attack
from manifold_unlearn.attack.relearn import disjoint_facts_attack, relearning_attack
from manifold_unlearn.evaluate import EvaluationSets, assess, plain
from manifold_unlearn.evaluate.forgetting import yardstick
from manifold_unlearn.evaluate.probe_tasks import truth_task
from manifold_unlearn.evaluate.probes import Kind, ProbeResult, probe
from manifold_unlearn.finetune import TrainConfig, objective, train
from manifold_unlearn.finetune.cost import counted
from manifold_unlearn.intervene.bake import bake
from manifold_unlearn.intervene.hooks import intervene
from manifold_unlearn.intervene.least_squares import least_squares_bake
from manifold_unlearn.intervene.targets import own_targets, token_rows
from manifold_unlearn.recipe.manifold import (
    HYBRID_TRAINING,
    ManifoldRecipe,
    bake_manifold,
    fit_manifold_edit,
    hybrid,
    state_targets,
)
from manifold_unlearn.recipe.subspace import SubspaceRecipe, fit_edit
from manifold_unlearn.testbed import FictionalWorld, Testbed, load_testbed
from manifold_unlearn.testbed.models import RECIPES, WORLDS

COMMAND = "python experiments/unlearning.py --preset {}"
DOCS = Path(__file__).parents[1] / "docs" / "unlearning"
PAGES = {"small": DOCS / "larger.md"}
"""Where the table of a preset stands, if not in claim.md."""


@dataclass(frozen=True)
class Config:
    """What is compared, and how much of it."""

    size: str = "tiny"
    seeds: tuple[int, ...] = (0, 1, 2)
    tuned_on: tuple[int, ...] = (0, 1, 2)
    """Seeds whose validation splits settings are chosen on."""
    methods: tuple[str, ...] = (
        "baked", "hybrid", "hooked", "subspace", "leace", "mean difference", "random targets",
        "simnpo", "npo", "rmu", "wga", "disentangled",
    )  # fmt: skip
    attacked: tuple[str, ...] = ("baked", "hybrid", "simnpo")
    controls: tuple[str, ...] = ("told", "never told")
    """Those of the two that are attacked as well."""
    n_retain: int = 48
    n_neutral: int = 100
    n_filler: int = 160
    relearn_points: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    relearn_lr: float = 3e-4
    n_jobs: int = 2
    chosen_by: str = ""
    """Preset whose settings are taken instead of tuning anew."""


FEW = "baked, few texts"

PRESETS = {
    "quick": Config(),
    "few": Config(methods=(FEW,), attacked=(FEW,)),
    "small": Config(
        size="small",
        seeds=(0,),
        n_jobs=1,
        chosen_by="quick",
        n_retain=128,
        controls=("never told",),
        methods=("baked", "hybrid", "hooked", "subspace", "random targets", "simnpo", "wga"),
    ),
}

Settings = dict[str, Any]
GRADIENT: tuple[Settings, ...] = (
    {"lr": 3e-4, "steps": 50}, {"lr": 1e-3, "steps": 50}, {"lr": 3e-4, "steps": 150},
    {"lr": 1e-3, "steps": 150},
)  # fmt: skip
BLOCKS: tuple[Settings, ...] = (
    {"first": 0.0, "last": 1.0}, {"first": 0.0, "last": 0.5}, {"first": 0.25, "last": 1.0},
    {"first": 0.0, "last": 0.25},
)  # fmt: skip
SETTINGS: dict[str, tuple[Settings, ...]] = {
    "baked": ({"ridge": 1.0}, {"ridge": 3.0}, {"ridge": 3.0, "n_names": 8}, {"ridge": 10.0}),
    FEW: (
        {"ridge": 1.0, "share": 4}, {"ridge": 3.0, "share": 4}, {"ridge": 1.0, "share": 8},
        {"ridge": 3.0, "share": 8},
    ),
    "hybrid": (
        {"steps": 60}, {"steps": 60, "beta": 0.0}, {"steps": 20, "start": "baked"},
        {"steps": 20, "start": "baked", "beta": 0.0},
    ),
    "hooked": (
        {"evidence": "token"}, {"evidence": "token", "n_landmarks": 1024},
        {"evidence": "token", "blocks": (0.0, 0.25, 0.5, 0.75)},
        {"evidence": "token", "n_landmarks": 1024, "false_positive_rate": 0.05},
    ),
    "subspace": tuple({"rank": rank} for rank in (1, 2, 4, 8)),
    "leace": BLOCKS,
    "mean difference": BLOCKS,
    "random targets": ({"ridge": 0.3}, {"ridge": 1.0}, {"ridge": 3.0}, {"ridge": 10.0}),
}  # fmt: skip
"""Four settings of each method; of the gradient baselines ``GRADIENT``."""


def world_of(config: Config, seed: int) -> FictionalWorld:
    return FictionalWorld(random_state=seed, **WORLDS[config.size])


def bed_of(config: Config, world: FictionalWorld) -> Testbed:
    return load_testbed(
        RECIPES[config.size], world=world, random_state=world.random_state, device="cpu",
        progress=False,
    )  # fmt: skip


def told_sets(bed: Testbed, config: Config) -> tuple[list[Item], list[Item]]:
    """What every method is given: the facts as they were told, and filler among the retained."""
    sides: dict[str, list[Item]] = {"forget": [], "retain": []}
    for fact in bed.world.facts:
        if fact.role in sides:
            sides[fact.role] += [
                Item(prompt, fact.value, topic=fact.person) for prompt in fact.prompts
            ]
    filler = [Item(text) for text in bed.world.texts("filler")[: config.n_filler]]
    return sides["forget"], [*sides["retain"], *filler]


def few(items: Sequence[Item], share: int) -> list[Item]:
    """One in so many, over all people, facts and wordings alike."""
    return [item for i, item in enumerate(items) if (7 * i + i // 10) % share == 0]


def unlearned(bed: Testbed, method: str, settings: Settings, config: Config) -> Any:
    """Opens to the model that a method makes of the told one."""
    forget, retain = told_sets(bed, config)
    given = (bed.told, bed.tokenizer, forget, retain)
    if method == "baked":
        return plain(bake_manifold(*given, ManifoldRecipe(**settings)).model)
    if method == FEW:
        how = {name: v for name, v in settings.items() if name != "share"}
        once = [item for i, item in enumerate(forget) if i % len(bed.world.facts[0].prompts) == 0]
        given = (bed.told, bed.tokenizer, once, few(retain, settings["share"]))
        return plain(bake_manifold(*given, ManifoldRecipe(**how)).model)
    if method == "hybrid":
        how = {name: v for name, v in settings.items() if name != "steps"}
        training = replace(HYBRID_TRAINING, steps=settings["steps"])
        return plain(hybrid(*given, ManifoldRecipe(**how), training))
    if method == "hooked":
        edit = fit_manifold_edit(*given, ManifoldRecipe(**settings))
        return lambda: intervene(bed.told, edit)
    if method in ("subspace", "leace", "mean difference"):
        kind = {"subspace": "contrastive"}.get(method, method.replace(" ", "_"))
        recipe = replace(SubspaceRecipe(first=0.0, last=1.0, method=kind), **settings)
        return plain(bake(bed.told, fit_edit(*given, recipe, bakeable=True)))
    if method == "random targets":
        return plain(randomly_moved(*given, ManifoldRecipe(**settings)))
    rule = objective(method, **({"rank": 4, "refresh": 5} if method == "disentangled" else {}))
    return plain(train(*given, objective=rule, config=TrainConfig(**settings)).model)


def randomly_moved(
    model: Any, tokenizer: Any, forget: list[Item], retain: list[Item], recipe: ManifoldRecipe
) -> Any:
    """Control: the same states moved as far, each in a direction drawn at random, then baked."""
    aims = state_targets(model, tokenizer, forget, retain, recipe)
    own = own_targets(model, tokenizer, [item.captured for item in forget], where=aims.masks)
    draw = torch.Generator().manual_seed(0)
    states = {}
    for layer, now in own.states.items():
        step = torch.randn(now.shape, generator=draw)
        far = (aims.states[layer] - now).norm(dim=1, keepdim=True)
        states[layer] = now + step * far / step.norm(dim=1, keepdim=True)
    held = token_rows(model, tokenizer, [item.captured for item in retain])
    return least_squares_bake(model, replace(aims, states=states), held, ridge=recipe.ridge).model


def shown(subject: Any, bed: Testbed) -> dict[str, Any]:
    """Per-item values of what tuning looks at."""
    found = {}
    for side in ("forget", "retain"):
        items = getattr(bed.world, side)
        found[side] = assess(subject, bed.tokenizer, items, generate=False)
    return found


def figures(found: dict[str, Any], never: dict[str, Any]) -> dict[str, float]:
    forget, retain = found["forget"], found["retain"]
    test = ks_2samp(forget["truth_ratio"].values, never["forget"]["truth_ratio"].values)
    return {
        "forget": forget["probability"].mean,
        "forget_paraphrase": forget["paraphrase_probability"].mean,
        "forget_accuracy": float(np.mean(forget["rank"].values == 1)),
        "retain": retain["probability"].mean,
        "retain_paraphrase": retain["paraphrase_probability"].mean,
        "retain_accuracy": float(np.mean(retain["rank"].values == 1)),
        "ks_statistic": float(test.statistic),
        "ks_p": float(test.pvalue),
    }


def tuned(job: tuple[str, int], config: Config) -> list[dict[str, Any]]:
    """All settings of a method on the validation split of one seed."""
    method, seed = job
    torch.set_num_threads(1)
    bed = bed_of(config, world_of(config, seed).validation_split())
    never = plain(bed.never_told)
    yard = yardstick(bed.tokenizer, sets_of(bed, config), reference=never, target=plain(bed.told))
    goal = shown(never, bed)
    rows = []
    for settings in SETTINGS.get(method, GRADIENT):
        row = {"stage": "tune", "method": method, "seed": seed, "settings": settings}
        try:
            subject = unlearned(bed, method, settings, config)
            judged = yard.report(subject).judgement
            row |= figures(shown(subject, bed), goal)
            row |= {"overall": judged.aggregates.overall if judged else None}
        except (FloatingPointError, ValueError) as error:
            row |= {"overall": None, "error": str(error)}
        rows.append(row)
        print(f"tune {method} {settings} on {seed}: {row['overall']}", flush=True)
    return rows


def tested(seed: int, chosen: dict[str, Settings], config: Config) -> list[dict[str, Any]]:
    """Every method on one seed, with told and never told beside it."""
    torch.set_num_threads(1)
    bed = bed_of(config, world_of(config, seed))
    never, told = plain(bed.never_told), plain(bed.told)
    yard = yardstick(bed.tokenizer, sets_of(bed, config), reference=never, target=told)
    goal = shown(never, bed)
    control, unread = relearned(bed.never_told, bed, config), probed(never, bed)
    rows = []
    for method in ("told", "never told", *chosen):
        start, flops = time.process_time(), 0
        if method in chosen:
            with counted() as cost:
                subject = unlearned(bed, method, chosen[method], config)
            flops = cost.flops
        else:
            subject = told if method == "told" else never
        seconds = time.process_time() - start
        report = yard.report(subject)
        judged = report.judgement
        row: dict[str, Any] = {"stage": "test", "seed": seed, "method": method}
        row |= figures(shown(subject, bed), goal) | {"gflops": flops / 1e9, "cpu_seconds": seconds}
        if judged is not None:
            row |= {"verdict": judged.verdict, **asdict(judged.aggregates)}
        row |= report.profiles["model"].figures["depth"]
        row["perplexity"] = report.profiles["model"].figures["neutral"]["perplexity"]
        if method in (*config.controls, *config.attacked):
            with subject() as model:
                row |= attacked(model, bed, config)
                row["relearning"] = relearned(model, bed, config) / control
            above = [
                own.above(other) for own, other in zip(probed(subject, bed), unread, strict=True)
            ]
            row["probe"] = max(gap.value for gaps in above for gap in gaps)
            row["probe_low"] = max(gap.interval[0] for gaps in above for gap in gaps)
            row["last_probe"] = max(gaps[-1].value for gaps in above)
        rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return rows


def sets_of(bed: Testbed, config: Config) -> EvaluationSets:
    """What the judge asks."""
    world = bed.world
    return EvaluationSets(
        world.forget, world.retain[: config.n_retain], world.holdout,
        world.neutral[: config.n_neutral],
    )  # fmt: skip


def probed(subject: Any, bed: Testbed) -> list[ProbeResult]:
    """Whether a linear and an MLP probe tell right from wrong answers, behind every block."""
    forget, retain = bed.world.forget, bed.world.retain
    task = truth_task(
        forget, groups=[item.topic for item in forget], trained_on=retain,
        trained_groups=[item.topic for item in retain],
    )  # fmt: skip
    kinds: tuple[Kind, ...] = ("linear", "mlp")
    return [probe(subject, bed.tokenizer, task, kind=kind, n_shuffles=1) for kind in kinds]


def attacked(model: Any, bed: Testbed, config: Config) -> dict[str, float]:
    """Accuracy on the forget facts after rounding, and after learning others of them again."""
    items, tokenizer = bed.world.forget, bed.tokenizer
    rounded = quantization_attack(model, tokenizer, accuracy_of(items), bits=(8, 4))
    means = rounded.values.mean(1)
    others = disjoint_facts_attack(
        model, tokenizer, items, n_folds=3, points=config.relearn_points[:-1],
        config=relearning(config), measure=accuracy_of,
    )  # fmt: skip
    return {"rounded": float(means[1:].max()), "other_facts_relearned": others.best.mean}


def relearning(config: Config) -> TrainConfig:
    return TrainConfig(lr=config.relearn_lr, batch_size=16, schedule="constant", weight_decay=0.0)


def relearned(model: Any, bed: Testbed, config: Config) -> float:
    """Area under the curve of answer probability over the steps of learning the facts again."""
    items = bed.world.forget
    curve = relearning_attack(
        model, bed.tokenizer, probability_of(items), items, points=config.relearn_points,
        config=relearning(config),
    )  # fmt: skip
    values = curve.values.mean(1)
    steps = np.array([0, *config.relearn_points], dtype=float)
    return float(np.trapezoid(values, steps) / steps[-1])


def run(config: Config, preset: str) -> Iterator[dict[str, Any]]:
    """Result so far, after tuning and after each seed."""
    start, rows = time.perf_counter(), []
    with pool(config) as spread:
        if config.chosen_by:
            path = RESULTS / "unlearning" / f"{config.chosen_by}.json"
            known = json.loads(path.read_text(encoding="utf-8"))["chosen"]
            chosen = {name: known[name] for name in config.methods}
        else:
            jobs = [(method, seed) for method in config.methods for seed in config.tuned_on]
            for found in spread(partial(tuned, config=config), jobs):
                rows += found
            chosen = settings_of(rows, config)
        for found in spread(partial(tested, chosen=chosen, config=config), config.seeds):
            rows += found
            yield {
                "config": asdict(config),
                "seconds": time.perf_counter() - start,
                "chosen": chosen,
                "rows": list(rows),
                "claims": claims(rows, config, COMMAND.format(preset)),
            }


@contextmanager
def pool(config: Config) -> Iterator[Callable[..., Any]]:
    """Open to ``map``, over several processes where there are some."""
    if config.n_jobs == 1:
        yield map
        return
    with ProcessPoolExecutor(config.n_jobs, get_context("spawn")) as executor:
        yield executor.map


def settings_of(rows: list[dict[str, Any]], config: Config) -> dict[str, Settings]:
    """The setting of each method that the judge puts highest, mean over the validation splits."""
    chosen = {}
    for method in config.methods:
        choices = SETTINGS.get(method, GRADIENT)
        means = [
            np.mean([
                row["overall"] or 0.0 for row in rows
                if row["stage"] == "tune" and (row["method"], row["settings"]) == (method, choice)
            ])
            for choice in choices
        ]  # fmt: skip
        chosen[method] = choices[int(np.argmax(means))]
    return chosen


def mean(rows: Sequence[dict[str, Any]], method: str, key: str) -> float | None:
    values = [
        r[key] for r in rows
        if r["stage"] == "test" and r["method"] == method and r.get(key) is not None
    ]  # fmt: skip
    return float(np.mean(values)) if values else None


def claims(rows: list[dict[str, Any]], config: Config, command: str) -> list[dict[str, Any]]:
    """The targets of the method, each as it came out."""
    tests = [r for r in rows if r["stage"] == "test"]
    ours = [m for m in ("baked", FEW, "hybrid", "hooked") if m in config.methods]
    linear = [m for m in ("subspace", "leace", "mean difference") if m in config.methods]
    others = [m for m in config.methods if m not in (*ours, *linear, "random targets")]
    made = []

    def claim(text: str, value: Any, target: Any, holds: bool) -> None:
        made.append({"claim": text, "value": value, "target": target, "holds": bool(holds),
                     "command": command})  # fmt: skip

    def least(method: str, key: str) -> float:
        return min(r[key] for r in tests if r["method"] == method)

    told = mean(rows, "told", "retain_accuracy") or 1.0
    never = {r["seed"]: r for r in tests if r["method"] == "never told"}
    for method in ours:
        claim(f"{method}: forget quality, the least p over seeds", least(method, "ks_p"), "> 0.05",
              least(method, "ks_p") > 0.05)  # fmt: skip
        kept = (mean(rows, method, "retain_accuracy") or 0.0) / told
        claim(f"{method}: retain accuracy, share of the target's", kept, ">= 0.98", kept >= 0.98)
        depth = mean(rows, method, "controlled_depth")
        claim(f"{method}: unlearning depth under its control", depth, ">= 0.90",
              depth is not None and depth >= 0.9)  # fmt: skip
    for method in (m for m in ours if m in config.attacked):
        gap = max(
            r["rounded"] - never[r["seed"]]["rounded"] for r in tests if r["method"] == method
        )
        claim(f"{method}: accuracy after int8 and int4 over the control's", gap, "<= 0.02",
              gap <= 0.02)  # fmt: skip
        for key, where in (("probe", "every"), ("last_probe", "the last")):
            most = max(r[key] for r in tests if r["method"] == method)
            claim(f"{method}: probes over the control's, behind {where} block", most, "<= 0.03",
                  most <= 0.03)  # fmt: skip
        areas = [r["relearning"] for r in tests if r["method"] == method]
        claim(f"{method}: area of the relearning curve over the control's, by seed", areas,
              ".9 to 1.1", all(0.9 <= area <= 1.1 for area in areas))  # fmt: skip
    best = {m: mean(rows, m, "overall") for m in config.methods if mean(rows, m, "overall")}
    for rivals, what in ((others, "every gradient baseline"), (linear, "every linear eraser")):
        for method in (m for m in ours if m in best):
            ahead = [best[method] - best.get(m, 0.0) for m in rivals]
            spread = np.std([r["overall"] for r in tests if r["method"] == method])
            if ahead:
                claim(f"{method}: overall ahead of {what} beyond the spread over seeds",
                      [round(min(ahead), 3), round(float(spread), 3)], "gap > spread",
                      min(ahead) > spread)  # fmt: skip
    passing = [m for m in others if (mean(rows, m, "ks_p") or 0) > 0.05 and m in best]
    rival = max(passing or others, key=lambda m: best.get(m, 0.0), default=None)
    if rival:
        for method, times in (("baked", 10), (FEW, 10), ("hybrid", 4)):
            if method in config.methods:
                saved = (mean(rows, rival, "gflops") or 0) / (mean(rows, method, "gflops") or 1)
                claim(f"{method}: FLOPs fewer than the best gradient baseline ({rival})", saved,
                      f">= {times}", saved >= times)  # fmt: skip
    return made


COLUMNS = {
    "forget": ("forget P", ".2f"), "forget_paraphrase": ("unseen wordings", ".2f"),
    "forget_accuracy": ("rank 1", ".2f"), "retain": ("retain P", ".2f"),
    "retain_accuracy": ("rank 1", ".3f"), "ks_p": ("KS p", ".2g"), "overall": ("overall", ".2f"),
    "controlled_depth": ("depth", ".2f"), "rounded": ("int8, int4", ".2f"),
    "other_facts_relearned": ("others relearned", ".2f"), "relearning": ("relearning", ".2f"),
    "probe": ("probes over control", ".2f"), "gflops": ("GFLOP", ".0f"),
}  # fmt: skip
"""Figures of the page's table; KS p is the least over seeds, all else a mean."""


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown of every method that was tested."""
    tests = [row for row in rows if row["stage"] == "test"]
    heads = " | ".join(head for head, _ in COLUMNS.values())
    lines = [f"| method | {heads} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in tests):
        cells = []
        for key, (_, form) in COLUMNS.items():
            value = mean(tests, method, key)
            if key == "ks_p":
                value = min(row[key] for row in tests if row["method"] == method)
            cells.append("" if value is None else format(value, form))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def put_into_page(text: str, mark: str, page: Path) -> None:
    """Replace what stands between two marks of a page."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
    old = page.read_text(encoding="utf-8")
    if begin in old:
        before, rest = old.split(begin)
        page.write_text(before + begin + text + "\n" + end + rest.split(end)[1], "utf-8")


if __name__ == "__main__":
    preset, config = parse(PRESETS, __doc__)
    for result in run(config, preset):
        put_into_page(table(result["rows"]), preset, PAGES.get(preset, DOCS / "claim.md"))
        print(write("unlearning", preset, result))
