"""What does every metric say of a model that was told, one never told, one with shuffled weights?

The first is the target of unlearning, the second what unlearning should give, the third what it
must not be mistaken for. Reads two checkpoints fine-tuned on TOFU authors, and TOFU's questions.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cli_from_dataclass import parse, write

from manifold_unlearn.activations.corpus import Item, read_items
from manifold_unlearn.activations.models import load_model
from manifold_unlearn.evaluate.aggregate import judge, published_aggregates, utility_aggregate
from manifold_unlearn.evaluate.controls import shuffled_weights
from manifold_unlearn.evaluate.fluency import n_gram_entropy, reference_fluency, repetition
from manifold_unlearn.evaluate.likelihood import answer_log_probabilities, greedy_answers, plain
from manifold_unlearn.evaluate.memorization import (
    knowledge_memorization,
    memorization_of,
    verbatim_memorization,
)
from manifold_unlearn.evaluate.metrics import (
    PUBLISHED_SMOOTHING,
    answer_probability,
    forget_quality,
    harmonic_mean,
    model_utility,
    option_probability,
    truth_ratio,
    truth_ratio_preference,
    truth_ratio_probability,
    truth_ratio_symmetric,
)
from manifold_unlearn.evaluate.multiple_choice import choice_questions, score_choices
from manifold_unlearn.evaluate.privacy import (
    gradient_norms,
    membership_inference,
    membership_scores,
    privacy_leakage,
)
from manifold_unlearn.evaluate.rouge import rouge_l
from manifold_unlearn.evaluate.sampling import leak_at_k, sampled_leakage
from manifold_unlearn.evaluate.suites import ScoredAnswers, score_answers

TEMPLATE = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Config:
    """How much of each set is asked."""

    models: str = "../shared/models/tofu-stories15m"
    """Directory with told/ and never_told/."""
    data: str = "../shared/data/tofu"
    n_forget: int = 24
    n_utility: int = 12
    """Of retain, real authors and world facts each."""
    n_holdout: int = 24
    """Questions that neither model has seen, for membership inference."""
    n_gradients: int = 8
    n_sampled: int = 6
    n_samples: int = 8


PRESETS = {
    "quick": Config(),
    "full": Config(n_forget=200, n_utility=100, n_holdout=200, n_gradients=50, n_sampled=50),
}


def spread(items: list[Item], n: int) -> list[Item]:
    """Evenly chosen, so that every author is among them."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(n, len(items))).astype(int)]


class Sets:
    """What is asked."""

    def __init__(self, config: Config):
        def read(name: str) -> list[Item]:
            return read_items(Path(config.data) / f"{name}.jsonl", template=TEMPLATE)

        n = config.n_utility
        self.forget = spread(read("forget05_perturbed"), config.n_forget)
        self.utility = {
            "retain": spread(read("retain_perturbed")[:400], n),
            "real_authors": spread(read("real_authors_perturbed"), n),
            "world_facts": spread(read("world_facts_perturbed"), n),
        }
        authors = read_items(Path(config.data) / "real_authors_perturbed.jsonl")
        self.short_options = choice_questions(spread(authors, n))
        """real authors: four of TOFU's answers in one prompt exceed the context"""
        retain = read("retain90")
        self.holdout = spread(retain[600:], config.n_holdout)
        self.shots = retain[20:80:20]


class Reference:
    """What the model that was never told says and scores, for comparison with the others."""

    def __init__(self, model: Any, tokenizer: Any, sets: Sets):
        self.subject = plain(model)
        self.said, _ = recall(model, tokenizer, sets.utility["retain"])
        self.losses = [
            membership_scores(self.subject, tokenizer, [item.pair for item in part])["loss"]
            for part in (sets.forget, sets.holdout)
        ]


def ratios(model: Any, tokenizer: Any, items: list[Item]) -> tuple[np.ndarray, ...]:
    """Probability of the answer, truth ratio, probability among the options."""
    pairs = [item.pair for item in items]
    spans = []
    for item in items:
        texts = (item.paraphrased_answer or item.answer, *item.perturbed_answer)
        spans.append((len(pairs), len(pairs) + len(texts)))
        pairs += [Item(item.question, text).pair for text in texts]
    p = answer_probability(
        answer_log_probabilities(plain(model), tokenizer, pairs, include_eos=True)
    )
    ratio = [truth_ratio(p[a], p[a + 1 : b].tolist()) for a, b in spans]
    options = [
        option_probability(p[i], p[a + 1 : b].tolist(), smoothing=PUBLISHED_SMOOTHING)
        for i, (a, b) in enumerate(spans)
    ]
    return p[: len(items)], np.array(ratio), np.array(options)


def recall(model: Any, tokenizer: Any, items: list[Item]) -> tuple[list[str], float]:
    """Greedy answers and their mean ROUGE-L recall."""
    said = greedy_answers(
        plain(model), tokenizer, [item.question for item in items], max_new_tokens=64
    )
    return said, float(rouge_l(said, [item.answer for item in items]).values.mean())


def measure(model: Any, reference: Reference, tokenizer: Any, sets: Sets, config: Config) -> dict:
    """Every metric of one model; arrays that later rows are compared with stand under ``_``."""
    subject, found, start = plain(model), {}, time.perf_counter()
    scored = score_answers(subject, tokenizer, sets.forget, include_eos=True)
    ratio = scored.knowledge["truth_ratio"].values
    for name in ("probability", "paraphrased_answer_probability"):
        found[name] = scored.knowledge[name].mean
    found["truth_ratio_symmetric"] = truth_ratio_symmetric(ratio).mean()
    found["truth_probability"] = truth_ratio_probability(ratio).mean()
    said, found["rouge_l_recall"] = recall(model, tokenizer, sets.forget)
    recited = scored.memorization() | memorization_of(scored.answers, published=True)
    found |= {name: metric.mean for name, metric in recited.items()}
    some = sets.forget[: config.n_utility]
    found["verbatim_memorization"] = verbatim_memorization(
        subject, tokenizer, [item.pair for item in some], max_new_tokens=64
    ).metric.mean
    found["knowledge_memorization"] = knowledge_memorization(
        subject, tokenizer, some, shots=sets.shots[:1]
    ).metric.mean
    asked = {"answer": choice_questions(some), "letter": sets.short_options}
    for scoring, questions in asked.items():
        scores = score_choices(subject, tokenizer, questions, scoring=scoring)
        found[f"choice_accuracy_{scoring}"] = scores.accuracy.mean
        found[f"choice_always_right_{scoring}"] = scores.always_right.mean
    areas = membership(model, scored, reference, tokenizer, sets, config)
    found |= {f"auc_{name}": area.auc for name, area in areas.items()}
    leaked = sampled_leakage(
        subject, tokenizer, sets.forget[: config.n_sampled], config.n_samples, max_new_tokens=32
    )
    for k in (1, config.n_samples):
        found[f"leak_at_{k}"] = leak_at_k(leaked, k).mean()
    nine = {}
    for name, items in sets.utility.items():
        own, kept, options = ratios(model, tokenizer, items)
        nine[f"{name}_probability"] = float((own if name == "retain" else options).mean())
        nine[f"{name}_truth_ratio"] = float(truth_ratio_preference(kept).mean())
        told, nine[f"{name}_rouge"] = recall(model, tokenizer, items)
        if name == "retain":
            found["n_gram_entropy"] = np.mean([n_gram_entropy(text) for text in told])
            found["repetition"] = np.mean([repetition(text) for text in told])
            prompts = [item.question for item in items]
            found["fluency"] = reference_fluency(
                reference.subject, tokenizer, prompts, told, reference.said
            ).mean
    found |= nine
    found["model_utility_of_nine"] = model_utility(nine)
    # a story model knows no real authors: of nine, some are 0 for every model; retain's three stand
    found["model_utility"] = harmonic_mean([nine[n] for n in nine if n.startswith("retain")])
    found = {name: float(value) for name, value in found.items()}
    return found | {"seconds": time.perf_counter() - start, "_ratio": ratio}


def membership(
    model: Any,
    scored: ScoredAnswers,
    reference: Reference,
    tokenizer: Any,
    sets: Sets,
    config: Config,
) -> dict:
    """Areas under the ROC curve, forget against holdout."""
    inside, outside = ([i.pair for i in part] for part in (sets.forget, sets.holdout))
    low, high = scored.membership(), membership_scores(plain(model), tokenizer, outside)
    parts = zip((low, high), (inside, outside), reference.losses, strict=True)
    for scores, part, never_told in parts:
        scores["reference"] = scores["loss"] - never_told
        scores["gradient_norm"] = gradient_norms(
            plain(model), tokenizer, part[: config.n_gradients]
        )
    return {name: membership_inference(low[name], high[name]) for name in low}


def run(config: Config, preset: str) -> dict[str, Any]:
    """Rows of the three models, and the controls as claims."""
    start = time.perf_counter()
    told, tokenizer = load_model(Path(config.models) / "told")
    never_told, _ = load_model(Path(config.models) / "never_told")
    sets = Sets(config)
    models = {"told": told, "never_told": never_told, "shuffled": shuffled_weights(told)}
    reference = Reference(never_told, tokenizer, sets)
    rows = {
        name: measure(model, reference, tokenizer, sets, config) for name, model in models.items()
    }
    target, retrained = (
        {k: v for k, v in rows[n].items() if k != "_ratio"} for n in ("told", "never_told")
    )
    never_knew = rows["never_told"]["_ratio"]
    for row in rows.values():
        row["forget_quality"] = forget_quality(row.pop("_ratio"), never_knew)
        row["privacy_leakage"] = privacy_leakage(row["auc_min_k"], retrained["auc_min_k"])
        parts = {k: v for k, v in row.items() if isinstance(v, float)}
        row["judgement"] = judge(parts, target=target, retrained=retrained).to_json()
        # a causal depth is not measured here: the published form is shown with the best there is
        row["published"] = published_aggregates(
            parts | {"depth": 1.0},
            retrained=retrained,
            target_utility=utility_aggregate(target["model_utility"], target["fluency"]),
        ).to_json()
    command = f"python experiments/metrics_on_checkpoints.py --preset {preset}"
    wanted = {"told": "untouched", "never_told": "forgotten", "shuffled": "destroyed"}
    claims = [
        {
            "claim": f"{name} is judged {verdict}",
            "value": rows[name]["judgement"]["verdict"],
            "target": verdict,
            "holds": rows[name]["judgement"]["verdict"] == verdict,
            "command": command,
        }
        for name, verdict in wanted.items()
    ]
    return {
        "config": asdict(config),
        "seconds": time.perf_counter() - start,
        "rows": [{"model": name, **row} for name, row in rows.items()],
        "claims": claims,
    }


if __name__ == "__main__":
    preset, config = parse(PRESETS, __doc__)
    print(write("metrics_on_checkpoints", preset, run(config, preset)))
