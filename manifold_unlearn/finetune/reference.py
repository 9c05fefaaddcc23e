"""What is asked of the model as it was before unlearning."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manifold_unlearn.activations.capture import read_rows
from manifold_unlearn.activations.sites import find_decoder, resolve_site
from manifold_unlearn.activations.tokens import Encoding
from manifold_unlearn.finetune.batches import LabeledBatch, batches_in_order
from manifold_unlearn.finetune.losses import answer_log_probabilities
from manifold_unlearn.finetune.rules import Run, logits_of


def frozen_copy(model: Any) -> Any:
    """Copy of a model that gets no gradients; it costs the memory of a second model."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    return copied.eval()


def reference_answers(run: Run, rows: Sequence[Encoding]) -> Tensor:
    """Log-probability of each row's answer under the untouched model, ``(n_rows,)``.

    Computed once, so that no second model is kept.
    """
    found = torch.empty(len(rows), device=run.device)
    with torch.no_grad():
        for batch in batches_in_order(rows, run.batch_size, pad_id=run.pad_id):
            batch = batch.to(run.device)
            sums, _ = answer_log_probabilities(logits_of(run.model, batch), batch.labels)
            found[batch.index] = sums.to(found.dtype)
    return found


def reference_logits(reference: Any, batch: LabeledBatch) -> Tensor:
    """Logits of a frozen model."""
    with torch.no_grad():
        return logits_of(reference, batch)


def hidden_states(model: nn.Module, sites: Sequence[str], batch: LabeledBatch) -> list[Tensor]:
    """Hidden states ``(n_texts, width, d_site)`` at each site, with gradients if the model has."""
    with _keeping(model, sites) as kept:
        model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
            logits_to_keep=1,
        )
    return [kept[site] for site in sites]


@contextmanager
def _keeping(model: nn.Module, sites: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    kept: dict[str, Tensor] = {}
    handles = []
    try:
        for name in sites:
            site = resolve_site(model, name)

            def read(
                module: nn.Module, given: Any, answered: Any, *, at: str = name,
                of_input: bool = site.reads == "input",
            ) -> None:  # fmt: skip
                del module
                kept[at] = read_rows(given if of_input else answered, at)

            handles.append(site.module.register_forward_hook(read))
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def layer_at(model: nn.Module, depth: float) -> str:
    """Site of the residual stream at a share of the depth, ``"layers.i"``."""
    n_layers = len(find_decoder(model).blocks)
    return f"layers.{min(n_layers - 1, round(depth * n_layers))}"
