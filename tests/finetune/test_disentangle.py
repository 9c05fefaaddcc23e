import numpy as np
import pytest
import torch
from cases import build_model
from told_items import FORGET, RETAIN

from manifold_unlearn.finetune.ascent import GradDiff, GradientAscent
from manifold_unlearn.finetune.batches import collate, encode_examples
from manifold_unlearn.finetune.disentangle import Disentangled, orthonormal, without
from manifold_unlearn.finetune.losses import negative_log_likelihood
from manifold_unlearn.finetune.remain import SFRon
from manifold_unlearn.finetune.train import TrainConfig, train

RATES = (4e-3, 1e-3)


@pytest.fixture(scope="module")
def learned():
    """Not at a minimum of the retain loss, where any step is of second order."""
    return build_model("llama", seed=2, dtype=torch.float64)


def loss(model, tokenizer, items):
    rows = encode_examples(tokenizer, items)
    batch = collate(rows, torch.arange(len(rows)))
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return negative_log_likelihood(logits, batch.labels).item()


def changes(model, tokenizer, objective, optimizer="sgd", rates=RATES):
    """Change of forget and retain loss by one update, at each rate: ``(n_rates, 2)``."""
    found = []
    for lr in rates:
        config = TrainConfig(
            lr=lr, steps=1, batch_size=8, optimizer=optimizer, momentum=0.0, weight_decay=0.0,
            clip=None, schedule="constant",
        )  # fmt: skip
        after = train(model, tokenizer, FORGET, RETAIN, objective=objective, config=config).model
        found.append(
            [loss(after, tokenizer, x) - loss(model, tokenizer, x) for x in (FORGET, RETAIN)]
        )
    return np.array(found)


def order(column, rates=RATES):
    """Power of the rate that a change grows with."""
    return np.log(abs(column[0] / column[1])) / np.log(rates[0] / rates[1])


def test_retain_changes_to_second_order_and_forget_to_first(learned, tokenizer):
    plain = changes(learned, tokenizer, GradientAscent())
    assert order(plain[:, 1]) == pytest.approx(1, abs=0.3)  # the property is absent before
    for per, rank in (("batch", 1), ("text", len(RETAIN))):
        chosen = Disentangled(GradientAscent(), per=per, rank=rank)
        projected = changes(learned, tokenizer, chosen)
        assert order(projected[:, 1]) == pytest.approx(2, abs=0.3)
        assert order(projected[:, 0]) == pytest.approx(1, abs=0.3)
        assert projected[1, 0] > 0.2 * plain[1, 0]
        assert abs(projected[1, 1]) < 0.05 * abs(plain[1, 1])


def test_an_adaptive_optimizer_needs_its_movement_projected(learned, tokenizer):
    rates = (1e-4, 2.5e-5)

    def retain(of):
        chosen = Disentangled(GradientAscent(), rank=1, of=of)
        return order(changes(learned, tokenizer, chosen, "adamw", rates)[:, 1], rates)

    assert retain("gradient") == pytest.approx(1, abs=0.4)
    assert retain("update") == pytest.approx(2, abs=0.4)


def test_the_retain_term_is_left_as_it_is(learned, tokenizer):
    """With the whole retain set in the span, its change is that of the retain gradient alone."""
    only_retain = changes(learned, tokenizer, GradDiff(gamma=0.0))
    both = changes(learned, tokenizer, Disentangled(GradDiff(gamma=1.0), rank=1))
    assert both[1, 1] == pytest.approx(only_retain[1, 1], rel=0.1)
    assert both[1, 0] > only_retain[1, 0]


def test_it_forgets(told, tokenizer, probability):
    config = TrainConfig(lr=1e-3, steps=30, schedule="constant")
    chosen = Disentangled(GradDiff(), rank=2, refresh=3)
    result = train(told, tokenizer, FORGET, RETAIN, objective=chosen, config=config)
    assert probability(result.model, FORGET) < 0.5
    assert probability(result.model, RETAIN) > probability(result.model, FORGET) + 0.3


def test_an_orthonormal_basis_of_dependent_columns():
    draw = torch.Generator().manual_seed(0)
    columns = torch.randn(50, 3, generator=draw)
    given = torch.cat([columns, columns @ torch.randn(3, 2, generator=draw)], dim=1)
    given = torch.cat([1e4 * given, torch.zeros(50, 1)], dim=1)
    basis = orthonormal(given)
    assert basis.shape == (50, 3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3), atol=1e-5, rtol=0)
    left = without(torch.randn(50, generator=draw), basis)
    assert (columns.T @ left).abs().max() < 1e-4
    assert orthonormal(torch.zeros(5, 2)).shape == (5, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"refresh": 0}, "refresh=0 must be at least 1"),
        ({"of": "weights"}, "of='weights' is not 'gradient' or 'update'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Disentangled(GradientAscent(), **settings)


def test_an_objective_that_makes_its_own_gradients(llama, tokenizer):
    with pytest.raises(ValueError, match="sfr-on makes its gradients itself"):
        train(llama, tokenizer, FORGET, RETAIN, objective=Disentangled(SFRon()))
