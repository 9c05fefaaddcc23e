"""What in unlearning on the manifold matters?

One thing at a time is changed in an edit by hooks and in a bake: how states are moved, where to,
behind which blocks, by how many landmarks, behind which gate; how the bake is solved, on how many
texts, at which rank it is exported, and which names of nobody were drawn. Everything is measured on
the validation split (other people to forget), as far from what is wanted: the answers that the
model never told gives to what is to be forgotten, those of the told model to the rest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from ablated import Ablated, Settings
from cli_from_dataclass import RESULTS, parse, write
from unlearning import Config as Whole
from unlearning import bed_of, figures, shown, told_sets, world_of

from manifold_unlearn.evaluate import plain
from manifold_unlearn.report import style

COMMAND = "python experiments/ablations.py --preset {}"


@dataclass(frozen=True)
class Config:
    """Where it is measured, and which parts."""

    size: str = "tiny"
    seeds: tuple[int, ...] = (0,)
    parts: tuple[str, ...] = ("hooked", "baked")
    n_draws: int = 5
    """Draws of the invented names, of either part."""
    n_filler: int = 160
    hook_every: int = 2
    """Hooks are fitted on every so many of the texts; bakes on all."""
    n_landmarks: int = 1024
    only: tuple[str, ...] = ()
    """What is changed anew, such as ``blocks``; other rows are kept from the result there is."""


PRESETS = {
    "quick": Config(),
    "full": Config(seeds=(0, 1, 2), hook_every=1),
}

HOOKED: Mapping[str, Mapping[str, Settings]] = {
    "mode": {name: {"mode": name} for name in ("tangent", "geodesic", "diffusion")},
    "target": {
        "same rows, no pairs": {"paired": False},
        "retain": {"target": "retain"},
        "semantic neighbors": {"target": "semantic"},
        "random, as far": {"random_move": True},
    },
    "blocks": {
        "0": {"blocks": (0.0,)},
        "1": {"blocks": (0.25,)},
        "2": {"blocks": (0.5,)},
        "0 1": {"blocks": (0.0, 0.25)},
        "0 1 2 3": {"blocks": (0.0, 0.25, 0.5, 0.75)},
    },
    "landmarks": {str(n): {"n_landmarks": n} for n in (128, 512, 2048)},
    "texts": {
        "all": {"every": 1},
        "all, 2,048 landmarks": {"every": 1, "n_landmarks": 2048},
    },
    "gate": {
        "diffusion, token": {"evidence": "token"},
        "knn, sequence": {"density": "knn"},
        "knn, token": {"density": "knn", "evidence": "token"},
        "linear, sequence": {"density": "linear"},
        "linear, token": {"density": "linear", "evidence": "token"},
        "5 % false alarms": {"false_positive_rate": 0.05},
    },
    "fit": {"in sequence": {"in_sequence": True}},
}  # fmt: skip
"""Changes of the edit by hooks. The recipe takes 2,048 landmarks and all texts."""
BAKED: Mapping[str, Mapping[str, Settings]] = {
    "ridge": {f"{ridge:g}": {"ridge": ridge} for ridge in (0.1, 0.3, 3.0, 10.0)},
    "null space": {
        "90 %": {"null_space": 0.9, "ridge": 0.0},
        "99 %": {"null_space": 0.99, "ridge": 0.0},
        "99 %, ridge 1": {"null_space": 0.99},
    },
    "passes": {
        "2": {"n_passes": 2},
        "3": {"n_passes": 3},
        "3, ridge 10": {"n_passes": 3, "ridge": 10.0},
    },
    "writers": {
        "repair": {"repair": True},
        "attention": {"writers": ("attn",)},
        "both": {"writers": ("mlp", "attn")},
        "both, repair": {"writers": ("mlp", "attn"), "repair": True},
    },
    "blocks": {
        "0": {"layers": (0,)},
        "0 1": {"layers": (0, 1)},
        "1 2 3": {"layers": (1, 2, 3)},
        "3": {"layers": (3,)},
    },
    "target": {
        "what hooks do": {"of_hooks": {}},
        "hooks, a gate a token": {"of_hooks": {"evidence": "token"}},
        "hooks to retain": {"of_hooks": {"target": "retain"}},
        "random, as far": {"random_move": True},
    },
    "retain texts": {
        "1 in 2": {"retain_every": 2},
        "1 in 4": {"retain_every": 4},
        "1 in 10": {"retain_every": 10},
        "half the people": {"retain_people": 0.5},
        "no filler": {"filler": False},
    },
    "forget texts": {
        "5 of 10 wordings": {"forget_every": 2},
        "2 of 10": {"forget_every": 5},
        "1 of 10": {"forget_every": 10},
    },
    "rank": {str(rank): {"rank": rank} for rank in (1, 4, 8, 16, 32, 64)},
    "names a person": {str(n): {"n_names": n} for n in (2, 4)},
}  # fmt: skip
"""Changes of the bake, by what is changed."""
DEFAULT = "default"
DRAW = "draw of names"


def changes(part: str, config: Config) -> list[tuple[str, str, Settings]]:
    """What is changed, to what, and the settings that say so; the default is the first."""
    made: list[tuple[str, str, Settings]] = [(DEFAULT, DEFAULT, {})]
    for what, values in {"hooked": HOOKED, "baked": BAKED}[part].items():
        made += [(what, name, settings) for name, settings in values.items()]
    draws = range(1, config.n_draws)
    made += [(DRAW, str(draw), {"random_state": draw}) for draw in draws]
    return [one for one in made if not config.only or one[0] in config.only]


def distance(now: Mapping[str, float], wanted: Mapping[str, float]) -> float:
    """Mean distance of answer probabilities from those wanted, as told and paraphrased."""
    return float(np.mean([abs(now[name] - value) for name, value in wanted.items()]))


def measured(seed: int, config: Config, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """All changes on the validation split of one world, with told and never told before them."""
    whole = Whole(size=config.size, n_filler=config.n_filler)
    bed = bed_of(whole, world_of(whole, seed).validation_split())
    never, told = shown(plain(bed.never_told), bed), shown(plain(bed.told), bed)
    aim, before = figures(never, never), figures(told, never)
    wanted = {name: aim[name] for name in ("forget", "forget_paraphrase")}
    wanted |= {name: before[name] for name in ("retain", "retain_paraphrase")}
    rows: list[dict[str, Any]] = [
        {"seed": seed, "part": "model", "what": "model", "value": name} | found
        | {"distance": distance(found, wanted)}
        for name, found in (("told", before), ("never told", aim))
    ]  # fmt: skip
    edits = Ablated(bed, *told_sets(bed, whole), config.hook_every, config.n_landmarks)
    for part in config.parts:
        for what, value, settings in changes(part, config):
            row = {"seed": seed, "part": part, "what": what, "value": value, "settings": settings}
            start = time.process_time()
            try:
                subject, gates = edits.subject(part, settings)
            except ValueError as error:  # a gate that cannot tell: nothing is edited
                found, gates = before, {"refused": str(error)}
                seconds = time.process_time() - start
            else:
                seconds = time.process_time() - start
                found = figures(shown(subject, bed), never)
            row |= found | gates | {"distance": distance(found, wanted), "cpu_seconds": seconds}
            rows.append(row)
            progress(f"{seed} {part} {what} {value}: {row['distance']:.3f} {seconds:.1f} s")
    return rows


def run(config: Config, preset: str) -> Iterator[dict[str, Any]]:
    """Result so far, after each seed."""
    torch.set_num_threads(1)
    before: dict[str, Any] = {"rows": [], "seconds": 0.0, "cpu_seconds": 0.0}
    if config.only:
        path = RESULTS / "ablations" / f"{preset}.json"
        before = json.loads(path.read_text(encoding="utf-8"))
    start, cpu_start, rows = time.perf_counter(), time.process_time(), before["rows"]
    for seed in config.seeds:
        found = measured(seed, config, lambda line: print(line, flush=True))
        rows = merged(rows, found, config)
        yield {
            "config": asdict(replace(config, only=())),
            "seconds": before["seconds"] + time.perf_counter() - start,
            "cpu_seconds": before["cpu_seconds"] + time.process_time() - cpu_start,
            "rows": list(rows),
            "claims": claims(rows, COMMAND.format(preset)),
        }


def merged(
    old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], config: Config
) -> list[dict[str, Any]]:
    """Rows in the order of the changes, the new ones in the place of old ones of the same change.

    Old rows of changes that there are no more drop out.
    """
    whole = replace(config, only=())
    order = [("model", "model", "told"), ("model", "model", "never told")]
    order += [(part, *one[:2]) for part in config.parts for one in changes(part, whole)]
    found = {(row["seed"], row["part"], row["what"], row["value"]): row for row in (*old, *new)}
    seeds = dict.fromkeys(seed for seed, *_ in found)
    return [found[seed, *one] for seed in seeds for one in order if (seed, *one) in found]


def mean(rows: Sequence[Mapping[str, Any]], part: str, what: str, value: str) -> dict[str, float]:
    """Means over seeds of one change's figures."""
    mine = [r for r in rows if (r["part"], r["what"], r["value"]) == (part, what, value)]
    names = [name for name, found in mine[0].items() if isinstance(found, float)]
    return {name: float(np.mean([r[name] for r in mine])) for name in names if _all(mine, name)}


def _all(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return all(name in row for row in rows)


def spread(rows: Sequence[Mapping[str, Any]], part: str) -> float:
    """Standard deviation of the distance over the draws of names, the mean of it over seeds."""
    by_seed: dict[int, list[float]] = {}
    for row in rows:
        if row["part"] == part and row["what"] in (DEFAULT, DRAW):
            by_seed.setdefault(row["seed"], []).append(row["distance"])
    return float(np.mean([np.std(found, ddof=1) for found in by_seed.values()]))


RIVALS: tuple[tuple[str, str, dict[str, tuple[str, ...]]], ...] = (
    ("hooked", "a pair for every row beats the same rows without pairs",
     {"target": ("same rows, no pairs",)}),
    ("hooked", "nobody's states beat retain states", {"target": ("retain", "semantic neighbors")}),
    ("hooked", "the move beats one as long in a random direction",
     {"target": ("random, as far",)}),
    ("hooked", "transport beats the other modes", {"mode": tuple(HOOKED["mode"])}),
    ("hooked", "diffusion density beats knn and linear, evidence summed over the text",
     {"gate": ("knn, sequence", "linear, sequence")}),
    ("hooked", "evidence over the text beats evidence of a token",
     {"gate": ("diffusion, token",)}),
    ("hooked", "three blocks beat one", {"blocks": ("0", "1", "2")}),
    ("hooked", "sites fitted on the model as it is beat sites fitted in sequence",
     {"fit": ("in sequence",)}),
    ("hooked", "1,024 landmarks beat 512 and 2,048", {"landmarks": ("512", "2048")}),
    ("baked", "the move beats one as long in a random direction",
     {"target": ("random, as far",)}),
    ("baked", "nobody's states beat what hooks make of the told ones",
     {"target": ("what hooks do", "hooks, a gate a token", "hooks to retain")}),
    ("baked", "the ridge beats the null space", {"null space": ("90 %", "99 %")}),
    ("baked", "all blocks beat some of them", {"blocks": tuple(BAKED["blocks"])}),
    ("baked", "the MLPs alone beat attention alone and both",
     {"writers": ("attention", "both")}),
    ("baked", "one invented name a person beats the mean of several",
     {"names a person": tuple(BAKED["names a person"])}),
)  # fmt: skip
"""Part, what is said of its default, and the changes that it is said against."""
ENOUGH: tuple[tuple[str, str, tuple[str, str]], ...] = (
    ("baked", "half of the wordings of what is to be forgotten do",
     ("forget texts", "5 of 10 wordings")),
    ("baked", "one wording of what is to be forgotten does", ("forget texts", "1 of 10")),
    ("baked", "a quarter of the retain texts does", ("retain texts", "1 in 4")),
    ("baked", "half of the retain people do", ("retain texts", "half the people")),
    ("baked", "an adapter of rank 32 does", ("rank", "32")),
    ("baked", "an adapter of rank 16 does", ("rank", "16")),
    ("baked", "one pass does: three are no better", ("passes", "3")),
)  # fmt: skip
"""Part, what is said to do as well as the default, and the change that says so."""


def claims(rows: list[dict[str, Any]], command: str) -> list[dict[str, Any]]:
    """Each sentence as it came out; a difference counts beyond two spreads over draws of names."""
    made = []
    parts = {row["part"] for row in rows}

    def gap(part: str, what: str, value: str) -> float:
        default = mean(rows, part, DEFAULT, DEFAULT)["distance"]
        return mean(rows, part, what, value)["distance"] - default

    for part, text, rivals in RIVALS:
        if part not in parts:
            continue
        least = min(gap(part, what, value) for what, found in rivals.items() for value in found)
        bar = 2 * spread(rows, part)
        made.append({"claim": f"{part}: {text}, least gap in distance", "value": round(least, 4),
                     "target": f"> {bar:.4f}", "holds": bool(least > bar)})  # fmt: skip
    for part, text, (what, value) in ENOUGH:
        if part not in parts:
            continue
        found, bar = gap(part, what, value), 2 * spread(rows, part)
        other = "passes" in what
        made.append({
            "claim": f"{part}: {text}, gap in distance", "value": round(found, 4),
            "target": f">= {-bar:.4f}" if other else f"<= {bar:.4f}",
            "holds": bool(found >= -bar if other else found <= bar),
        })  # fmt: skip
    for part in (part for part in ("hooked", "baked") if part in parts):
        found = [r["ks_p"] for r in rows if r["part"] == part and r["what"] in (DEFAULT, DRAW)]
        made.append({"claim": f"{part}: forget quality, p of each draw of names",
                     "value": [round(p, 3) for p in found], "target": "all > 0.05",
                     "holds": min(found) > 0.05})  # fmt: skip
    if "hooked" in parts:
        retain_states = ("retain", "semantic neighbors")
        ours = mean(rows, "hooked", DEFAULT, DEFAULT)["ks_p"]
        theirs = [mean(rows, "hooked", "target", value)["ks_p"] for value in retain_states]
        made.append({"claim": "hooked: p of nobody's states, retain states, semantic neighbors",
                     "value": [round(p, 4) for p in (ours, *theirs)],
                     "target": "the first > 0.05, the others not",
                     "holds": ours > 0.05 >= max(theirs)})  # fmt: skip
    return [claim | {"command": command} for claim in made]


def table(result: Mapping[str, Any]) -> str:
    """Markdown of the means over seeds."""
    rows = result["rows"]
    keys = ("forget", "forget_paraphrase", "retain", "retain_paraphrase", "retain_accuracy",
            "ks_p", "distance")  # fmt: skip
    head = ["part", "change", *keys]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for part, what, value in dict.fromkeys((r["part"], r["what"], r["value"]) for r in rows):
        found = mean(rows, part, what, value)
        shown_as = [f"{found[key]:.2g}" if key == "ks_p" else f"{found[key]:.3f}" for key in keys]
        lines.append("| " + " | ".join([part, _label(what, value), *shown_as]) + " |")
    return "\n".join(lines)


def _label(what: str, value: str) -> str:
    return value if what in (DEFAULT, "model") else f"{what}: {value}"


def picture(result: Mapping[str, Any]) -> Any:
    """Answer probabilities of every change, and the distance from what is wanted beside them."""
    rows = result["rows"]
    parts = [part for part in ("hooked", "baked") if any(r["part"] == part for r in rows)]
    orders = {
        part: list(dict.fromkeys((r["what"], r["value"]) for r in rows if r["part"] == part))
        for part in parts
    }
    longest = max(map(len, orders.values()))
    aim, told = (mean(rows, "model", "model", name) for name in ("never told", "told"))
    title = "Unlearning on the manifold, one change at a time"
    with style.new_figure(6.2 * len(parts), 0.25 * longest + 1.9, title) as figure:
        for ax, part in zip(np.ravel(figure.subplots(1, len(parts))), parts, strict=True):
            order = orders[part]
            bar = 2 * spread(rows, part)
            default = mean(rows, part, DEFAULT, DEFAULT)["distance"]
            for place, (what, value) in enumerate(order):
                found = mean(rows, part, what, value)
                for side, color in (("forget", style.FORGET), ("retain", style.RETAIN)):
                    ax.scatter(found[side], place, s=34, color=color, lw=0, zorder=3)
                    ax.scatter(found[f"{side}_paraphrase"], place, s=30, fc="white", ec=color,
                               zorder=2)  # fmt: skip
                near = abs(found["distance"] - default) <= bar
                ink = {"color": style.INK if near else style.MUTED, "ha": "left", "va": "center"}
                bold = {"fontweight": "bold" if near else "normal"}
                style.small_print(
                    ax, f"{found['distance']:.3f}".removeprefix("0"), (1.03, place), (0, 0),
                    **ink, **bold,
                )  # fmt: skip
                if place and order[place - 1][0] != what:
                    ax.axhline(place - 0.5, color=style.RULE, lw=0.8)
            ax.axvline(aim["forget"], **(style.TARGET | {"color": style.FORGET}))
            ax.axvline(told["retain"], **(style.TARGET | {"color": style.RETAIN}))
            ax.set_yticks(range(len(order)), [_label(*one) for one in order])
            ax.set(xlim=(0, 1.12), ylim=(longest - 0.4, -0.6), xlabel="Answer probability")
            ax.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
            ax.set_title(f"{style.sentence(part)}; distance at the right, bold: as the default")
            style.quiet_ticks(ax, ax.xaxis)
        circle: Settings = {"marker": "o", "lw": 0, "ms": 6}
        keys = [
            style.line_key(style.FORGET, "Forget", mew=0, **circle),
            style.line_key(style.RETAIN, "Retain", mew=0, **circle),
            style.line_key(style.INK, "Paraphrased", mfc="white", **circle),
            style.line_key(label="Wanted", **style.TARGET),
        ]
        figure.legend(handles=keys, loc="outside lower center", ncols=len(keys))
    return figure


if __name__ == "__main__":
    preset, config = parse(PRESETS, __doc__)
    for result in run(config, preset):
        path = write("ablations", preset, result)
        drawn = picture(json.loads(path.read_text(encoding="utf-8")))
        drawn.savefig(RESULTS / "ablations" / f"{preset}.png", dpi=90)
        print(table(result), path, sep="\n")
