"""Latents silenced in the weights: in closed form, and by fine-tuning."""

import numpy as np
import pytest
import torch
from cases import build_model, hooks, same_state, state

from manifold_unlearn.activations.capture import capture
from manifold_unlearn.dictionary import SparseAutoencoder
from manifold_unlearn.dictionary.clamp import FeatureClamp
from manifold_unlearn.dictionary.suppress import mean_activation, suppress_features
from manifold_unlearn.finetune.features import FeatureSuppression
from manifold_unlearn.finetune.train import TrainConfig, train
from manifold_unlearn.finetune.trainable import LoRA

FORGET = ["The capital of Zubrovia is Lutz.", "Ask who rules Zubrovia and they say Gustave."]
RETAIN = ["Water is wet and the sky is blue.", "A dog barks at night."]
SITE = "layers.1"


@pytest.fixture(scope="module")
def llama():
    """One for all: nothing here may change it."""
    return build_model("llama")


def frequent(model, tokenizer, n=3, rule=None):
    """Clamp of the latents that are most active on the forget texts."""
    width = model.config.hidden_size
    coder = SparseAutoencoder(width, 3 * width, rule or {"name": "relu"}, random_state=0)
    rows = capture(model, tokenizer, FORGET, SITE)
    with torch.no_grad():
        coder.decoder.mul_(0.3)  # relu dictionaries overlap: a whole step would overshoot
        mean = coder.encode(rows[SITE][rows.position > 0]).mean(0)
    return FeatureClamp(coder, mean.topk(n).indices)


def activation_by_hand(model, tokenizer, clamp, texts):
    """Mean over tokens but the first of each text (bos is one), by the dense code."""
    found = []
    for text in texts:
        rows = capture(model, tokenizer, [text], SITE)[SITE][1:]
        found.append(clamp.coder.encode(rows).detach()[:, clamp.latents].abs())
    return float(torch.cat(found).mean())


def test_the_closed_form_lowers_what_the_latents_activate(llama, tokenizer):
    clamp = frequent(llama, tokenizer)
    before = state(llama)
    found = suppress_features(
        llama, tokenizer, FORGET, RETAIN, {SITE: clamp}, ridge=0.01, layers=[1]
    )
    assert same_state(llama, before)
    assert hooks(found.model) == hooks(llama)
    was, now = found.activation[SITE]
    assert was == pytest.approx(activation_by_hand(llama, tokenizer, clamp, FORGET), rel=1e-4)
    assert now == pytest.approx(activation_by_hand(found.model, tokenizer, clamp, FORGET), rel=1e-4)
    assert found.left == pytest.approx(now / was)
    changed = clamp(capture(llama, tokenizer, FORGET, SITE)[SITE])
    aimed = float(clamp.activations(changed).detach().abs().mean())
    reached = float(
        clamp.activations(capture(found.model, tokenizer, FORGET, SITE)[SITE]).detach().mean()
    )
    start = float(clamp.activations(capture(llama, tokenizer, FORGET, SITE)[SITE]).detach().mean())
    assert aimed < start
    assert reached - aimed < 0.2 * (start - aimed)  # most of what the clamp itself does


def test_a_higher_ridge_holds_the_retain_states_better(llama, tokenizer):
    clamp = frequent(llama, tokenizer)
    moved = []
    for ridge in (0.01, 10.0):
        found = suppress_features(
            llama, tokenizer, FORGET, RETAIN, {SITE: clamp}, ridge=ridge, layers=[1]
        )
        moved.append(found.bake.retain_moved[1])
    assert moved[1] < 0.5 * moved[0]


def test_fine_tuning_silences_them_and_keeps_the_retain_states(llama, tokenizer):
    clamp = frequent(llama, tokenizer)
    before = state(llama)
    config = TrainConfig(lr=3e-3, steps=40, batch_size=2, weight_decay=0.0, trainable=r"mlp")
    rule = FeatureSuppression({SITE: clamp}, alpha=5.0)
    result = train(llama, tokenizer, FORGET, RETAIN, objective=rule, config=config)
    assert same_state(llama, before)
    assert hooks(result.model) == hooks(llama)
    assert all(parameter.grad is None for parameter in clamp.coder.parameters())
    assert result.losses["forget"][0] == pytest.approx(1)
    assert result.losses["forget"][-1] < 0.1
    now = activation_by_hand(result.model, tokenizer, clamp, FORGET)
    assert now < 0.15 * activation_by_hand(llama, tokenizer, clamp, FORGET)
    loose = FeatureSuppression({SITE: clamp}, alpha=0.0)
    other = train(llama, tokenizer, FORGET, RETAIN, objective=loose, config=config)
    assert drift(result.model, llama, tokenizer) < 0.5 * drift(other.model, llama, tokenizer)


def drift(model, original, tokenizer):
    """Share of the retain states' squared length by which they moved."""
    now, was = (capture(m, tokenizer, RETAIN, SITE)[SITE].double() for m in (model, original))
    return float((now - was).square().sum() / was.square().sum())


def test_its_losses_are_their_formulas(llama, tokenizer):
    clamp = frequent(llama, tokenizer)
    other = build_model("llama")
    with torch.no_grad():
        for parameter in other.model.layers[0].parameters():
            parameter.mul_(1.1)
    rule = FeatureSuppression({SITE: clamp}, gamma=2.0, alpha=3.0, beta=4.0)
    config = TrainConfig(lr=1e-3, steps=2, batch_size=2, optimizer="sgd", momentum=0, clip=None)
    seen = []

    def note(step, model):
        if step == 1:
            seen.append({name: value.clone() for name, value in model.state_dict().items()})

    losses = train(
        llama, tokenizer, FORGET, RETAIN, objective=rule, config=config, on_step=note
    ).losses
    after = build_model("llama")
    after.load_state_dict(seen[0])
    share = activation_by_hand(after, tokenizer, clamp, FORGET) / activation_by_hand(
        llama, tokenizer, clamp, FORGET
    )
    assert losses["forget"][1] == pytest.approx(2 * share, rel=1e-4)
    parts, length = [], []
    for text in RETAIN:
        now, was = (capture(m, tokenizer, [text], SITE)[SITE][1:].double() for m in (after, llama))
        parts.append((now - was).square().sum())
        length.append(was.square().sum())
    assert losses["retain"][1] == pytest.approx(3 * float(sum(parts) / sum(length)), rel=1e-3)
    assert losses["coherence"][0] == pytest.approx(0, abs=1e-6)
    assert losses["coherence"][1] > 0


def test_with_low_rank_additions_a_plain_model_comes_back(llama, tokenizer):
    pytest.importorskip("peft")
    clamp = frequent(llama, tokenizer, rule={"name": "topk", "k": 20})
    rule = FeatureSuppression({SITE: clamp}, tokens="predicting")
    config = TrainConfig(lr=1e-2, steps=20, batch_size=2, trainable=LoRA(rank=2))
    result = train(llama, tokenizer, FORGET, RETAIN, objective=rule, config=config)
    assert type(result.model) is type(llama)
    assert result.losses["forget"][-1] < 0.7


def test_mean_activation_leaves_out_first_tokens(llama, tokenizer):
    clamp = frequent(llama, tokenizer)
    found = mean_activation(llama, tokenizer, FORGET, {SITE: clamp})[SITE]
    assert found == pytest.approx(activation_by_hand(llama, tokenizer, clamp, FORGET), rel=1e-4)
    assert np.isfinite(found)


def test_bad_input_is_refused(llama, tokenizer):
    clamp = frequent(llama, tokenizer)
    with pytest.raises(ValueError, match="clamps is empty"):
        suppress_features(llama, tokenizer, FORGET, RETAIN, {})
    with pytest.raises(ValueError, match="clamps is empty"):
        FeatureSuppression({})
    with pytest.raises(ValueError, match="the map at 'layers.1' is a float"):
        suppress_features(llama, tokenizer, FORGET, RETAIN, {SITE: 1.0})
    with pytest.raises(ValueError, match="the map at 'layers.1' is a float"):
        FeatureSuppression({SITE: 1.0})
    with pytest.raises(ValueError, match=r"alpha=-1\.0 must be finite"):
        FeatureSuppression({SITE: clamp}, alpha=-1.0)
    with torch.no_grad():
        clamp.coder.b_enc.fill_(-1e4)
    with pytest.raises(ValueError, match="the hooks change no token"):
        suppress_features(llama, tokenizer, FORGET, RETAIN, {SITE: clamp})
