"""Fine-tuning until a model no longer activates chosen latents of its dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from manifold_unlearn.dictionary.chosen_latents import latent_activations
from manifold_unlearn.finetune.batches import LabeledBatch, MarkedTokens
from manifold_unlearn.finetune.losses import kl_to_reference
from manifold_unlearn.finetune.reference import frozen_copy, hidden_states, reference_logits
from manifold_unlearn.finetune.rules import Descent, Rule, Run, Terms, logits_of

_PARTS = ("coder", "latents")


@dataclass(frozen=True, eq=False)
class FeatureSuppression:
    """No activation of the chosen latents on forget texts, retain states as they were.

    The loss is ``gamma * forget + alpha * retain + beta * coherence``, mean over the sites:

    ``forget``
        Activation of the chosen latents, as a share of what the untouched model has on the same
        tokens: 1 to begin with, 0 when none fires.
    ``retain``
        Squared distance of the retain states to those of the untouched model, as a share of their
        squared length.
    ``coherence``
        KL divergence of the retain predictions from those of the untouched model, so that what
        stands behind the sites stays of use; left out with ``beta=0``.

    Parameters
    ----------
    clamps : mapping of str to FeatureClamp or fitted FeatureEraser
        Dictionary and latents of each site, ``"layers.i"``.
    gamma, alpha, beta : float
        Not negative.
    tokens : {"all", "predicting", "answer"}
        Forget tokens on which the latents shall be silent. Padding and first tokens never count.

    Notes
    -----
    Published with LoRA: ``TrainConfig(trainable=LoRA(rank=4))``. Dictionaries whose latents
    compete (TopK) give a latent no gradient once it has lost.

    References
    ----------
    Ashuach et al. (2025), CRISP: persistent concept unlearning via sparse autoencoders, arXiv
    2508.13650: an unlearning, a retain and a coherence term. The scaling of each, and the KL as
    the last, are ours.
    """

    clamps: Mapping[str, Any]
    gamma: float = 1.0
    alpha: float = 1.0
    beta: float = 0.0
    tokens: MarkedTokens = "all"
    name: ClassVar[str] = "feature-suppression"
    needs_retain: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the parameters."""
        if not self.clamps:
            raise ValueError("clamps is empty; give at least one site with its clamp.")
        for name in ("gamma", "alpha", "beta"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be finite and not negative.")
        for site, given in self.clamps.items():
            clamp = getattr(given, "map_", given)
            if any(not hasattr(clamp, part) for part in _PARTS):
                raise ValueError(
                    f"the map at {site!r} is a {type(given).__name__}; give a FeatureClamp or a "
                    "fitted FeatureEraser."
                )

    def bind(self, run: Run) -> Rule:
        """Freeze copies of model and dictionaries; return the rule of one run."""
        reference = frozen_copy(run.model)
        placed = {}
        for site, given in self.clamps.items():
            clamp = getattr(given, "map_", given)
            coder = frozen_copy(clamp.coder).to(run.device)
            placed[site] = (coder, clamp.latents.to(run.device))

        def terms(forget: LabeledBatch, retain: LabeledBatch | None) -> Terms:
            assert retain is not None
            found = {"forget": self.gamma * self._activation(run, reference, placed, forget)}
            if self.alpha:
                found["retain"] = self.alpha * self._moved(run, reference, retain)
            if self.beta:
                before, now = reference_logits(reference, retain), logits_of(run.model, retain)
                found["coherence"] = self.beta * kl_to_reference(now, before, _counted(retain))
            return found

        return Descent(run, terms)

    def _activation(
        self,
        run: Run,
        reference: Any,
        placed: Mapping[str, tuple[Any, Tensor]],
        batch: LabeledBatch,
    ) -> Tensor:
        mask = batch.marked(self.tokens) & _counted(batch)
        sites = list(placed)
        now, before = hidden_states(run.model, sites, batch), hidden_states(reference, sites, batch)
        shares = []
        for (coder, latents), here, there in zip(placed.values(), now, before, strict=True):
            size = latent_activations(coder, here[mask], latents).abs().sum()
            with torch.no_grad():
                was = latent_activations(coder, there[mask], latents).abs().sum()
            # a batch in which nothing fired has nothing to suppress
            shares.append(size / was if float(was) > 0 else size)
        return torch.stack(shares).mean()

    def _moved(self, run: Run, reference: Any, batch: LabeledBatch) -> Tensor:
        mask, sites = _counted(batch), list(self.clamps)
        now, before = hidden_states(run.model, sites, batch), hidden_states(reference, sites, batch)
        shares = [
            (here[mask].float() - there[mask].float()).square().sum()
            / there[mask].float().square().sum()
            for here, there in zip(now, before, strict=True)
        ]
        return torch.stack(shares).mean()


def _counted(batch: LabeledBatch) -> Tensor:
    """Mark all tokens (n_texts, width) but padding and the first of each text, a sink."""
    mask = batch.attention_mask.bool()
    return mask & (mask.cumsum(1) > 1)
