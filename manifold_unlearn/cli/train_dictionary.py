"""``manifold-unlearn train-dictionary``."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from manifold_unlearn.activations.corpus import read_items
from manifold_unlearn.cli.inputs import Commands, template_of
from manifold_unlearn.cli.table import print_table

CHOICES = ("topk", "batch_topk", "relu", "jumprelu", "gated")
HELD_OUT = 20
"""One text in so many is held out to measure on."""


def register(commands: Commands) -> None:
    """Add the sub-command."""
    command = commands.add_parser(
        "train-dictionary", help="train sparse autoencoders or transcoders of a model's sites"
    )
    command.add_argument("model")
    command.add_argument(
        "--texts", required=True, type=Path, help="JSONL: text, or question+answer"
    )
    command.add_argument("--template", default="{question}")
    command.add_argument(
        "--sites", required=True, nargs="+", metavar="SITE",
        help="a site, or READ->WRITTEN for a transcoder, each a dictionary; all in one pass",
    )  # fmt: skip
    command.add_argument("--latents", type=int, help="default: 8 for each feature")
    command.add_argument("--nonlinearity", default="topk", choices=CHOICES)
    command.add_argument("--k", type=int, default=32, help="latents a token, of topk, batch_topk")
    command.add_argument("--skip", action="store_true", help="a linear way around, of transcoders")
    command.add_argument("--tokens", type=int, default=1_000_000, help="to train on, repeats count")
    command.add_argument("--batch-size", type=int, default=1024)
    command.add_argument("--lr", type=float, help="default: by the number of latents")
    command.add_argument("--sparsity", type=float, help="coefficient of the L1 or L0 penalty")
    command.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    command.add_argument(
        "--keep-first", action="store_true",
        help="read the first token of each text too; default: it is neither trained on nor "
        "replaced in the model that the dictionary is measured in, for it is often the sink",
    )  # fmt: skip
    command.add_argument("--random-state", type=int, default=0)
    command.add_argument("--format", choices=["own", "saelens", "sparsify"], default="own")
    command.add_argument("--out", required=True, type=Path)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Train, measure on held-out texts, save; go on from an interrupted training."""
    from manifold_unlearn.activations.capture import SINK_RATIO
    from manifold_unlearn.activations.models import load_model
    from manifold_unlearn.artifact import write_json
    from manifold_unlearn.dictionary import DictionaryTraining, save
    from manifold_unlearn.dictionary.streams import stream_activations
    from manifold_unlearn.dictionary.train import train_dictionaries
    from manifold_unlearn.evaluate.dictionary_fidelity import dictionary_fidelities
    from manifold_unlearn.evaluate.dictionary_recovery import splice_fidelity

    texts = [item.captured for item in read_items(options.texts, template=template_of(options))]
    seen = [text for i, text in enumerate(texts) if i % HELD_OUT]
    unseen = texts[::HELD_OUT]
    if not seen:
        raise ValueError(
            f"{options.texts} has {len(texts)} text; give at least 2: one is held out."
        )
    training = DictionaryTraining(
        n_tokens=options.tokens,
        lr=options.lr,
        sparsity_coefficient=options.sparsity,
        dtype=options.dtype,
        random_state=options.random_state,
    )
    model, tokenizer = load_model(options.model)
    places = _places(options.sites)
    coders = _untrained(options, model, tokenizer, unseen[0], places)
    how: dict[str, Any] = {
        "batch_size": options.batch_size,
        "keep_first": options.keep_first,
        "random_state": options.random_state,
    }
    train_dictionaries(
        coders,
        stream_activations(model, tokenizer, seen, places, **how),
        training,
        checkpoint=options.out / "checkpoint",
    )
    for coder in coders.values():
        coder.eval()
    found = dictionary_fidelities(
        coders, stream_activations(model, tokenizer, unseen, places, **how)
    )
    rows, figures = [], {}
    for name, coder in coders.items():
        spliced = splice_fidelity(
            model, tokenizer, {name: coder}, unseen,
            leave_first=not options.keep_first, sink_ratio=SINK_RATIO,
        )  # fmt: skip
        use = found[name].codes[0]
        rows.append([name, f"{use.l0:.1f}", found[name].fvu, use.dead, spliced.recovery])
        figures[name] = {"fidelity": found[name].to_json(), "spliced": spliced.to_json()}
        save(coder, options.out / name.replace("->", "_to_"), format=options.format)
    shutil.rmtree(options.out / "checkpoint")
    write_json(options.out / "metrics.json", figures)
    print_table(["site", "L0", "unexplained", "dead", "loss recovered"], rows)
    print(f"wrote {options.out}")


def _places(sites: list[str]) -> dict[str, Any]:
    """Return each dictionary's site, or sites read and written, by the name given."""
    places: dict[str, Any] = {}
    for site in sites:
        read, _, written = site.partition("->")
        places[site] = (read, written) if written else read
    return places


def _untrained(
    options: argparse.Namespace, model: Any, tokenizer: Any, text: Any, places: dict[str, Any]
) -> dict[str, Any]:
    """Return dictionaries as wide as their sites."""
    from manifold_unlearn.activations.capture import capture
    from manifold_unlearn.dictionary import SparseAutoencoder, Transcoder

    shape: dict[str, Any] = {"name": options.nonlinearity}
    if options.nonlinearity in ("topk", "batch_topk"):
        shape["k"] = options.k
    wanted = {site for p in places.values() for site in ((p,) if isinstance(p, str) else p)}
    width = {
        site: rows.shape[1]
        for site, rows in capture(model, tokenizer, [text], sorted(wanted)).items()
    }
    made: dict[str, Any] = {}
    for name, place in places.items():
        read, written = (place, place) if isinstance(place, str) else place
        latents = options.latents or 8 * width[read]
        how = {"random_state": options.random_state}
        if isinstance(place, str):
            made[name] = SparseAutoencoder(width[read], latents, shape, **how)
            made[name].origin = {"site": place}
        else:
            made[name] = Transcoder(
                width[read], latents, width[written], shape, skip=options.skip, **how
            )
            made[name].origin = {"site_in": read, "site_out": written}
        made[name].origin["model"] = options.model
        made[name].to(next(model.parameters()).device)
    return made
