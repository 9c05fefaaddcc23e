"""How much of a model do sparse dictionaries of all its layers keep, at how many latents a token?

Dictionaries of every block at several sparsities are trained in one pass over the model, without
storing activations; held-out texts then say what they rebuild, and what the model loses when it
runs on one of them, or on those of all blocks at once. Writes the frontier of sparsity and fidelity
as a picture, and a page of the latents that a forget topic lights up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cli_from_dataclass import RESULTS, parse, write

from manifold_unlearn.activations.models import load_model, resolve_device
from manifold_unlearn.activations.sites import find_decoder
from manifold_unlearn.dictionary import SparseAutoencoder, save
from manifold_unlearn.dictionary.cards import feature_cards
from manifold_unlearn.dictionary.coding import select_latents, select_rows
from manifold_unlearn.dictionary.contexts import find_contexts
from manifold_unlearn.dictionary.corpus import corpus_codes
from manifold_unlearn.dictionary.effects import logit_effects
from manifold_unlearn.dictionary.importance import latent_importance, latent_statistics
from manifold_unlearn.dictionary.labels import label_latents
from manifold_unlearn.dictionary.settings import DictionaryTraining
from manifold_unlearn.dictionary.streams import stream_activations
from manifold_unlearn.dictionary.train import train_dictionaries
from manifold_unlearn.evaluate.dictionary_fidelity import dictionary_fidelities
from manifold_unlearn.evaluate.dictionary_recovery import splice_fidelity
from manifold_unlearn.report.dashboard import FeatureDashboard
from manifold_unlearn.report.dictionary import importance_scatter, sparsity_frontier
from manifold_unlearn.report.steering import dimension_by_layer
from manifold_unlearn.testbed import load_testbed
from manifold_unlearn.testbed.facts import split_by_topic

COMMAND = "python experiments/dictionaries.py --preset {}"


@dataclass(frozen=True)
class Config:
    """The model, the texts, the dictionaries."""

    model: str = "testbed"
    """``testbed``, or what ``load_model`` takes."""
    texts: str = ""
    """JSONL files of text, by comma, for a model that is not the testbed; default: the prose that
    travels with the package."""
    sites: tuple[str, ...] = ()
    """Default: every block."""
    expansion: int = 8
    """Latents for each feature of the stream."""
    ks: tuple[int, ...] = (4, 8, 16, 32)
    nonlinearity: str = "topk"
    n_tokens: int = 400_000
    batch_size: int = 1024
    lr: float = 1e-3
    held_out: float = 0.05
    """Share of the texts that no dictionary reads."""
    n_spliced: int = 200
    """Held-out texts on which the spliced models run."""
    leave_first: bool = False
    """Leave the first token of each text out of the training, and as it is in the spliced models:
    where it becomes the attention sink, blocks before already carry what makes it one."""
    device: str = "auto"
    random_state: int = 0
    checkpoint: str = ""
    """Directory from which an interrupted training goes on."""
    save: str = ""
    """Directory for the dictionaries, one folder each."""
    topic: str = "book-authors"
    """What the page of latents is about, for a model that is not the testbed; there, the people to
    be forgotten."""
    n_shown: int = 40
    """Latents on the page."""
    recovery_target: float = 0.95
    l0_target: int = 32


PRESETS = {
    "quick": Config(),
    "smollm2": Config(
        model="smollm2-135m", expansion=4, ks=(8, 32), n_tokens=300_000, n_spliced=16,
        leave_first=True,
    ),
    "gpu": Config(
        model="smollm2-135m", expansion=16, ks=(16, 32, 64, 128), n_tokens=50_000_000,
        batch_size=4096, lr=4e-4, leave_first=True,
    ),
}  # fmt: skip


def read_texts(config: Config) -> list[str]:
    """What the dictionaries of a model read: passages of at most 64 words."""
    if config.texts:
        found = []
        for path in config.texts.split(","):
            for line in Path(path).read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                found.append(record.get("text") or f"{record['question']} {record['answer']}")
    else:
        prose = resources.files("manifold_unlearn.testbed").joinpath("neutral.txt")
        found = [p for p in prose.read_text("utf-8").split("\n\n") if p.strip()]
    words = [text.split() for text in found]
    return [
        " ".join(w[i : i + 64]) for w in words for i in range(0, len(w), 64) if w[i + 1 : i + 2]
    ]


def opened(config: Config) -> tuple[Any, Any, list[str]]:
    """Model, tokenizer, and all texts."""
    if config.model == "testbed":
        bed = load_testbed("tiny", random_state=config.random_state, device=config.device)
        return bed.told, bed.tokenizer, list(bed.world.texts("told"))
    model, tokenizer = load_model(config.model)
    return model.to(resolve_device(config.device)), tokenizer, read_texts(config)


def split(texts: Sequence[str], config: Config) -> tuple[list[str], list[str]]:
    """Texts to train on, and texts held out, drawn from the seed."""
    order = np.random.default_rng(config.random_state).permutation(len(texts))
    n = max(1, round(config.held_out * len(texts)))
    return [texts[i] for i in order[n:]], [texts[i] for i in order[:n]]


def trained(model: Any, tokenizer: Any, texts: Sequence[str], config: Config) -> tuple[Any, Any]:
    """Dictionaries by ``"site k"``, all of one pass, and the history."""
    n_blocks = len(find_decoder(model).blocks)
    sites = config.sites or tuple(f"layers.{i}" for i in range(n_blocks))
    width = model.config.hidden_size
    named = {f"{site} {k}": (site, k) for k in config.ks for site in sites}
    coders = {
        name: SparseAutoencoder(
            width, config.expansion * width, {"name": config.nonlinearity, "k": k},
            random_state=config.random_state,
        ).to(model.device)
        for name, (site, k) in named.items()
    }  # fmt: skip
    stream = stream_activations(
        model, tokenizer, texts, {name: site for name, (site, _) in named.items()},
        batch_size=config.batch_size, keep_first=not config.leave_first,
        random_state=config.random_state,
    )  # fmt: skip
    training = DictionaryTraining(
        n_tokens=config.n_tokens, lr=config.lr, random_state=config.random_state
    )
    history = train_dictionaries(
        coders, stream, training, checkpoint=config.checkpoint or None, checkpoint_every=200
    )
    for name, coder in coders.items():
        coder.eval().origin = {"site": named[name][0], "model": config.model}
        if config.save:
            save(coder, Path(config.save) / name.replace(" ", "-k"))
    return coders, history


def run(config: Config, preset: str) -> dict[str, Any]:
    """Train, measure on held-out rows, splice one by one and all at once."""
    start = time.perf_counter()
    model, tokenizer, texts = opened(config)
    seen, unseen = split(texts, config)
    coders, history = trained(model, tokenizer, seen, config)
    rows = list(measured(model, tokenizer, coders, unseen, config))
    where = RESULTS / "dictionaries"
    frontier(rows, config).savefig(where / f"{preset}.png", dpi=150)
    if len({row["site"] for row in rows}) > 8:
        by_block(rows, config).savefig(where / f"{preset}_blocks.png", dpi=150)
    latents = page_of(model, tokenizer, coders, texts, config, where / f"{preset}_{{}}")
    return {
        "config": asdict(config),
        "seconds": time.perf_counter() - start,
        "training": {
            "n_tokens": history.n_tokens, "seconds": history.seconds,
            "curve": [asdict(m) for m in history.measured],
        },
        "rows": rows,
        "forget_latents": latents,
    }  # fmt: skip


def frontier(rows: Sequence[dict[str, Any]], config: Config) -> Any:
    """Picture of the loss that comes back against the latents that fire."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for k in config.ks:
        alone = [row["recovery"] for row in rows if row["k"] == k and row["site"] != "all"]
        together = [row["recovery"] for row in rows if row["k"] == k and row["site"] == "all"]
        for name, value in (
            ("One block, the median", float(np.median(alone))),
            ("One block, the worst", min(alone)),
            ("All blocks at once", together[0]),
        ):
            curves.setdefault(name, []).append((k, value))
    return sparsity_frontier(
        curves, label="Loss recovered", better="higher",
        target=(config.l0_target, config.recovery_target),
    )  # fmt: skip


def by_block(rows: Sequence[dict[str, Any]], config: Config) -> Any:
    """Picture of the loss that comes back with the dictionary of each block, a line a k."""
    alone = [row for row in rows if row["site"] != "all"]
    return dimension_by_layer(
        {f"k = {k}": [row["recovery"] for row in alone if row["k"] == k] for k in config.ks},
        layers=[row["site"].rpartition(".")[2] for row in alone if row["k"] == config.ks[0]],
        label="Loss recovered", along="Block", title="One dictionary spliced in",
    )  # fmt: skip


def sides(config: Config) -> tuple[list[str], list[str]]:
    """Texts of the topic that would be forgotten, and of the others."""
    if config.model == "testbed":
        world = load_testbed("tiny", random_state=config.random_state, device="cpu").world
        return list(world.texts("forget")), list(world.texts("retain"))
    facts = split_by_topic(config.topic)
    return [f.item.text for f in facts.forget], [f.item.text for f in (*facts.near, *facts.retain)]


def page_of(
    model: Any, tokenizer: Any, coders: Any, texts: Sequence[str], config: Config, where: Path
) -> list[dict[str, Any]]:
    """Write the page and the picture of the latents that fire on forget rather than on retain.

    Of the last block's dictionary with the largest k within the target.
    """
    k = max(k for k in config.ks if k <= config.l0_target)
    coder = [c for name, c in coders.items() if name.endswith(f" {k}")][-1]
    site = coder.origin["site"]
    forget, retain = sides(config)
    others = [text for text in dict.fromkeys(texts) if text not in {*forget, *retain}]
    shown = [*forget, *retain, *others[: len(retain)]]
    topics = ["forget"] * len(forget) + ["retain"] * len(retain)
    topics += ["other"] * (len(shown) - len(topics))
    corpus = corpus_codes(model, tokenizer, shown, coder, site)
    of = np.array(topics)[corpus.tokens.text_index]
    counted = [
        latent_statistics(select_rows(corpus.code, corpus.counted & torch.from_numpy(of == side)))
        for side in ("forget", "retain")
    ]
    importance = latent_importance(*counted, coder.W_dec)
    chosen = np.argsort(-importance.z)[: config.n_shown].tolist()
    importance_scatter(
        importance.forget.frequency, importance.retain.frequency, chosen=chosen[:12]
    ).savefig(str(where).format("importance.png"), dpi=150)
    contexts = find_contexts(model, tokenizer, shown, coder, site, latents=chosen)
    effects = logit_effects(model, tokenizer, coder, latents=chosen)
    fired = corpus._replace(code=select_latents(corpus.code, chosen))
    labels = label_latents(fired, tokenizer, latents=chosen, topics=topics)
    cards = feature_cards(
        contexts, effects=effects, labels=labels, decoder=coder.W_dec,
        figures={"log-odds": importance.log_odds, "z": importance.z},
    )  # fmt: skip
    about = "people to be forgotten" if config.model == "testbed" else config.topic
    FeatureDashboard(cards, f"Latents of {about}", f"{config.model}, {site}, k = {k}").save(
        str(where).format("latents.html")
    )
    return [
        {"latent": card.latent, "label": card.label, "log_odds": card.figures["log-odds"],
         "fires": card.frequency}
        for card in cards
    ]  # fmt: skip


def measured(
    model: Any, tokenizer: Any, coders: Any, texts: Sequence[str], config: Config
) -> Iterator[dict[str, Any]]:
    """One row a dictionary, then one for all blocks at once at each k."""
    stream = stream_activations(
        model, tokenizer, texts, {name: c.origin["site"] for name, c in coders.items()},
        batch_size=config.batch_size, keep_first=not config.leave_first,
    )  # fmt: skip
    found = dictionary_fidelities(coders, stream)
    for name, coder in coders.items():
        fidelity = found[name]
        row = {"site": coder.origin["site"], "k": int(name.split()[1]), "l0": fidelity.l0,
               "fvu": fidelity.fvu, "dead": fidelity.codes[0].dead}  # fmt: skip
        yield row | recovered(model, tokenizer, {coder.origin["site"]: coder}, texts, config)
    for k in config.ks:
        every = {c.origin["site"]: c for name, c in coders.items() if name.endswith(f" {k}")}
        yield {"site": "all", "k": k} | recovered(model, tokenizer, every, texts, config)


def recovered(
    model: Any, tokenizer: Any, coders: Any, texts: Sequence[str], config: Config
) -> dict[str, Any]:
    """Share of the loss that comes back with the dictionaries spliced in, sinks left alone."""
    spliced = splice_fidelity(
        model, tokenizer, coders, texts[: config.n_spliced], leave_first=config.leave_first,
        sink_ratio=10.0,
    )  # fmt: skip
    return {
        "recovery": spliced.recovery,
        "interval": list(spliced.recovery_interval),
        "recovery_over_mean": spliced.recovery_over_mean,
        "divergence": spliced.divergence.mean,
        "agreement": spliced.agreement.mean,
        "clean_loss": spliced.clean.mean,
        "spliced_loss": spliced.spliced.mean,
    }


def claims(rows: Sequence[dict[str, Any]], config: Config, command: str) -> list[dict[str, Any]]:
    """The target of the issue: loss that comes back at no more latents than it allows."""
    sparse = [row for row in rows if row["k"] <= config.l0_target]
    found = []
    for what, chosen in (
        ("one block, the worst of them", [row for row in sparse if row["site"] != "all"]),
        ("all blocks at once", [row for row in sparse if row["site"] == "all"]),
    ):
        k = max(row["k"] for row in chosen)
        value = min(row["recovery"] for row in chosen if row["k"] == k)
        found.append({
            "claim": f"loss recovered with dictionaries of L0 {k} spliced in: {what}",
            "value": value, "target": f">= {config.recovery_target}",
            "holds": bool(value >= config.recovery_target), "command": command,
        })  # fmt: skip
    return found


def main() -> None:
    preset, config = parse(PRESETS, __doc__)
    result = run(config, preset)
    result["claims"] = claims(result["rows"], config, COMMAND.format(preset))
    print(write("dictionaries", preset, result))


if __name__ == "__main__":
    main()
