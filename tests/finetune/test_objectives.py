import numpy as np
import pytest
import torch
from cases import build_model, build_tokenizer, hooks, same_state, state
from told_items import FORGET, RETAIN

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.finetune import losses
from manifold_unlearn.finetune.batches import collate, encode_examples
from manifold_unlearn.finetune.objectives import OBJECTIVES, objective
from manifold_unlearn.finetune.train import TrainConfig, train

CONFIG = TrainConfig(lr=1e-3, steps=30, schedule="constant")
SGD = TrainConfig(lr=1e-2, steps=48, optimizer="sgd", clip=None, weight_decay=0)
FIRST = TrainConfig(lr=1e-12, steps=1)
"""One update so small that only its losses matter: those of the untouched model."""


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n != "disentangled"])
def test_forget_falls_more_than_retain(name, told, tokenizer, probability):
    before = state(told)
    known = probability(told, FORGET), probability(told, RETAIN)
    assert min(known) > 0.9
    config = SGD if name == "sfr-on" else CONFIG
    chosen = objective(name)
    result = train(told, tokenizer, FORGET, RETAIN, objective=chosen, config=config)
    lost = [
        p - probability(result.model, items)
        for p, items in zip(known, (FORGET, RETAIN), strict=True)
    ]
    assert lost[0] > 0.3
    assert lost[0] > lost[1] + 0.1
    assert same_state(told, before)
    assert hooks(told) == hooks(result.model) == 0
    assert all(np.isfinite(v[~np.isnan(v)]).all() for v in result.losses.values())


def test_descending_the_forget_loss_is_the_negative_control(told, tokenizer, probability):
    """The same loop without an unlearning objective forgets nothing."""
    result = train(
        told, tokenizer, FORGET, RETAIN, objective=objective("graddiff", gamma=-1.0), config=CONFIG
    )
    assert probability(result.model, FORGET) > 0.9


class Untouched:
    """Quantities of a model before unlearning, by numpy alone."""

    def __init__(self, model, items, tokenizer):
        rows = encode_examples(tokenizer, items)
        self.batch = collate(rows, torch.arange(len(rows)), pad_id=2)
        with torch.no_grad():
            out = model(
                input_ids=self.batch.input_ids,
                attention_mask=self.batch.attention_mask,
                output_hidden_states=True,
            )
        self.hidden = [h.double().numpy() for h in out.hidden_states]
        z = out.logits.double().numpy()
        self.logits = z
        e = np.exp(z - z.max(-1, keepdims=True))
        p = e / e.sum(-1, keepdims=True)
        self.log_p = np.log(p)
        self.answers = []
        self.places = []
        for r, row in enumerate(self.batch.labels.tolist()):
            spots = [t for t, y in enumerate(row) if y >= 0]
            self.places += [(r, t) for t in spots]
            self.answers.append([self.log_p[r, t - 1, row[t]] for t in spots])

    @property
    def tokens(self):
        return np.concatenate(self.answers)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture(scope="module")
def start():
    tokenizer = build_tokenizer()
    model = build_model("llama")
    return (
        model,
        tokenizer,
        Untouched(model, FORGET, tokenizer),
        Untouched(model, RETAIN, tokenizer),
    )


def first_losses(start, name, **settings):
    model, tokenizer, _, _ = start
    result = train(
        model, tokenizer, FORGET, RETAIN, objective=objective(name, **settings), config=FIRST
    )
    return {key: value[0] for key, value in result.losses.items()}


def undial_by_hand(known):
    parts = []
    for r, t in known.places:
        z = known.logits[r, t - 1].copy()
        z[known.batch.labels[r, t]] -= 10
        target = np.exp(z - z.max())
        parts.append(-(target / target.sum() * known.log_p[r, t - 1]).sum())
    return np.mean(parts)


def ceu_by_hand(known):
    parts = []
    for r, row in enumerate(known.batch.labels.tolist()):
        for t in [t for t, y in enumerate(row) if y >= 0][1:]:
            z = known.logits[r, t - 1].copy()
            z[row[t]] = -np.inf
            target = np.exp(z - z.max())
            parts.append(-(target / target.sum() * known.log_p[r, t - 1]).sum())
    return np.mean(parts)


def p(known):
    return np.exp(known.tokens)


EXPECTED = {
    "ga": lambda f: f.tokens.mean(),
    "graddiff": lambda f: f.tokens.mean(),
    "npo": lambda f: 2 / 0.1 * np.log(2),  # both models are one: every ratio is 0
    "idkdpo": lambda f: 2 / 0.1 * np.log(2),
    "altpo": lambda f: 2 / 0.1 * np.log(2),
    "simnpo": lambda f: 0.125 * np.mean(
        [-(2 / 4.5) * np.log(sigmoid(-4.5 * np.mean(row))) for row in f.answers]
    ),
    "wga": lambda f: np.mean(p(f) * f.tokens),
    "satimp": lambda f: np.mean(p(f) ** 5 * (1 - p(f)) * f.tokens),
    "undial": undial_by_hand,
    "ceu": ceu_by_hand,
    "circuit-breaker": lambda f: 10.0,  # cosine of a state with itself, by alpha
    "sfr-on": lambda f: -25 * sum(
        -np.mean(row) / np.sqrt(-np.mean(row)) for row in f.answers
    ) / sum(1 / np.sqrt(-np.mean(row)) for row in f.answers),
    "disentangled": lambda f: f.tokens.mean(),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_the_first_loss_is_the_formula(name, start):
    _, _, forget, retain = start
    found = first_losses(start, name)
    assert found["forget"] == pytest.approx(EXPECTED[name](forget), abs=1e-5, rel=1e-5)
    if "retain" in found:
        weight = 0.1 if name == "satimp" else 1.0
        assert found["retain"] == pytest.approx(-weight * retain.tokens.mean(), rel=1e-5)


@pytest.mark.parametrize("tokens", ["predicting", "answer"])
@pytest.mark.parametrize("name", ["rmu", "adaptive-rmu"])
def test_the_first_loss_of_steering_is_the_formula(name, tokens, start):
    _, _, forget, _ = start
    hidden = forget.hidden[2]  # after block 1
    drawn = torch.rand(32, generator=torch.Generator().manual_seed(0)).double().numpy()
    shift = 1 if tokens == "predicting" else 0
    parts = []
    for r in range(len(FORGET)):
        rows = hidden[r, [t - shift for q, t in forget.places if q == r]]
        scale = 2.0 if name == "rmu" else 5 * np.linalg.norm(rows, axis=1).mean()
        parts += [np.mean((row - scale * drawn / np.linalg.norm(drawn)) ** 2) for row in rows]
    found = first_losses(start, name, site="layers.1", tokens=tokens)
    assert found["forget"] == pytest.approx(np.mean(parts), rel=1e-5)
    assert found["retain"] == pytest.approx(0, abs=1e-9)


def test_the_reference_is_the_model_before_unlearning(start):
    """The second NPO loss follows from the log-probabilities before and after one update."""
    model, tokenizer, before, _ = start
    config = TrainConfig(lr=1e-4, steps=2, schedule="constant")
    seen = []

    def on_step(step, changed):
        if step == 1:
            seen.append(Untouched(changed, FORGET, tokenizer))

    result = train(
        model, tokenizer, FORGET, RETAIN, objective=objective("npo"), config=config, on_step=on_step
    )
    pairs = zip(seen[0].answers, before.answers, strict=True)
    ratios = np.array([sum(now) - sum(old) for now, old in pairs])
    assert np.abs(ratios).min() > 1e-4
    expected = np.mean(-20 * np.log(sigmoid(-0.1 * ratios)))
    assert result.losses["forget"][1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["kl", "kl_all", "hidden"])
def test_a_retain_term_on_the_untouched_model_holds_it(kind, told, tokenizer, probability):
    def kept(alpha):
        chosen = objective("graddiff", alpha=alpha, retain=kind)
        result = train(told, tokenizer, FORGET, RETAIN, objective=chosen, config=CONFIG)
        return result, probability(result.model, RETAIN)

    alpha = 100.0 if kind == "hidden" else 1.0
    with_it, without = kept(alpha), kept(0.0)
    assert with_it[1] > without[1]
    assert with_it[0].losses["retain"][0] == pytest.approx(0, abs=1e-4)
    assert with_it[0].losses["retain"][1:].min() > 0
    assert "retain" not in without[0].losses


def test_circuit_breaking_follows_its_schedule(told, tokenizer):
    config = TrainConfig(lr=1e-12, steps=4)
    chosen = objective("circuit-breaker", alpha=8.0, sites=("layers.1",), tokens="all")
    result = train(told, tokenizer, FORGET, RETAIN, objective=chosen, config=config)
    np.testing.assert_allclose(result.losses["forget"], [8, 7, 6, 5], rtol=1e-4)
    assert np.isnan(result.losses["retain"][0])


def test_an_objective_needs_what_it_needs(llama, tokenizer):
    quick = TrainConfig(lr=1e-3, steps=1)
    with pytest.raises(ValueError, match=r"forget\[0\] is a plain text; idkdpo needs items"):
        train(
            llama, tokenizer, ["Water boils"], RETAIN, objective=objective("idkdpo"), config=quick
        )
    with pytest.raises(ValueError, match=r"forget\[0\] has no perturbed_answer to prefer"):
        items = [Item("Water", " boils")]
        train(llama, tokenizer, items, RETAIN, objective=objective("altpo"), config=quick)
    with pytest.raises(ValueError, match="retain='l2' is not 'nll'"):
        chosen = objective("graddiff", retain="l2")
        train(llama, tokenizer, FORGET, RETAIN, objective=chosen, config=quick)
    with pytest.raises(ValueError, match="the retain set is empty"):
        train(llama, tokenizer, FORGET, [], objective=objective("npo"), config=quick)


def test_names_and_settings_are_checked():
    with pytest.raises(ValueError, match="objective 'magic' is not one of ga, graddiff"):
        objective("magic")
    with pytest.raises(ValueError, match="npo: .*'delta'.* Its settings are beta, gamma"):
        objective("npo", delta=1)
    assert objective("simnpo", delta=1.0) == losses_default(delta=1.0)
    for name in OBJECTIVES:
        assert objective(name).name.startswith("graddiff" if name == "disentangled" else name)


def losses_default(**settings):
    from manifold_unlearn.finetune.preference import SimNPO

    assert losses.simnpo.__kwdefaults__["beta"] == SimNPO().beta
    return SimNPO(**settings)
