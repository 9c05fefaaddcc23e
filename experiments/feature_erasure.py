"""Does erasing by features of a dictionary come as near to the model never told as the manifold?

Sparse autoencoders of the told model choose latents that fire on what is to be forgotten and
seldom elsewhere. They are clamped, clamped below zero, clamped behind a guardrail, spanned and
erased within their span, suppressed in the weights in closed form, or by fine-tuning. Each is
tuned on the validation split of the world by the judge and judged beside the baked manifold edit.
Crosscoders over told, unlearned and never-told model say what is left.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import unlearning
from cli_from_dataclass import RESULTS, parse, write
from torch import Tensor
from unlearning import Settings, attacked, figures, mean, put_into_page, relearned, shown

from manifold_unlearn.activations.capture import capture
from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.attack.suite import AttackResults, attack_gaps, run_attacks
from manifold_unlearn.dictionary import (
    Crosscoder,
    DecoderSpanEraser,
    DictionaryTraining,
    FeatureEraser,
    FeatureGuardrail,
    SparseAutoencoder,
    residual_knowledge,
    stream_paired,
    stream_rows,
    suppress_features,
    train_dictionaries,
)
from manifold_unlearn.evaluate import plain
from manifold_unlearn.evaluate.forgetting import yardstick
from manifold_unlearn.finetune import FeatureSuppression, TrainConfig, train
from manifold_unlearn.intervene.hooks import intervene
from manifold_unlearn.testbed import Testbed

COMMAND = "python experiments/feature_erasure.py --preset {}"
PAGE = Path(__file__).parents[1] / "docs" / "dictionary" / "erasing.md"
BAKED: Settings = {"ridge": 1.0}
"""As experiments/unlearning.py chose it."""


@dataclass(frozen=True)
class Config:
    """What is compared, and how much of it."""

    size: str = "tiny"
    seed: int = 0
    sites: tuple[str, ...] = ("layers.0", "layers.1", "layers.2")
    d_sae: int = 1024
    k: int = 16
    steps: int = 1500
    """Of training a dictionary, 1024 rows each."""
    crosscoder_steps: int = 500
    attacked: tuple[str, ...] = ("baked", "suppressed, closed form", "suppressed, tuned")
    asked: tuple[str, ...] = ()
    """Methods attacked through prompts and inputs alone, their hooks in place."""
    diffed: tuple[str, ...] = ("baked", "suppressed, tuned")
    diff_site: str = "layers.2"
    n_retain: int = 48
    n_neutral: int = 100
    n_filler: int = 160
    relearn_points: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    relearn_lr: float = 3e-4
    chosen_by: str = ""
    """Preset whose settings are taken instead of tuning anew."""


PRESETS = {
    "quick": Config(),
    "seed_1": Config(seed=1, attacked=(), chosen_by="quick"),
    "seed_2": Config(seed=2, attacked=(), chosen_by="quick"),
    "asked": Config(
        attacked=(), diffed=(), chosen_by="quick",
        asked=("told", "baked", "clamped", "clamped below zero", "guarded", "decoder span",
               "suppressed, closed form", "suppressed, tuned"),
    ),
}  # fmt: skip

SETTINGS: dict[str, tuple[Settings, ...]] = {
    "clamped": (
        {"n": 128, "max_retain": 0.03}, {"n": 256, "max_retain": 0.03},
        {"n": 192, "max_retain": 0.05}, {"n": 256, "max_retain": 0.05},
    ),
    "clamped below zero": (
        {"n": 32, "value": -1.0}, {"n": 32, "value": -4.0}, {"n": 64, "value": -1.0},
        {"n": 64, "value": -2.0},
    ),
    "guarded": (
        {"n": 32, "value": -4.0, "rate": 0.05}, {"n": 32, "value": -4.0, "rate": 0.2},
        {"n": 64, "value": -2.0, "rate": 0.05}, {"n": 64, "value": -2.0, "rate": 0.2},
    ),
    "decoder span": (
        {"n": 32, "method": "leace", "rank": 1}, {"n": 32, "method": "contrastive", "rank": 4},
        {"n": 32, "method": "contrastive", "rank": 8}, {"n": 4, "method": "all", "rank": 1},
    ),
    "suppressed, closed form": (
        {"n": 128, "value": 0.0, "ridge": 1.0}, {"n": 128, "value": -1.0, "ridge": 1.0},
        {"n": 64, "value": -1.0, "ridge": 1.0}, {"n": 128, "value": -1.0, "ridge": 3.0},
    ),
    "suppressed, tuned": (
        {"n": 128, "alpha": 1.0, "lr": 1e-3}, {"n": 128, "alpha": 10.0, "lr": 2e-3},
        {"n": 128, "alpha": 30.0, "lr": 2e-3}, {"n": 64, "alpha": 10.0, "lr": 2e-3},
    ),
}  # fmt: skip
"""Four settings of each method. A latent fires in at least .2 % of the forget tokens, for few
latents speak of more than one of the people."""

ASKED = {
    "prefill": "first words of the answer given", "few_shot": "few shots",
    "paraphrase": "other wordings", "framing": "framings", "sample": "8 samples",
    "soft_prompt": "soft prompt", "latent": "latent", "gcg": "GCG",
}  # fmt: skip
"""Attacks that touch no weights, and their names on the page."""

Rows = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Given:
    """What every method is given: texts, their rows at the sites, and the dictionaries."""

    bed: Testbed
    forget: list[Item]
    retain: list[Item]
    rows: Rows
    y: Tensor
    text: Tensor
    coders: dict[str, SparseAutoencoder]


def rows_of(bed: Testbed, items: Sequence[Item], sites: Sequence[str]) -> tuple[Rows, Tensor]:
    """Rows of the told model by site, sinks and first tokens left out, and their texts."""
    read = capture(bed.told, bed.tokenizer, [item.captured for item in items], list(sites))
    own = ~(read.sink | read.special | (read.position == 0))
    return {site: read[site][own].float() for site in sites}, read.text_index[own]


def given_of(bed: Testbed, coders: dict[str, SparseAutoencoder], config: Config) -> Given:
    forget, retain = unlearning.told_sets(bed, config)  # type: ignore[arg-type]
    rows, text = rows_of(bed, [*forget, *retain], config.sites)
    return Given(bed, forget, retain, rows, (text < len(forget)).long(), text, coders)


def dictionaries(beds: Sequence[Testbed], config: Config) -> dict[str, SparseAutoencoder]:
    """One dictionary a site of the told model, on all that was told; who forgets is not known."""
    items = {i.text: i for bed in beds for part in unlearning.told_sets(bed, config) for i in part}  # type: ignore[arg-type]
    rows, _ = rows_of(beds[0], list(items.values()), config.sites)
    shape = {"name": "topk", "k": config.k}
    coders = {
        site: SparseAutoencoder(part.shape[1], config.d_sae, shape, random_state=0)
        for site, part in rows.items()
    }
    training = DictionaryTraining(n_steps=config.steps, lr=1e-3, log_every=config.steps)
    history = train_dictionaries(coders, stream_rows(dict(rows)), training)
    for site, coder in coders.items():
        print(site, history.of(site)[-1], flush=True)
        coder.eval()
    return coders


def eraser(given: Given, site: str, settings: Settings, *, fit: bool = True) -> FeatureEraser:
    how = {"min_forget_rate": 0.002, "max_retain_rate": settings.get("max_retain", 0.03)}
    made = FeatureEraser(given.coders[site], settings["n"], value=settings.get("value", 0.0), **how)
    return made.fit(given.rows[site], given.y) if fit else made


def unlearned(given: Given, method: str, settings: Settings) -> Any:
    """Opens to the model that a method makes of the told one."""
    bed, maps = given.bed, {}
    if method == "baked":
        return unlearning.unlearned(bed, "baked", settings, unlearning.Config())
    for site, rows in given.rows.items():
        if method == "guarded":
            maps[site] = FeatureGuardrail(
                eraser(given, site, {"max_retain": 0.01, **settings}, fit=False),
                false_positive_rate=settings["rate"], min_tokens=8, random_state=0,
            ).fit(rows, given.y, sequence=given.text)  # fmt: skip
        elif method == "decoder span":
            maps[site] = DecoderSpanEraser(
                given.coders[site], settings["n"], min_forget_rate=0.002, max_retain_rate=0.03,
                method=settings["method"], rank=settings["rank"],
            ).fit(rows, given.y)  # fmt: skip
        else:
            maps[site] = eraser(given, site, settings)
    texts = [[item.captured for item in side] for side in (given.forget, given.retain)]
    if method == "suppressed, closed form":
        return plain(
            suppress_features(bed.told, bed.tokenizer, *texts, maps, ridge=settings["ridge"]).model
        )
    if method == "suppressed, tuned":
        rule = FeatureSuppression(maps, alpha=settings["alpha"])
        training = TrainConfig(lr=settings["lr"], steps=60, batch_size=16, weight_decay=0.0)
        sides = (given.forget, given.retain)
        return plain(train(bed.told, bed.tokenizer, *sides, objective=rule, config=training).model)
    return lambda: intervene(bed.told, maps)


def tuned(given: Given, config: Config) -> list[dict[str, Any]]:
    """All settings of all methods on the validation split."""
    bed = given.bed
    never, told = plain(bed.never_told), plain(bed.told)
    sets = unlearning.sets_of(bed, config)  # type: ignore[arg-type]
    yard = yardstick(bed.tokenizer, sets, reference=never, target=told)
    goal, rows = shown(never, bed), []
    for method, choices in SETTINGS.items():
        for settings in choices:
            row: dict[str, Any] = {"stage": "tune", "method": method, "settings": settings}
            try:
                subject = unlearned(given, method, settings)
                judged = yard.report(subject).judgement
                row |= figures(shown(subject, bed), goal)
                row["overall"] = judged.aggregates.overall if judged else None
            except (FloatingPointError, ValueError) as error:
                row |= {"overall": None, "error": str(error)}
            rows.append(row)
            print(f"tune {method} {settings}: {row['overall']}", flush=True)
    return rows


def settings_of(rows: list[dict[str, Any]]) -> dict[str, Settings]:
    """The setting of each method that the judge puts highest; what was kept breaks ties."""
    best = {"baked": BAKED}
    for method, choices in SETTINGS.items():
        of = {str(r["settings"]): r for r in rows if r["method"] == method}

        def worth(choice: Settings, of: dict[str, Any] = of) -> tuple[float, float]:
            row = of[str(choice)]
            return row["overall"] or 0.0, -abs(row.get("forget", 1.0) - 0.08)

        best[method] = max(choices, key=worth)
    return best


def tested(
    given: Given, chosen: dict[str, Settings], config: Config
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Every method, told and never told beside it, with the model it made."""
    bed = given.bed
    never, told = plain(bed.never_told), plain(bed.told)
    sets = unlearning.sets_of(bed, config)  # type: ignore[arg-type]
    yard = yardstick(bed.tokenizer, sets, reference=never, target=told)
    goal = shown(never, bed)
    control = relearned(bed.never_told, bed, config) if config.attacked else 1.0  # type: ignore[arg-type]
    for method in ("told", "never told", *chosen):
        start = time.process_time()
        subject = {"told": told, "never told": never}.get(method)
        subject = subject or unlearned(given, method, chosen[method])
        seconds = time.process_time() - start
        report = yard.report(subject)
        row: dict[str, Any] = {"stage": "test", "seed": config.seed, "method": method}
        row |= figures(shown(subject, bed), goal) | {"cpu_seconds": seconds}
        if report.judgement is not None:
            row |= {"verdict": report.judgement.verdict, **asdict(report.judgement.aggregates)}
        row |= report.profiles["model"].figures["depth"]
        row["perplexity"] = report.profiles["model"].figures["neutral"]["perplexity"]
        if method in config.attacked or (config.attacked and method == "never told"):
            with subject() as model:
                row |= attacked(model, bed, config)  # type: ignore[arg-type]
                row["relearning"] = relearned(model, bed, config) / control  # type: ignore[arg-type]
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        yield row, subject


def asked(given: Given, subjects: dict[str, Any], config: Config) -> Iterator[dict[str, Any]]:
    """What prompts and inputs get out of each method over what they get out of never told."""
    bed = given.bed

    def run(subject: Any) -> AttackResults:
        with subject() as model:
            return run_attacks(
                model, bed.tokenizer, bed.world.forget, bed.world.retain[:100], ending="\nAnswer:",
                only=tuple(ASKED), random_state=config.seed,
            )  # fmt: skip

    reference = run(subjects["never told"])
    for method in config.asked:
        gaps = {gap.attack: asdict(gap) for gap in attack_gaps(run(subjects[method]), reference)}
        row = {"stage": "asked", "seed": config.seed, "method": method, "gaps": gaps}
        print(method, {name: round(gap["gap"], 3) for name, gap in gaps.items()}, flush=True)
        yield row


def residual(given: Given, method: str, subject: Any, config: Config) -> dict[str, Any]:
    """What of the forgotten people a crosscoder over three models finds in the unlearned one."""
    bed, site = given.bed, config.diff_site
    texts = [item.captured for item in (*given.forget, *given.retain)]
    with subject() as model:
        models = [bed.told, model, bed.never_told]
        crosscoder = Crosscoder(
            3, model.config.hidden_size, config.d_sae, {"name": "topk", "k": config.k},
            random_state=0,
        )  # fmt: skip
        stream = stream_paired(models, bed.tokenizer, texts, site)
        training = DictionaryTraining(n_steps=config.crosscoder_steps, lr=1e-3, log_every=100)
        history = train_dictionaries(crosscoder, stream, training)
        read = [capture(one, bed.tokenizer, texts, site) for one in models]
    own = torch.stack([~(r.sink | r.special | (r.position == 0)) for r in read]).all(0)
    rows = torch.stack([r[site][own].float() for r in read], dim=1)
    text = read[0].text_index[own]
    forget = text < len(given.forget)
    people = {name: i for i, name in enumerate({item.topic: 0 for item in given.forget})}
    of = torch.tensor([people[item.topic] for item in given.forget])
    row: dict[str, Any] = {"stage": "diff", "method": method, "fvu": history.of("")[-1].fvu}
    try:
        found = residual_knowledge(
            crosscoder.eval(), rows[forget], of[text[forget]], [rows[~forget]],
            min_forget_rate=0.002,
        )  # fmt: skip
    except ValueError as error:
        return row | {"n_latents": 0, "error": str(error)}
    row |= {"n_latents": len(found.latents), "n_still_there": len(found.still_there())}
    return row | {"share": found.total._asdict(), "alone": found.alone._asdict()}


def run(config: Config, preset: str) -> Iterator[dict[str, Any]]:
    """Result so far, after every method."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    world = unlearning.world_of(config, config.seed)  # type: ignore[arg-type]
    beds = [unlearning.bed_of(config, w) for w in (world, world.validation_split())]  # type: ignore[arg-type]
    coders = dictionaries(beds, config)
    rows: list[dict[str, Any]] = []
    if config.chosen_by:
        known = RESULTS / "feature_erasure" / f"{config.chosen_by}.json"
        chosen = json.loads(known.read_text(encoding="utf-8"))["chosen"]
    else:
        rows = tuned(given_of(beds[1], coders, config), config)
        chosen = settings_of(rows)
    given, subjects = given_of(beds[0], coders, config), {}

    def result() -> dict[str, Any]:
        return {
            "config": asdict(config), "seconds": time.perf_counter() - start, "chosen": chosen,
            "rows": list(rows), "claims": claims(rows, config, COMMAND.format(preset)),
        }  # fmt: skip

    for row, subject in tested(given, chosen, config):
        rows.append(row)
        subjects[row["method"]] = subject
    yield result()
    for row in asked(given, subjects, config) if config.asked else ():
        rows.append(row)
        yield result()
    for method in config.diffed:
        rows.append(residual(given, method, subjects[method], config))
        print(rows[-1], flush=True)
        yield result()


def claims(rows: list[dict[str, Any]], config: Config, command: str) -> list[dict[str, Any]]:
    """What was hoped for, each as it came out."""
    made: list[dict[str, Any]] = []

    def claim(text: str, value: Any, target: str, holds: bool) -> None:
        made.append({"claim": text, "value": value, "target": target, "holds": bool(holds),
                     "command": command})  # fmt: skip

    told = mean(rows, "told", "retain_accuracy") or 1.0
    never = next(r for r in rows if r.get("method") == "never told")
    for method in SETTINGS:
        p = mean(rows, method, "ks_p") or 0.0
        claim(f"{method}: forget quality p", p, "> 0.05", p > 0.05)
        kept = (mean(rows, method, "retain_accuracy") or 0.0) / told
        claim(f"{method}: retain accuracy, share of the target's", kept, ">= 0.98", kept >= 0.98)
    baked = mean(rows, "baked", "overall") or 0.0
    for method in SETTINGS:
        own = mean(rows, method, "overall") or 0.0
        claim(f"{method}: overall beside the baked manifold edit's", [own, baked], "own >= baked",
              own >= baked)  # fmt: skip
    for method in config.attacked:
        row = next(r for r in rows if r["stage"] == "test" and r["method"] == method)
        gap = row["rounded"] - never["rounded"]
        claim(f"{method}: accuracy after int8 and int4 over the control's", gap, "<= 0.02",
              gap <= 0.02)  # fmt: skip
        area = row["relearning"]
        claim(f"{method}: area of the relearning curve over the control's", area, ".9 to 1.1",
              0.9 <= area <= 1.1)  # fmt: skip
    for row in rows:
        if row["stage"] == "diff" and "share" in row:
            share = row["share"]["value"]
            claim(f"{row['method']}: share of the target's own latents still carried", share,
                  "<= 0.1", share <= 0.1)  # fmt: skip
    return made


COLUMNS = {
    "forget": ("forget P", ".2f"), "forget_accuracy": ("rank 1", ".2f"),
    "retain": ("retain P", ".2f"), "retain_accuracy": ("rank 1", ".3f"), "ks_p": ("KS p", ".2g"),
    "overall": ("overall", ".2f"), "controlled_depth": ("depth", ".2f"),
    "rounded": ("int8, int4", ".2f"), "relearning": ("relearning", ".2f"),
    "share": ("still carried", ".2f"), "cpu_seconds": ("CPU s", ".0f"),
    "verdict": ("verdict", "s"),
}  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown of every method that was tested, or of the attacks through prompts."""
    if gaps := {row["method"]: row["gaps"] for row in rows if row["stage"] == "asked"}:
        lines = [f"| attack | {' | '.join(gaps)} |", "|---" * (len(gaps) + 1) + "|"]
        for attack, name in ASKED.items():
            cells = [f"{of[attack]['gap']:+.2f}" for of in gaps.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines)
    shares = {r["method"]: r["share"]["value"] for r in rows if "share" in r}
    heads = " | ".join(head for head, _ in COLUMNS.values())
    lines = [f"| method | {heads} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in (row for row in rows if row["stage"] == "test"):
        known = row | ({"share": shares[row["method"]]} if row["method"] in shares else {})
        cells = [
            "" if known.get(key) is None else format(known[key], form)
            for key, (_, form) in COLUMNS.items()
        ]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    preset, config = parse(PRESETS, __doc__)
    for result in run(config, preset):
        if PAGE.exists():
            put_into_page(table(result["rows"]), preset, PAGE)
        print(write("feature_erasure", preset, result))
