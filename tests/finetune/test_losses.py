"""Every loss against its formula, written out here in numpy."""

import numpy as np
import pytest
import torch
from cases import build_model, build_tokenizer

from manifold_unlearn.finetune import losses
from manifold_unlearn.finetune.batches import IGNORED, collate, encode_examples

PAIRS = [
    ("The capital of France is", " Paris, of course"),
    ("Water", " boils"),
    ("Iron rusts when it is", " wet"),
]
THREE = torch.tensor([[[0.5, 0.25, 0.25], [0.125, 0.5, 0.375], [0.2, 0.2, 0.6]]]).log()
"""Logits of one text of three tokens over a vocabulary of three."""
LABELS = torch.tensor([[IGNORED, 1, 2]])
"""The first answer token has probability 1/4, the second 3/8."""


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture(scope="module")
def batch():
    return collate(encode_examples(build_tokenizer(), PAIRS), torch.arange(3), pad_id=2)


@pytest.fixture(scope="module")
def told(batch):
    return logits_of(0, batch)


@pytest.fixture(scope="module")
def other(batch):
    return logits_of(1, batch)


def logits_of(seed, batch):
    model = build_model("llama", seed=seed, dtype=torch.float64)
    with torch.no_grad():
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


def by_hand(logits, labels):
    """For each text the log-probabilities of its answer tokens, one at a time."""
    p = softmax(logits.numpy())
    found = []
    for r, row in enumerate(labels.tolist()):
        found.append([np.log(p[r, t - 1, y]) for t, y in enumerate(row) if y != IGNORED])
    return found


def test_two_tokens_by_hand():
    sums, counts = losses.answer_log_probabilities(THREE, LABELS)
    assert sums.item() == pytest.approx(np.log(1 / 4 * 3 / 8))
    assert counts.tolist() == [2]
    nll = -np.log(3 / 32) / 2
    assert losses.negative_log_likelihood(THREE, LABELS).item() == pytest.approx(nll)
    assert losses.gradient_ascent(THREE, LABELS).item() == pytest.approx(-nll)
    ga = (np.log(1 / 4) / 4 + np.log(3 / 8) * 3 / 8) / 2
    assert losses.wga(THREE, LABELS).item() == pytest.approx(ga)


def test_likelihood_is_a_mean_over_tokens_not_over_texts(batch, told):
    hand = by_hand(told, batch.labels)
    assert len({len(row) for row in hand}) > 1
    expected = -np.mean([value for row in hand for value in row])
    assert losses.negative_log_likelihood(told, batch.labels).item() == pytest.approx(expected)
    assert losses.gradient_ascent(told, batch.labels).item() == pytest.approx(-expected)


def test_likelihood_is_that_of_transformers(batch):
    model = build_model("llama")
    with torch.no_grad():
        out = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        )
    found = losses.negative_log_likelihood(out.logits, batch.labels)
    assert found.item() == pytest.approx(out.loss.item(), rel=1e-6)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_wga(batch, told, beta):
    tokens = np.concatenate(by_hand(told, batch.labels))
    expected = -np.mean(np.exp(tokens) ** beta * -tokens)
    assert losses.wga(told, batch.labels, beta=beta).item() == pytest.approx(expected, rel=1e-6)


def test_satimp(batch, told):
    tokens = np.concatenate(by_hand(told, batch.labels))
    p = np.exp(tokens)
    expected = -np.mean(p**0.5 * (1 - p) ** 2 * -tokens)
    found = losses.satimp(told, batch.labels, beta1=0.5, beta2=2.0)
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("ignore_first", [0, 1])
def test_ceu(batch, told, ignore_first):
    z, parts = told.numpy(), []
    for r, row in enumerate(batch.labels.tolist()):
        answer = [t for t, y in enumerate(row) if y != IGNORED][ignore_first:]
        for t in answer:
            keep = np.arange(z.shape[-1]) != row[t]
            target = np.exp(z[r, t - 1]) * keep
            target /= target.sum()
            parts.append(-(target * np.log(softmax(z[r, t - 1]))).sum())
    found = losses.ceu(told, batch.labels, ignore_first=ignore_first)
    assert found.item() == pytest.approx(np.mean(parts), rel=1e-6)


def test_ceu_without_a_token_left():
    with pytest.raises(ValueError, match="more than ignore_first=2 tokens"):
        losses.ceu(THREE, LABELS, ignore_first=2)


def sums(batch, logits):
    return np.array([sum(row) for row in by_hand(logits, batch.labels)])


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_npo(batch, told, other, beta):
    now, before = sums(batch, told), sums(batch, other)
    expected = np.mean(-(2 / beta) * np.log(sigmoid(-beta * (now - before))))
    found = losses.npo(torch.tensor(now), torch.tensor(before), beta=beta)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_npo_at_the_start_pushes_as_gradient_ascent_does():
    """Its gradient in log p is 2 sigmoid(0) = 1 there, and falls as the answer is forgotten."""
    now = torch.tensor([-3.0, -30.0], requires_grad=True)
    losses.npo(now, torch.tensor([-3.0, -3.0]), beta=0.1).backward()
    np.testing.assert_allclose(now.grad.numpy(), [0.5, sigmoid(-2.7)], rtol=1e-6)


@pytest.mark.parametrize("delta", [0.0, 1.0])
def test_simnpo(batch, told, delta):
    hand = by_hand(told, batch.labels)
    means = np.array([-np.mean(row) for row in hand])
    expected = np.mean(-(2 / 4.5) * np.log(sigmoid(4.5 * (means - delta))))
    found, counts = losses.answer_log_probabilities(told, batch.labels)
    assert losses.simnpo(found, counts, delta=delta).item() == pytest.approx(expected, rel=1e-6)


def test_dpo():
    win, win_ref, lose, lose_ref = np.array([[-3.0, -9.0], [-5.0, -4.0], [-1.0, -8.0], [-2.0, -7]])
    margin = (win - win_ref) - (lose - lose_ref)
    np.testing.assert_allclose(margin, [1, -4])
    expected = np.mean(-(2 / 0.1) * np.log(sigmoid(0.1 * margin)))
    found = losses.dpo(*map(torch.tensor, (win, win_ref, lose, lose_ref)))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_undial(batch, told, other):
    z, s, parts = other.numpy(), told.numpy(), []
    for r, row in enumerate(batch.labels.tolist()):
        for t, y in enumerate(row):
            if y != IGNORED:
                lowered = z[r, t - 1].copy()
                lowered[y] -= 10
                parts.append(-(softmax(lowered) * np.log(softmax(s[r, t - 1]))).sum())
    found = losses.undial(told, other, batch.labels)
    assert found.item() == pytest.approx(np.mean(parts), rel=1e-6)


def test_undial_as_published_lowers_a_token_from_the_end_where_there_is_no_label(
    batch, told, other
):
    z, s, parts = other.numpy(), told.numpy(), []
    for r, row in enumerate(batch.labels.tolist()):
        for t, y in enumerate(row[1:]):
            lowered = z[r, t].copy()
            lowered[y] -= 10  # numpy reads -100 from the end, as the published code does
            parts.append(-(softmax(lowered) * np.log(softmax(s[r, t]))).sum())
    found = losses.undial(told, other, batch.labels, positions="published")
    assert found.item() == pytest.approx(np.mean(parts), rel=1e-6)
    assert abs(found.item() - losses.undial(told, other, batch.labels).item()) > 0.01


def test_undial_as_published_on_a_tiny_vocabulary():
    with pytest.raises(ValueError, match="indexes the vocabulary by -100; it has only 3"):
        losses.undial(THREE, THREE, LABELS, positions="published")


def test_adaptive_ascent_pushes_the_best_known_hardest():
    each = np.array([0.04, 1.0, 4.0])
    weight = 1 / (np.sqrt(each) + 1e-15)
    expected = -np.mean(3 * weight / weight.sum() * each)
    losses_ = torch.tensor(each, requires_grad=True)
    found = losses.adaptive_ascent(losses_)
    assert found.item() == pytest.approx(expected)
    found.backward()
    np.testing.assert_allclose(losses_.grad.numpy(), -weight / weight.sum())


def test_kl_where_answers_are_predicted_and_everywhere(batch, told, other):
    p, q = softmax(other.numpy()), softmax(told.numpy())
    divergence = (p * np.log(p / q)).sum(-1)
    predicting = np.zeros(divergence.shape, dtype=bool)
    predicting[:, :-1] = batch.labels.numpy()[:, 1:] != IGNORED
    found = losses.kl_to_reference(told, other, batch.marked("predicting"))
    assert found.item() == pytest.approx(divergence[predicting].mean(), rel=1e-6)
    assert losses.kl_to_reference(told, other).item() == pytest.approx(divergence.mean(), rel=1e-6)
    assert losses.kl_to_reference(told, told).item() == pytest.approx(0, abs=1e-12)


HIDDEN = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]], [[5.0, 6.0], [8.0, 8.0], [7.0, 7.0]]])
MASK = torch.tensor([[True, True, False], [True, False, False]])
TARGET = torch.tensor([1.0, 1.0])
"""Squared distances, mean over the two coordinates: 0.5 and 6.5 in the first text, 20.5."""


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("token", (0.5 + 6.5 + 20.5) / 3),
        ("text", (7.0 / 2 + 20.5) / 2),
        ("published", np.mean([[7 / 2, 7 / 1], [20.5 / 2, 20.5 / 1]])),
    ],
)
def test_hidden_mse(reduction, expected):
    found = losses.hidden_mse(HIDDEN, TARGET, MASK, reduction=reduction)
    assert found.item() == pytest.approx(expected)


def test_control_vector_is_a_unit_vector_of_positive_coordinates_from_the_seed():
    first, again, other = (
        losses.control_vector(64, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert first.norm().item() == pytest.approx(1)
    assert (first >= 0).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_adaptive_scale():
    norms = np.linalg.norm(HIDDEN.numpy(), axis=-1)
    per_text = losses.adaptive_scale(HIDDEN, MASK)
    assert per_text.shape == (2, 1, 1)
    expected = [norms[0, :2].mean(), norms[1, 0]]
    np.testing.assert_allclose(per_text.flatten().numpy(), expected, rtol=1e-6)
    per_token = losses.adaptive_scale(HIDDEN, MASK, per="token")
    np.testing.assert_allclose(per_token[..., 0].numpy(), norms, rtol=1e-6)


def test_rerouting_and_distance():
    original = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [1.0, 1.0]], [[3.0, 4.0], [1, 1], [1, 1]]])
    cosines = [1 / np.sqrt(5), max(0, -3 / 5), (15 + 24) / (5 * np.sqrt(61))]
    assert losses.rerouting(HIDDEN, original, MASK).item() == pytest.approx(np.mean(cosines))
    lengths = [2, np.sqrt(16 + 16), np.sqrt(8)]
    assert losses.hidden_distance(HIDDEN, original, MASK).item() == pytest.approx(np.mean(lengths))


@pytest.mark.parametrize("name", ["negative_log_likelihood", "wga", "satimp", "ceu"])
def test_half_precision_is_summed_in_single(name, batch, told):
    function = getattr(losses, name)
    half = function(told.to(torch.bfloat16), batch.labels)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(function(told, batch.labels).item(), rel=0.02)
