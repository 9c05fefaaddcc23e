"""SFR-on step by step, against the released algorithm written out by hand."""

import math

import pytest
import torch
from cases import build_model, same_state, state
from told_items import FORGET, RETAIN

from manifold_unlearn.finetune.batches import collate, encode_examples
from manifold_unlearn.finetune.remain import SFRon
from manifold_unlearn.finetune.train import TrainConfig, train

LR, ALPHA, THRESHOLD, CLIP, STEPS, FREQUENCY = 0.01, 25.0, 2.0, 0.5, 6, 2
CONFIG = TrainConfig(
    lr=LR, steps=STEPS, batch_size=8, optimizer="sgd", momentum=0.0, weight_decay=0.0, clip=None,
    schedule="constant",
)  # fmt: skip
"""Batches hold all items, so that their order has no say."""


def text_losses(model, tokenizer, items):
    """Mean NLL of each answer and the number of its tokens."""
    found = []
    for row in encode_examples(tokenizer, items):
        batch = collate([row], torch.tensor([0]))
        labels = batch.labels
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        log_p = logits.log_softmax(-1)[0]
        places = [t for t in range(1, labels.shape[1]) if labels[0, t] >= 0]
        found.append(
            (-torch.stack([log_p[t - 1, labels[0, t]] for t in places]).mean(), len(places))
        )
    return found


def batch_loss(model, tokenizer, items):
    found = text_losses(model, tokenizer, items)
    return sum(loss * n for loss, n in found) / sum(n for _, n in found)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def by_hand(model, tokenizer):
    fisher = [
        [g.square() for g in gradients(model, batch_loss(model, tokenizer, items))]
        for items in (FORGET, RETAIN)
    ]
    mask = [(f + 1e-15) / (r + 1e-15) >= THRESHOLD for f, r in zip(*fisher, strict=True)]
    n_slow = STEPS - math.ceil(STEPS / (FREQUENCY + 1))
    t = 0
    for step in range(STEPS):
        if step % (FREQUENCY + 1) == 0:
            weight = ALPHA * (1 + math.cos(math.pi * t / n_slow)) / 2
            each = torch.stack([loss for loss, _ in text_losses(model, tokenizer, FORGET)])
            w = 1 / (each.detach().sqrt() + 1e-15)
            loss = -weight * (len(each) * w / w.sum() * each).mean()
            grads = [g * m for g, m in zip(gradients(model, loss), mask, strict=True)]
            norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
            assert norm > CLIP
            grads = [g * CLIP / norm for g in grads]
        else:
            grads = gradients(model, batch_loss(model, tokenizer, RETAIN))
            t += 1
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), grads, strict=True):
                parameter -= LR * gradient
    return mask


def test_every_update_is_that_of_the_released_algorithm(tokenizer):
    model = build_model("llama", dtype=torch.float64)
    objective = SFRon(alpha=ALPHA, frequency=FREQUENCY, threshold=THRESHOLD, clip=CLIP)
    result = train(model, tokenizer, FORGET, RETAIN, objective=objective, config=CONFIG)
    mask = by_hand(model, tokenizer)
    share = sum(float(m.sum()) for m in mask) / sum(m.numel() for m in mask)
    assert 0.05 < share < 0.95
    for hand, found in zip(model.parameters(), result.model.parameters(), strict=True):
        torch.testing.assert_close(found, hand, atol=1e-6, rtol=0)


def test_forget_and_retain_steps_take_turns(llama, tokenizer):
    objective = SFRon(frequency=2)
    result = train(llama, tokenizer, FORGET, RETAIN, objective=objective, config=CONFIG)
    forget = ~torch.tensor(result.losses["forget"]).isnan()
    assert forget.tolist() == [True, False, False] * 2
    assert (~torch.tensor(result.losses["retain"]).isnan()).tolist() == (~forget).tolist()


def test_a_masked_weight_stays_in_a_forget_step(llama, tokenizer):
    before = state(llama)
    one = TrainConfig(lr=0.1, steps=1, optimizer="sgd", weight_decay=0.0, clip=None)

    def moved(threshold):
        objective = SFRon(threshold=threshold)
        after = train(llama, tokenizer, FORGET, RETAIN, objective=objective, config=one).model
        now = state(after)
        return sum(int((now[name] != value).sum()) for name, value in before.items())

    assert moved(1e30) == 0
    assert 0 < moved(1.0) < moved(None)


def test_averaging_at_its_released_value_does_nothing(llama, tokenizer):
    def after(average):
        objective = SFRon(average=average, frequency=1)
        return train(llama, tokenizer, FORGET, RETAIN, objective=objective, config=CONFIG).model

    def distance(model):
        pairs = zip(model.parameters(), llama.parameters(), strict=True)
        return math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in pairs))

    plain, averaged = after(1.0), after(0.25)
    assert same_state(after(1.0), state(plain))
    assert 0 < distance(averaged) < 0.5 * distance(plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frequency": 0}, "frequency=0 must be at least 1 retain step"),
        ({"average": 0.0}, r"average=0.0 must lie in \(0, 1\]"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SFRon(**settings)
