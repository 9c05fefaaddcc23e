"""Claim: reading costs as little as raw hooks, and editing one layer costs next to nothing.

Measures, interleaved in one run: `capture` against the bare forward pass of the blocks it needs,
and greedy generation under `intervene` at one layer against the unhooked model. Also: hooked and
baked models give the same logits and the same greedy tokens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from cli_from_dataclass import parse, write

import manifold_unlearn as mu
from manifold_unlearn.activations.tokens import batches, encode
from manifold_unlearn.testbed.facts import load_facts, neutral_texts

COMMAND = "python experiments/benchmarks/hooks_cost.py --preset {}"


@dataclass(frozen=True)
class Config:
    """What is timed."""

    model: str = "smollm2-135m"
    layer: int = 14
    """Edited and captured layer."""
    repeats: int = 9
    n_new_tokens: int = 24
    batch: int = 4
    """Prompts generated at once."""
    n_texts: int = 24
    """Texts captured."""
    n_prompts: int = 64
    """Prompts on which hooked and baked models are compared."""


PRESETS = {"quick": Config(), "full": Config(repeats=25, n_new_tokens=64)}


def cpu_seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def interleaved(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> dict:
    """CPU seconds of two functions, one after the other in alternating order."""
    first(), second()
    times = np.zeros((repeats, 2))
    for i in range(repeats):
        for j in (0, 1) if i % 2 else (1, 0):
            times[i, j] = cpu_seconds((first, second)[j])
    ratios = times[:, 1] / times[:, 0]
    return {
        "bare_seconds": float(np.median(times[:, 0])),
        "ours_seconds": float(np.median(times[:, 1])),
        "ratio": float(np.median(times[:, 1]) / np.median(times[:, 0])),
        "ratio_of_minima": float(times[:, 1].min() / times[:, 0].min()),
        "ratios": ratios.round(4).tolist(),
    }


def fitted_eraser(model: Any, tokenizer: Any, site: str) -> Any:
    facts = load_facts()[::6]
    acts = mu.capture(model, tokenizer, [fact.item.question for fact in facts], [site])
    y = torch.tensor([fact.family == facts[0].family for fact in facts])[acts.text_index]
    keep = ~acts.sink & (acts.position > 0)
    eraser = mu.SubspaceEraser("contrastive", 4)
    return eraser.fit(acts[site][keep], y[keep].long(), fixed=acts[site][acts.sink])


def capture_cost(model: Any, tokenizer: Any, config: Config) -> dict:
    texts, site = list(neutral_texts()[: config.n_texts]), f"layers.{config.layer}"
    made = batches(encode(tokenizer, texts))
    blocks = model.model.layers

    def bare() -> None:
        model.model.layers = blocks[: config.layer + 1]
        norm, model.model.norm = model.model.norm, torch.nn.Identity()
        with torch.no_grad():
            for b in made:
                model.model(input_ids=b.input_ids, attention_mask=b.attention_mask,
                            position_ids=b.position_ids, use_cache=False)  # fmt: skip
        model.model.layers, model.model.norm = blocks, norm

    return interleaved(bare, lambda: mu.capture(model, tokenizer, texts, [site]), config.repeats)


def generation_cost(model: Any, tokenizer: Any, eraser: Any, config: Config) -> dict:
    prompts = [fact.item.question for fact in load_facts()[: config.batch]]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")

    def generate() -> Any:
        return model.generate(**inputs, max_new_tokens=config.n_new_tokens,
                              min_new_tokens=config.n_new_tokens, do_sample=False)  # fmt: skip

    def hooked() -> Any:
        with mu.intervene(model, {f"layers.{config.layer}": eraser}):
            return generate()

    return interleaved(generate, hooked, config.repeats)


def parity(model: Any, tokenizer: Any, config: Config) -> dict:
    """Largest difference of hooked and baked logits, and prompts with other greedy tokens."""
    sites = [f"layers.{config.layer}.attn", f"layers.{config.layer}.mlp"]
    maps = {site: fitted_eraser(model, tokenizer, site) for site in sites}
    baked = mu.bake(model, maps)
    facts = load_facts()[:: len(load_facts()) // config.n_prompts][: config.n_prompts]
    prompts = [fact.item.question for fact in facts]
    difference, other, moved = 0.0, 0, 0
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            plain = model(**inputs).logits
            with mu.intervene(model, maps):
                hooked = model(**inputs).logits
                said = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            difference = max(difference, float((hooked - baked(**inputs).logits).abs().max()))
            moved += int(float((hooked - plain).abs().max()) > 1e-2)
            other += not torch.equal(said, baked.generate(**inputs, max_new_tokens=8,
                                                          do_sample=False))  # fmt: skip
    return {"max_logit_difference": difference, "other_tokens": int(other), "prompts": len(prompts),
            "prompts_moved_by_the_edit": moved}  # fmt: skip


def run(config: Config, preset: str) -> dict:
    start = time.perf_counter()
    model, tokenizer = mu.load_model(config.model, prefer_wheel=True)
    eraser = fitted_eraser(model, tokenizer, f"layers.{config.layer}")
    reading = capture_cost(model, tokenizer, config)
    editing = generation_cost(model, tokenizer, eraser, config)
    same = parity(model, tokenizer, config)
    command = COMMAND.format(preset)
    claims = [
        ("capture over the bare forward pass of its layers (CPU)", reading["ratio"], 1.05),
        ("generation hooked at one layer over unhooked (CPU)", editing["ratio"], 1.03),
        ("hooked against baked, largest logit difference", same["max_logit_difference"], 1e-4),
        ("hooked against baked, prompts with other greedy tokens", same["other_tokens"], 0),
    ]
    return {
        "config": asdict(config),
        "seconds": time.perf_counter() - start,
        "rows": [{"name": "capture", **reading}, {"name": "generate", **editing},
                 {"name": "parity", **same}],
        "claims": [{"claim": c, "value": v, "target": t, "holds": bool(v <= t), "command": command}
                   for c, v, t in claims],
    }  # fmt: skip


if __name__ == "__main__":
    preset, config = parse(PRESETS, __doc__)
    print(write("hooks_cost", preset, run(config, preset)))
