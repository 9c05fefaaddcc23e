import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from cases import TEXTS, WIDTH, hooks, same_state, state

from manifold_unlearn import capture, intervene
from manifold_unlearn.dictionary import SparseAutoencoder
from manifold_unlearn.evaluate import splice_fidelity
from manifold_unlearn.evaluate.dictionary_splice import ablated

LONG = [text for text in TEXTS if text != "x"]


def coder_of(d, kind):
    coder = SparseAutoencoder(d, 2 * d, {"name": "relu"}, random_state=0)
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    with torch.no_grad():
        coder.encoder.copy_(both * (kind == "identity"))
        coder.decoder.copy_(both)
    return coder


def by_hand(model, tokenizer, texts, made, clean):
    """Loss, divergence and agreement of each text, one forward pass of its own."""
    found = []
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            with clean():
                p = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1).numpy()
            with made():
                q = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1).numpy()
        following = ids[0, 1:].numpy()
        loss = -q[np.arange(len(following)), following].mean()
        kl = (np.exp(p) * (p - q)).sum(1).mean()
        found.append((loss, kl, (p.argmax(1) == q.argmax(1)).mean()))
    return np.array(found).T


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_figures_are_those_of_one_pass_a_text(llama, tokenizer, batch_size):
    coder = SparseAutoencoder(WIDTH, 64, {"name": "topk", "k": 6}, random_state=0)
    weights = state(llama)
    found = splice_fidelity(llama, tokenizer, {"layers.1": coder}, LONG, batch_size=batch_size)
    rows = capture(llama, tokenizer, LONG, ["layers.1"])["layers.1"].double()
    mean = rows.mean(0).float()
    runs = {
        "clean": nullcontext,
        "spliced": lambda: intervene(llama, {"layers.1": coder}),
        "zeroed": lambda: intervene(llama, {"layers.1": torch.zeros_like}),
        "averaged": lambda: intervene(llama, {"layers.1": lambda h: mean.expand_as(h)}),
    }
    hand = {k: by_hand(llama, tokenizer, LONG, run, nullcontext) for k, run in runs.items()}
    for name in runs:
        np.testing.assert_allclose(getattr(found, name).values, hand[name][0], rtol=1e-4)
    np.testing.assert_allclose(found.divergence.values, hand["spliced"][1], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.zeroed_divergence.values, hand["zeroed"][1], rtol=1e-3)
    np.testing.assert_allclose(found.agreement.values, hand["spliced"][2])
    loss = {name: values[0].mean() for name, values in hand.items()}
    if loss["zeroed"] > loss["clean"]:
        expected = (loss["zeroed"] - loss["spliced"]) / (loss["zeroed"] - loss["clean"])
        assert found.recovery == pytest.approx(expected, rel=1e-2)
    assert hooks(llama) == 0 and same_state(llama, weights)


@pytest.fixture(scope="module")
def testbed_texts(tiny_testbed):
    world = tiny_testbed.world
    return [*world.texts("retain")[::40], *world.neutral[::20]][:24]


PLACES = {"one": ["layers.1"], "all": ["embed", "layers.0", "layers.1"]}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_a_perfect_dictionary_recovers_everything(tiny_testbed, testbed_texts, places):
    model = tiny_testbed.told
    coders = {site: coder_of(model.config.hidden_size, "identity") for site in places}
    found = splice_fidelity(model, tiny_testbed.tokenizer, coders, testbed_texts)
    assert min(found.zeroed.mean, found.averaged.mean) > found.clean.mean + 1
    assert found.recovery == pytest.approx(1, abs=1e-4)
    assert found.recovery_over_mean == pytest.approx(1, abs=1e-4)
    assert found.divergence.mean < 1e-6
    assert found.divergence_recovery == pytest.approx(1, abs=1e-4)
    assert found.agreement.mean == 1
    assert found.recovery_interval == pytest.approx((1, 1), abs=1e-4)


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_a_zero_dictionary_recovers_nothing(tiny_testbed, testbed_texts, places):
    model = tiny_testbed.told
    coders = {site: coder_of(model.config.hidden_size, "zero") for site in places}
    found = splice_fidelity(model, tiny_testbed.tokenizer, coders, testbed_texts)
    assert found.recovery == pytest.approx(0, abs=1e-6)
    assert found.recovery_interval == pytest.approx((0, 0), abs=1e-6)
    means = [m.values.mean() for m in (found.averaged, found.zeroed, found.clean)]
    assert found.recovery_over_mean == pytest.approx((means[0] - means[1]) / (means[0] - means[2]))
    assert abs(found.recovery_over_mean) > 0.01
    assert found.divergence_recovery == pytest.approx(0, abs=1e-6)
    assert found.divergence.mean == pytest.approx(found.zeroed_divergence.mean)


def test_half_of_the_reconstruction_lies_between(tiny_testbed, testbed_texts):
    model = tiny_testbed.told
    coder = SparseAutoencoder(
        model.config.hidden_size, 256, {"name": "topk", "k": 32}, random_state=0
    )
    found = splice_fidelity(model, tiny_testbed.tokenizer, {"layers.0": coder}, testbed_texts)
    low, high = found.recovery_interval
    assert low < found.recovery < high < 1
    losses = [m.values for m in (found.clean, found.spliced, found.zeroed)]
    drawn = np.random.default_rng(0).integers(0, len(losses[0]), size=(2000, len(losses[0])))
    clean, made, zeroed = (values[drawn].mean(1) for values in losses)
    expected = np.percentile((zeroed - made) / (zeroed - clean), [2.5, 97.5])
    assert (low, high) == pytest.approx(tuple(expected))
    written = json.loads(json.dumps(found.to_json()))
    assert written["recovery"] == found.recovery
    assert written["spliced"]["n"] == len(testbed_texts)


def test_tokens_left_alone_are_so_in_the_ablation_too(tiny_testbed, testbed_texts):
    model, tokenizer = tiny_testbed.told, tiny_testbed.tokenizer
    coders = {"layers.0": coder_of(model.config.hidden_size, "zero")}
    plain = splice_fidelity(model, tokenizer, coders, testbed_texts)
    kept = splice_fidelity(
        model, tokenizer, coders, testbed_texts, leave_tokens=tokenizer.all_special_ids
    )
    assert kept.recovery == pytest.approx(0, abs=1e-6)
    assert (kept.zeroed.values != plain.zeroed.values).all()


def test_mean_rows_are_of_the_tokens_that_they_replace(llama, tokenizer):
    with torch.no_grad():
        llama.model.embed_tokens.weight[0] *= 1000  # the first token of every text
    coders = {"embed": coder_of(WIDTH, "zero")}
    acts = capture(llama, tokenizer, LONG, ["embed"])
    own = acts["embed"][acts.position > 0].mean(0)
    for how in ({"leave_first": True}, {"leave_tokens": [0]}, {"sink_ratio": 10.0}):
        found = splice_fidelity(llama, tokenizer, coders, LONG, **how)
        with ablated(llama, {"embed": own}, **how):
            expected = splice_fidelity(
                llama, tokenizer, {"layers.0": coder_of(WIDTH, "identity")}, LONG
            ).clean
        assert found.averaged.values == pytest.approx(expected.values, rel=1e-5)
        whole = splice_fidelity(llama, tokenizer, coders, LONG)
        assert found.averaged.mean != pytest.approx(whole.averaged.mean, rel=1e-3)


def test_where_zeros_do_no_harm_recovery_is_undefined(llama, tokenizer):
    with torch.no_grad():  # a model that says nothing in any case
        llama.model.norm.weight.zero_()
    found = splice_fidelity(llama, tokenizer, {"layers.1": coder_of(WIDTH, "zero")}, LONG)
    assert np.isnan(found.recovery) and np.isnan(found.recovery_interval).all()
    written = found.to_json()
    assert written["recovery"] is None and written["recovery_interval"] is None


def test_bad_texts_and_dictionaries_are_refused(llama, tokenizer):
    coder = coder_of(WIDTH, "identity")
    bare = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer.__class__.from_str(
            json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | {"post_processor": None})
        ),
    )
    with pytest.raises(ValueError, match="text 1 .* has one token"):
        splice_fidelity(llama, bare, {"layers.1": coder}, [TEXTS[0], "x"])
    with torch.no_grad():
        coder.b_dec[0] = float("nan")
    with pytest.raises(ValueError, match="spliced of text 0 is not finite"):
        splice_fidelity(llama, tokenizer, {"layers.1": coder}, LONG)
    assert hooks(llama) == 0
