"""The demonstration: make a pretrained model forget one topic of plain facts, and show it."""

from __future__ import annotations

import json
import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manifold_unlearn.activations.capture import Activations, capture
from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.activations.models import load_model
from manifold_unlearn.activations.sites import find_decoder
from manifold_unlearn.artifact import write_json
from manifold_unlearn.evaluate.likelihood import greedy_answers, plain
from manifold_unlearn.evaluate.results import Change
from manifold_unlearn.evaluate.separability import separability_by_position
from manifold_unlearn.evaluate.suites import assess
from manifold_unlearn.manifold.diffusion import DiffusionMap
from manifold_unlearn.manifold.neighbors import nearest_neighbors
from manifold_unlearn.pipeline import UnlearnResult, unlearn
from manifold_unlearn.recipe.subspace import SubspaceRecipe
from manifold_unlearn.report import (
    EmbeddingPanel,
    Report,
    before_after_bars,
    embedding_by_site,
    item_slopes,
    separability_heatmap,
)
from manifold_unlearn.testbed.facts import (
    FIT_WORDINGS,
    TEST_WORDING,
    Fact,
    Split,
    halves,
    load_facts,
    neutral_texts,
    split_by_topic,
)

KNOWN_PROBABILITY = 0.1
"""A fact is known whose answer ranks first and has at least this probability."""
NEAR_WEIGHT = 8.0
"""How much near neighbors of the topic count in the fit, against other facts to retain."""
N_PANELS = 9
LAYER_STEP = 3
N_POSITIONS = 3
TARGETS = {"forget": 0.20, "near": 0.85, "retain": 0.95}
"""Share of the answer probability to keep: at most for forget, at least for the others."""
PERPLEXITY_TARGET = 1.03

Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoConfig:
    """What the demonstration does."""

    topic: str = "book-authors"
    """Topic to forget; see ``manifold_unlearn.testbed.facts.topics()``."""
    model: str = "smollm2-135m"
    """Anything :func:`load_model` takes."""
    bake: bool = False
    """Write the edit into the weights and save the model."""
    recipe: SubspaceRecipe = SubspaceRecipe()
    """Where and how to erase; the default is the outcome of ``experiments/erase_sweep.py``."""


@dataclass(frozen=True)
class DemoSets:
    """Known facts by their part: what the fit sees, and the unseen wordings it is tested on."""

    fit_forget: list[Item]
    fit_retain: list[Item]
    test: dict[str, list[Item]]
    left_out: dict[str, int]
    """Facts of each part that the model does not know beforehand."""


def run_demo(
    config: DemoConfig, out: str | Path, *, say: Say
) -> tuple[UnlearnResult, dict[str, Any]]:
    """Forget a topic, measure it, and leave ``metrics.json``, ``report.html`` and ``edit/``.

    Parameters
    ----------
    config : DemoConfig
    out : path
        Directory to write; with ``config.bake`` also ``model/``.
    say : callable
        Told, line by line, what happens.

    Returns
    -------
    result : UnlearnResult
    metrics : dict
        What ``metrics.json`` holds.

    Raises
    ------
    ValueError
        No such topic, or the model knows too little of it.
    """
    start = time.perf_counter()
    split = split_by_topic(config.topic)
    say(f"loading {config.model}")
    model, tokenizer = load_model(config.model, prefer_wheel=True)
    say(f"asking it {len(load_facts())} facts")
    sets = demo_sets(split, known_facts(plain(model), tokenizer))
    n_test = {name: len(items) for name, items in sets.test.items()}
    say(f"it knows {n_test['forget']} of {len(split.forget)} facts of {config.topic}; forgetting")
    result = unlearn(
        model,
        tokenizer,
        sets.fit_forget,
        sets.fit_retain,
        recipe=config.recipe,
        bake=config.bake,
        evaluate_on=sets.test,
        neutral=neutral_texts()[1::2],
    )
    say("drawing the layers")
    pictures = _Pictures.of(model, tokenizer, sets)
    samples = sample_answers(plain(model), result.active, tokenizer, sets.test)
    metrics = {
        **result.metrics,
        "demo": {**asdict(config), "left_out": sets.left_out},
        "verdict": verdict(result),
        "separability": pictures.to_json(),
        "seconds_in_all": round(time.perf_counter() - start, 1),
        "peak_memory_gib": round(peak_memory_gib(), 2),
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads()},
    }
    out = Path(out)
    result.save(out)
    write_json(out / "metrics.json", metrics)
    _report(config, result, metrics, pictures, samples).save(out / "report.html")
    return result, metrics


def known_facts(
    subject: Callable[[], AbstractContextManager[Any]],
    tokenizer: Any,
    facts: Sequence[Fact] | None = None,
) -> list[Fact]:
    """Facts that the model knows, asked in their canonical wording."""
    facts = load_facts() if facts is None else facts
    found = assess(subject, tokenizer, [fact.worded(0) for fact in facts], generate=False)
    known = (found["rank"].values == 1) & (found["probability"].values >= KNOWN_PROBABILITY)
    return [fact for fact, is_known in zip(facts, known, strict=True) if is_known]


def demo_sets(split: Split, known: Sequence[Fact]) -> DemoSets:
    """Sort the known facts into what the fit sees and what it is tested on.

    Of the topic to forget every fact is fitted, in two wordings, and tested in a third (and, for
    comparison, in the canonical wording, which is one of the fitted). Of near
    neighbors and of the rest every other fact is fitted, and the others are tested: neither they
    nor their wording were seen.

    Raises
    ------
    ValueError
        Fewer than four facts of the topic are known, or of the near neighbors or of the rest not
        two of one topic: one to fit, one to test.
    """
    known_set = set(known)
    parts = {
        name: [fact for fact in facts if fact in known_set]
        for name, facts in (
            ("forget", split.forget),
            ("near", split.near),
            ("retain", split.retain),
        )
    }
    seen_near, unseen_near = halves(parts["near"])
    seen_retain, unseen_retain = halves(parts["retain"])
    if len(parts["forget"]) < 4 or not unseen_near or not unseen_retain:
        raise ValueError(
            f"the model knows {len(parts['forget'])} facts of {split.forget[0].topic}, "
            f"{len(parts['near'])} near it and {len(parts['retain'])} others; at least 4, and 2 of "
            "one topic each, are needed. Choose another topic."
        )
    retain = [fact.worded(w) for fact in seen_retain for w in FIT_WORDINGS]
    near = [fact.worded(w) for fact in seen_near for w in FIT_WORDINGS]
    return DemoSets(
        fit_forget=[fact.worded(w) for fact in parts["forget"] for w in FIT_WORDINGS],
        fit_retain=[
            *retain,
            *(replace(item, weight=NEAR_WEIGHT) for item in near),
            *(Item(text) for text in neutral_texts()[::2]),
        ],
        test={
            "forget": [fact.worded(TEST_WORDING) for fact in parts["forget"]],
            "forget, fitted wording": [fact.worded(0) for fact in parts["forget"]],
            "near": [fact.worded(TEST_WORDING) for fact in unseen_near],
            "retain": [fact.worded(TEST_WORDING) for fact in unseen_retain],
        },
        left_out={name: len(getattr(split, name)) - len(facts) for name, facts in parts.items()},
    )


def verdict(result: UnlearnResult) -> list[dict[str, Any]]:
    """Targets of the demonstration beside what was measured."""
    rows = []
    for name, target in TARGETS.items():
        kept = result.changes[name]["probability"].kept
        holds = kept <= target if name == "forget" else kept >= target
        rows.append(
            {"claim": f"{name}: share of probability kept", "value": kept, "target": target,
             "holds": bool(holds)}
        )  # fmt: skip
    ratio = result.metrics["neutral"]["perplexity_ratio"]
    rows.append(
        {"claim": "neutral text: perplexity after over before", "value": ratio,
         "target": PERPLEXITY_TARGET, "holds": ratio <= PERPLEXITY_TARGET}
    )  # fmt: skip
    return rows


def sample_answers(
    before: Callable[[], AbstractContextManager[Any]],
    after: Callable[[], AbstractContextManager[Any]],
    tokenizer: Any,
    test: Mapping[str, Sequence[Item]],
    *,
    n_each: int = 4,
) -> list[dict[str, str]]:
    """Greedy answers to a few prompts of each set, before and after."""
    chosen = [
        (name, item)
        for name, items in test.items()
        for item in [items[i] for i in np.linspace(0, len(items) - 1, n_each).astype(int)]
    ]
    prompts = [item.question for _, item in chosen]
    old, new = (greedy_answers(s, tokenizer, prompts, max_new_tokens=10) for s in (before, after))
    return [
        {"set": name, "prompt": item.question, "answer": item.answer, "before": o, "after": n}
        for (name, item), o, n in zip(chosen, old, new, strict=True)
    ]


def peak_memory_gib() -> float:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if platform.system() == "Darwin" else 2**20)


@dataclass(frozen=True, eq=False)
class _Pictures:
    """What the layers look like before the edit: diffusion maps and separability."""

    panels: list[EmbeddingPanel]
    layers: list[int]
    areas: np.ndarray
    """(n_positions, n_layers): cross-validated AUC of forget against everything else"""

    @classmethod
    def of(cls, model: Any, tokenizer: Any, sets: DemoSets) -> _Pictures:
        items = [*sets.fit_forget, *(i for i in sets.fit_retain if i.answer)]
        layers = list(range(0, len(find_decoder(model).blocks), LAYER_STEP))
        sites = [f"layers.{i}" for i in layers]
        acts = capture(model, tokenizer, [item.question for item in items], sites)
        from_end = _from_end(acts)
        is_forget = acts.text_index < len(sets.fit_forget)
        groups = _fact_index(items)[acts.text_index]
        wordings = _wording_index(_fact_index(items))[acts.text_index]
        usable = ~acts.sink
        areas = [
            separability_by_position(
                acts[site][usable], from_end[usable], is_forget[usable], groups[usable],
                wordings[usable],
                n_positions=N_POSITIONS,
                n_splits=2,
            )
            for site in sites
        ]  # fmt: skip
        rows = (from_end == 0) & usable
        shown = [
            layers[i] for i in np.unique(np.linspace(0, len(layers) - 1, N_PANELS).astype(int))
        ]
        panels = [_panel(f"layers.{i}", acts[f"layers.{i}"][rows], is_forget[rows]) for i in shown]
        return cls(panels, layers, np.array(areas).T)

    def to_json(self) -> dict[str, Any]:
        areas = [[None if np.isnan(a) else round(float(a), 4) for a in row] for row in self.areas]
        return {"rows": self.row_names, "columns": self.layers, "auc": areas}

    @property
    def row_names(self) -> list[str]:
        return ["last token", *(f"{k} before" for k in range(1, len(self.areas)))]


def _panel(site: str, rows: torch.Tensor, is_forget: torch.Tensor) -> EmbeddingPanel:
    """Diffusion map at the scale on which topics hang together, of directions rather than norms."""
    points = torch.nn.functional.normalize(rows.float(), dim=1)
    n = len(points)
    eighth = nearest_neighbors(points, max(1, n // 8)).squared_distances[:, -1]
    fitted = DiffusionMap(
        n_components=2, n_neighbors=n // 2, bandwidth=float(eighth.median()) / 4, random_state=0
    ).fit(points)
    return EmbeddingPanel(site, fitted.embedding_.numpy(), is_forget.numpy())


def _from_end(acts: Activations) -> torch.Tensor:
    """Tokens between each row and the end of its text, for rows of whole texts."""
    lengths = torch.bincount(acts.text_index)
    return lengths[acts.text_index] - 1 - acts.position


def _fact_index(items: Sequence[Item]) -> torch.Tensor:
    """One number a fact: wordings of a fact share topic and wrong answers."""
    keys = [(item.topic, item.answer, item.perturbed_answer) for item in items]
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([number[key] for key in keys])


def _wording_index(facts: torch.Tensor) -> torch.Tensor:
    """Which of its fact's wordings each item is, in the order of the items."""
    seen: dict[int, int] = {}
    found = []
    for fact in facts.tolist():
        found.append(seen.get(fact, 0))
        seen[fact] = found[-1] + 1
    return torch.tensor(found)


def _report(
    config: DemoConfig,
    result: UnlearnResult,
    metrics: Mapping[str, Any],
    pictures: _Pictures,
    samples: Sequence[Mapping[str, str]],
) -> Report:
    probability = {name: change["probability"] for name, change in result.changes.items()}
    quiet = metrics["neutral"]
    form = "baked into the weights" if result.baked else "held in hooks"
    report = Report(f"Forgetting {config.topic}", f"{config.model}, edit {form}")
    report.paragraph(
        f"{len(probability['forget'].before.values)} facts of the topic were fitted in two "
        "wordings and are asked here in a third. Half of the near neighbors and of the other "
        "facts were shown to the fit as what to keep; asked here are those it never saw. "
        f"Left out because the model does not know them: {_counts(metrics['demo']['left_out'])}."
    )
    report.table(*summary_table(result.changes, metrics), caption="What was lost and what was kept")
    report.figure(
        before_after_bars(probability, targets=TARGETS),
        "Mean answer probability before and after, with 95 % bootstrap intervals.",
        alt="Bars of answer probability before and after for forget, near neighbors and retain.",
    )
    report.figure(
        item_slopes(probability),
        "Every fact by itself.",
        alt="Answer probability of each fact before and after.",
    )
    report.paragraph(
        f"Neutral text: perplexity {quiet['perplexity_before']:.2f} before, "
        f"{quiet['perplexity_after']:.2f} after; divergence {quiet['kl']:.4f} nats a token."
    )
    report.heading("Where the topic stands apart")
    report.figure(
        separability_heatmap(
            pictures.areas, pictures.row_names, pictures.layers, row_label="Token of the prompt"
        ),
        "How well a linear probe tells prompts of the topic from all others, on facts and in a "
        "wording that it was not trained on, by layer of the residual stream and by token.",
        alt="Heat map of the area under the ROC curve by layer and token position.",
    )
    report.figure(
        embedding_by_site(pictures.panels),
        "Diffusion maps of the last prompt token, layer by layer, before the edit: rows of unit "
        "length, bandwidth at the distance within which an eighth of the prompts lie.",
        alt="Scatter plots of two diffusion coordinates, forget and retain, for nine layers.",
    )
    report.heading("What it says")
    report.samples(samples, caption="Greedy answers before and after")
    report.heading("Threat model")
    report.paragraph(
        "A hooked edit protects nobody who can run the model without the hook; a baked one stands "
        "in the weights. Neither was attacked here: relearning, quantization, probing and "
        "jailbreaks may bring the answers back, and there is no retrained model to compare with."
    )
    return report.details("Configuration and figures", json.dumps(metrics, indent=2))


def summary_table(
    changes: Mapping[str, Mapping[str, Change]], metrics: Mapping[str, Any]
) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the table that the demonstration prints."""
    columns = ["set", "facts", "probability", "after", "kept", "rank first", "after", "ROUGE-L",
               "after"]  # fmt: skip
    rows: list[list[Any]] = []
    for name, change in changes.items():
        p, rank, rouge = change["probability"], change["rank"], change["rouge_l_recall"]
        rows.append(
            [
                name,
                len(p.before.values),
                f"{p.before.mean:.3f}",
                f"{p.after.mean:.3f}",
                f"{p.kept:.1%}",
                f"{np.mean(rank.before.values == 1):.0%}",
                f"{np.mean(rank.after.values == 1):.0%}",
                f"{rouge.before.mean:.2f}",
                f"{rouge.after.mean:.2f}",
            ]
        )
    quiet = metrics["neutral"]
    blank = [""] * 4
    rows.append(
        ["neutral perplexity", "", f"{quiet['perplexity_before']:.2f}",
         f"{quiet['perplexity_after']:.2f}", f"{quiet['perplexity_ratio']:.1%}", *blank]
    )  # fmt: skip
    return columns, rows


def _counts(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{n} of {name}" for name, n in left_out.items())
