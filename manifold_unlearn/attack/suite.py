"""All attacks on one model in one call, and their gains beside the model that was never told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm.auto import tqdm

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.attack.ablation import ablation_attack
from manifold_unlearn.attack.gcg import GCGConfig, gcg_attack
from manifold_unlearn.attack.knowledge import accuracy_of, probability_of
from manifold_unlearn.attack.latent import LatentConfig, latent_attack
from manifold_unlearn.attack.prompts import (
    few_shot_attack,
    framing_attack,
    paraphrase_attack,
    prefill_attack,
)
from manifold_unlearn.attack.quantize import quantization_attack
from manifold_unlearn.attack.relearn import QUICK, disjoint_facts_attack, relearning_attack
from manifold_unlearn.attack.results import AttackCurve
from manifold_unlearn.attack.sampled import sampling_attack
from manifold_unlearn.attack.soft_prompt import SoftPromptConfig, soft_prompt_attack
from manifold_unlearn.evaluate.likelihood import plain
from manifold_unlearn.evaluate.results import paired_difference
from manifold_unlearn.finetune.train import TrainConfig


@dataclass(frozen=True)
class Budget:
    """Compute of every attack; the same for every model that is compared."""

    points: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    """Gradient steps of relearning after which is measured."""
    training: TrainConfig = QUICK
    rates: tuple[float, ...] = (1e-4, 1e-3)
    """Learning rates tried; the curve whose best point shows most counts, for every model; of equal
    ones the higher on average."""
    n_folds: int = 3
    """Of relearning on disjoint facts."""
    samples: tuple[int, ...] = (1, 2, 4, 8)
    n_optimized: int = 16
    """Items for which prompts and perturbations are optimized, the first of those given."""
    gcg: GCGConfig = field(default_factory=GCGConfig)
    soft_prompt: SoftPromptConfig = field(default_factory=SoftPromptConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)


BUDGETS = {
    "quick": Budget(),
    "full": Budget(
        points=(1, 2, 5, 10, 20, 50, 100, 200),
        rates=(1e-5, 1e-4, 1e-3),
        n_folds=5,
        samples=(1, 2, 4, 8, 16, 32, 64),
        n_optimized=100,
        gcg=GCGConfig(n_tokens=20, n_steps=250, search_width=256, top_k=128, points=(10, 50, 100)),
        soft_prompt=SoftPromptConfig(n_tokens=10, steps=(1, 5, 10, 20, 50, 100)),
        latent=LatentConfig(n_steps=20, n_bisections=5),
    ),
}


@dataclass(frozen=True, eq=False)
class AttackResults:
    """The attacks on one model.

    Attributes
    ----------
    curves : dict of str to AttackCurve
        By the suite's name of the attack.
    left_out : dict of str to str
        Attacks that the data do not allow, and what they lack.
    seconds : dict of str to float
        Wall time of every attack that ran.
    """

    curves: dict[str, AttackCurve]
    left_out: dict[str, str]
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Curves, what was left out, and seconds."""
        curves = {name: curve.to_json() for name, curve in self.curves.items()}
        return {"curves": curves, "left_out": self.left_out, "seconds": self.seconds}


def run_attacks(
    model: Any,
    tokenizer: Any,
    forget: Sequence[Item],
    retain: Sequence[Item],
    *,
    original: Any | None = None,
    unrelated: Sequence[str] = (),
    ending: str = "",
    budget: Budget | None = None,
    only: Sequence[str] = (),
    random_state: int = 0,
) -> AttackResults:
    r"""Attack a model in every way the suite knows.

    Run it with the same arguments on the model that was never told: what an attack gives there,
    it does not bring back but teach.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Left bit-identical and without hooks.
    tokenizer : transformers.PreTrainedTokenizerBase
    forget : sequence of Item
        Questions with answers. With perturbed answers throughout, knowledge is the share of
        answers that rank first among them, else their probability.
    retain : sequence of Item
        Shots, and the reference of the ablated directions.
    original : transformers.PreTrainedModel, optional
        The model before it was made to forget, if the attacker has it.
    unrelated : sequence of str
        Texts on other matters, to relearn on.
    ending : str, default=""
        What ends every prompt, behind which no optimized suffix can stand: of the template
        ``"Question: {question}\nAnswer:"`` it is ``"\nAnswer:"``.
    budget : Budget, optional
        Default: ``BUDGETS["quick"]``.
    only : sequence of str
        Names of attacks, of ``ATTACKS``; default: all.
    random_state : int

    Raises
    ------
    ValueError
        No forget or retain items, one without an answer, or an unknown name.
    """
    for name, items in (("forget", forget), ("retain", retain)):
        if not items:
            raise ValueError(f"{name} is empty; give at least one question with its answer.")
        if without := [i for i, item in enumerate(items) if not item.answer]:
            raise ValueError(
                f"{name} item {without[0]} has no answer ({len(without)} of {len(items)}); attacks "
                "ask questions. Leave plain texts out."
            )
    if unknown := [name for name in only if name not in ATTACKS]:
        raise ValueError(f"no attack {unknown[0]!r}; there are {', '.join(ATTACKS)}.")
    target = _Target(
        model, tokenizer, tuple(forget), tuple(retain), original, tuple(unrelated), ending,
        budget or BUDGETS["quick"], random_state,
    )  # fmt: skip
    results = AttackResults({}, {}, {})
    progress = tqdm(only or ATTACKS, desc="attacks", unit="attack", disable=None, leave=False)
    for name in progress:
        progress.set_postfix_str(name)
        if lacking := target.lacking(name):
            results.left_out[name] = lacking
            continue
        start = time.perf_counter()
        results.curves[name] = ATTACKS[name](target)
        results.seconds[name] = round(time.perf_counter() - start, 2)
    return results


@dataclass(frozen=True, eq=False)
class _Target:
    """A model under attack, and what the attacker has."""

    model: Any
    tokenizer: Any
    forget: tuple[Item, ...]
    retain: tuple[Item, ...]
    original: Any | None
    unrelated: tuple[str, ...]
    ending: str
    budget: Budget
    seed: int

    @property
    def ranked(self) -> bool:
        return all(item.perturbed_answer for item in self.forget)

    @property
    def measure(self) -> Callable[[Sequence[Item]], Any]:
        return accuracy_of if self.ranked else probability_of

    @property
    def knowledge(self) -> Any:
        return self.measure(self.forget)

    @property
    def optimized(self) -> tuple[Item, ...]:
        return self.forget[: self.budget.n_optimized]

    def lacking(self, name: str) -> str:
        """What the data lack for an attack; empty where nothing."""
        if name == "paraphrase" and not all(item.paraphrased_question for item in self.forget):
            return "forget items without paraphrased_question"
        if name == "relearn_unrelated" and not self.unrelated:
            return "unrelated texts"
        if name == "relearn_disjoint" and len(self.forget) < self.budget.n_folds:
            return f"at least {self.budget.n_folds} forget items"
        return ""

    def relearn(self, material: Sequence[Any], name: str) -> AttackCurve:
        return self.best_rate(
            lambda config: relearning_attack(
                self.model,
                self.tokenizer,
                self.knowledge,
                material,
                name=name,
                points=self.budget.points,
                config=config,
            )
        )

    def disjoint(self) -> AttackCurve:
        return self.best_rate(
            lambda config: disjoint_facts_attack(
                self.model,
                self.tokenizer,
                self.forget,
                original=self.original,
                measure=self.measure,
                n_folds=self.budget.n_folds,
                points=self.budget.points,
                config=config,
                random_state=self.seed,
            )
        )

    def best_rate(self, attack: Callable[[TrainConfig], AttackCurve]) -> AttackCurve:
        rates = self.budget.rates
        tried = [attack(replace(self.budget.training, lr=rate)) for rate in rates]
        best = max(range(len(rates)), key=lambda i: (tried[i].best.mean, tried[i].values.mean()))
        means = {str(rate): curve.best.mean for rate, curve in zip(rates, tried, strict=True)}
        details = {**tried[best].details, "lr": rates[best], "best_of_rate": means}
        return replace(tried[best], details=details)

    def ablate(self) -> AttackCurve:
        return ablation_attack(
            self.model,
            self.tokenizer,
            self.knowledge,
            forget=[item.pair for item in self.forget],
            other=self.original,
            retain=[item.pair for item in self.retain],
            random_state=self.seed,
        )

    def asked(self, attack: Callable[..., AttackCurve], *more: Any, **how: Any) -> AttackCurve:
        return attack(plain(self.model), self.tokenizer, self.forget, *more, **how)

    def optimize(self, attack: Callable[..., AttackCurve], config: Any, **how: Any) -> AttackCurve:
        config = replace(config, **how)
        return attack(
            self.model, self.tokenizer, self.optimized, config=config, random_state=self.seed
        )


ATTACKS: Mapping[str, Callable[[_Target], AttackCurve]] = {
    "relearn": lambda t: t.relearn(t.forget, "forget data"),
    "relearn_disjoint": _Target.disjoint,
    "relearn_unrelated": lambda t: t.relearn(t.unrelated, "unrelated text"),
    "quantize": lambda t: quantization_attack(t.model, t.tokenizer, t.knowledge),
    "ablate": _Target.ablate,
    "prefill": lambda t: t.asked(prefill_attack),
    "few_shot": lambda t: t.asked(few_shot_attack, t.retain, random_state=t.seed),
    "paraphrase": lambda t: t.asked(paraphrase_attack),
    "framing": lambda t: t.asked(framing_attack),
    "sample": lambda t: t.asked(sampling_attack, k=t.budget.samples, random_state=t.seed),
    "soft_prompt": lambda t: t.optimize(soft_prompt_attack, t.budget.soft_prompt, ending=t.ending),
    "latent": lambda t: t.optimize(latent_attack, t.budget.latent),
    "gcg": lambda t: t.optimize(gcg_attack, t.budget.gcg, ending=t.ending),
}
"""The attacks of the suite, in the order they run."""


@dataclass(frozen=True, eq=False)
class AttackGap:
    """What an attack shows of a model at its best point, less the same of the reference.

    ``interval`` is the 95 % bootstrap interval of ``gap``, items resampled in pairs.
    """

    attack: str
    metric: str
    before: float
    best: float
    reference_before: float
    reference_best: float
    gap: float
    interval: tuple[float, float]


def attack_gaps(results: AttackResults, reference: AttackResults) -> list[AttackGap]:
    """Every attack that ran on both models, the worst gap first.

    Raises
    ------
    ValueError
        An attack was run with another metric, compute or set of items on the two models.
    """
    gaps = []
    for name, curve in results.curves.items():
        other = reference.curves.get(name)
        if other is None:
            continue
        alike = curve.metric == other.metric and curve.values.shape[1] == other.values.shape[1]
        # candidates of a search that do not survive tokenizing cost no pass: budgets vary by those
        unequal = abs(curve.spent[-1] - other.spent[-1]) > 0.05 * other.spent[-1]
        if not alike or unequal:
            raise ValueError(
                f"{name}: {curve.values.shape[1]} items, {curve.metric}, {curve.spent[-1]:g} "
                f"{curve.unit} against {other.values.shape[1]}, {other.metric}, "
                f"{other.spent[-1]:g}. Attack both models with the same items and budget."
            )
        best, best_other = curve.best, other.best
        gap, interval = paired_difference(best, best_other)
        gaps.append(
            AttackGap(
                name, curve.metric, curve.before.mean, best.mean, other.before.mean,
                best_other.mean, gap, interval,
            )
        )  # fmt: skip
    return sorted(gaps, key=lambda found: -found.gap)
