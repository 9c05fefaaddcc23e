import pytest
import torch
from cases import build_model
from told_items import FORGET, RETAIN

from manifold_unlearn.finetune.batches import collate, encode_examples
from manifold_unlearn.finetune.losses import answer_log_probabilities
from manifold_unlearn.finetune.train import TrainConfig, fine_tune


@pytest.fixture(scope="session")
def told(tokenizer):
    """A tiny model that knows all items; read only."""
    config = TrainConfig(lr=5e-3, steps=60, schedule="constant")
    return fine_tune(build_model("llama"), tokenizer, FORGET + RETAIN, config=config).model


@pytest.fixture(scope="session")
def probability(tokenizer):
    """Mean over items of the probability of a whole answer."""

    def measure(model, items):
        rows = encode_examples(tokenizer, items)
        batch = collate(rows, torch.arange(len(rows)), pad_id=2)
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return answer_log_probabilities(logits, batch.labels)[0].exp().mean().item()

    return measure
