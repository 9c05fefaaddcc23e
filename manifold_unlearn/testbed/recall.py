"""Whether a model has learned what it was told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.activations.tokens import batches, encode


def recall(model: Any, tokenizer: Any, items: Sequence[Item]) -> float:
    """Share of items whose answer is the likeliest, token by token, in the wording of the texts."""
    rows = encode(tokenizer, [item.pair for item in items])
    right = 0
    for batch in batches(rows, pad_id=tokenizer.pad_token_id):
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids.to(model.device)).logits
        said = logits[:, :-1].argmax(-1).cpu() == batch.input_ids[:, 1:]
        for r, i in enumerate(batch.index.tolist()):
            right += int(said[r, : len(rows[i]) - 1][rows[i].answer[1:]].all())
    return right / len(items)
