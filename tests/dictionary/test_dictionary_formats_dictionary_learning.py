import foreign_files as foreign
import numpy as np
import pytest
import torch
from foreign_files import D, H, K, array, draw, rows, weights

from manifold_unlearn.dictionary.formats import DictionaryFormatError, load

ABOUT = {"layer": 4, "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_4"}


def linear(w):
    """Names of torch's linear layers."""
    return {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
    }


def trained(directory, value, dict_class=None, name="ae.pt"):
    foreign.write_torch(directory / name, value)
    if dict_class:
        trainer = {"dict_class": dict_class, "activation_dim": D, "dict_size": H, **ABOUT}
        foreign.write_json(
            directory / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 128}}
        )
    return directory


def test_autoencoder(tmp_path):
    w, x = weights(), rows()
    coder = load(trained(tmp_path, {**linear(w), "bias": w["b_dec"]}, "AutoEncoder"))
    f = foreign.relu(foreign.pre(x, w, w["b_dec"]))
    foreign.agree(coder, x, f, foreign.decode(f, w))
    assert coder.origin["site"] == "layers.4"
    assert coder.origin["model"] == "EleutherAI/pythia-70m"


def test_autoencoder_new_subtracts_nothing(tmp_path):
    w, x = weights(), rows()
    coder = load(trained(tmp_path, {**linear(w), "decoder.bias": w["b_dec"]}, "AutoEncoderNew"))
    f = foreign.relu(foreign.pre(x, w))
    foreign.agree(coder, x, f, foreign.decode(f, w))
    assert coder.origin["format"] == "dictionary_learning"


def test_topk_keeps_its_k_whatever_the_threshold(tmp_path):
    w, x = weights(), rows()
    state = {**linear(w), "b_dec": w["b_dec"], "k": torch.tensor(K, dtype=torch.int)}
    state["threshold"] = torch.tensor(0.9)
    coder = load(trained(tmp_path, state, "AutoEncoderTopK"))
    f = foreign.top(foreign.relu(foreign.pre(x, w, w["b_dec"])), K)
    foreign.agree(coder, x, f, foreign.decode(f, w))


@pytest.mark.parametrize("threshold", [0.9, -1.0])
@pytest.mark.parametrize("nested", [False, True])
def test_batchtopk_fires_above_its_threshold(tmp_path, nested, threshold):
    w, x = weights(), rows()
    about = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(threshold)}
    if nested:
        state, kind = {**w, "group_sizes": torch.tensor([5, 15])}, "MatryoshkaBatchTopKSAE"
    else:
        state, kind = {**linear(w), "b_dec": w["b_dec"]}, "BatchTopKSAE"
    coder = load(trained(tmp_path, {**state, **about}, kind))
    z = foreign.relu(foreign.pre(x, w, w["b_dec"]))
    f = z * (z > threshold)
    foreign.agree(coder, x, f, foreign.decode(f, w))
    assert coder.nonlinearity.k == K


def test_jumprelu_does_not_subtract_the_bias(tmp_path):
    w, x = weights(), rows()
    threshold = draw(H, seed=7)
    coder = load(trained(tmp_path, {**w, "threshold": threshold}, "JumpReluAutoEncoder"))
    z = foreign.pre(x, w)
    f = foreign.relu(z * (z > array(threshold)))
    foreign.agree(coder, x, f, foreign.decode(f, w))


def gated_state(w):
    return {
        "decoder_bias": w["b_dec"],
        "encoder.weight": w["W_enc"].T.contiguous(),
        "decoder.weight": w["W_dec"].T.contiguous(),
        **{name: draw(H, seed=i) for i, name in enumerate(["r_mag", "gate_bias", "mag_bias"])},
    }


def gated(x, w, state):
    z = foreign.pre(x, {**w, "b_enc": torch.zeros(H)}, w["b_dec"])
    magnitude = np.exp(array(state["r_mag"])) * z + array(state["mag_bias"])
    return np.where(z + array(state["gate_bias"]) > 0, foreign.relu(magnitude), 0)


def test_gated(tmp_path):
    w, x = weights(), rows()
    state = gated_state(w)
    f = gated(x, w, state)
    coder = load(trained(tmp_path, state, "GatedAutoEncoder"))
    foreign.agree(coder, x, f, foreign.decode(f, w))


@pytest.mark.parametrize("kind", ["AutoEncoder", "BatchTopKSAE"])
def test_a_backup_is_nested_and_reads_rows_over_a_factor(tmp_path, kind):
    w, x, factor = weights(), rows(), 2.5
    state = {**linear(w), "b_dec": w["b_dec"], "bias": w["b_dec"]}
    threshold = -np.inf
    if kind == "BatchTopKSAE":
        threshold = 0.4
        del state["bias"]
        state |= {"k": torch.tensor(K), "threshold": torch.tensor(threshold)}
    else:
        del state["b_dec"]
    backup = {
        "step": 10,
        "ae": state,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]},
        "config": {"dict_class": kind, **ABOUT},
        "norm_factor": factor,
    }
    coder = load(trained(tmp_path, backup))
    scaled = {**w, **{name: factor * w[name] for name in ("b_enc", "b_dec")}}
    z = foreign.relu(foreign.pre(x, scaled, scaled["b_dec"]))
    f = z * (z > factor * threshold)
    foreign.agree(coder, x, f, foreign.decode(f, scaled))
    small = (array(x) / factor - array(w["b_dec"])) @ array(w["W_enc"]) + array(w["b_enc"])
    small = foreign.relu(small) * (small > threshold)
    out = factor * foreign.decode(small, w)
    np.testing.assert_allclose(foreign.decode(f, scaled), out, rtol=1e-4)  # biases in float32
    assert coder.origin["site"] == "layers.4"


def test_a_checkpoint_is_taken_by_its_step(tmp_path):
    last, earlier = weights(), weights(seed=40)
    trained(tmp_path, {**linear(last), "bias": last["b_dec"]}, "AutoEncoder")
    state = {**linear(earlier), "bias": earlier["b_dec"]}
    trained(tmp_path, state, name="checkpoints/ae_500.pt")
    assert torch.equal(load(tmp_path).W_enc, last["W_enc"])
    assert torch.equal(load(tmp_path, step=500).W_enc, earlier["W_enc"])
    by_path = load(tmp_path / "checkpoints" / "ae_500.pt")
    assert torch.equal(by_path.W_enc, earlier["W_enc"])
    assert by_path.origin["site"] == "layers.4"
    with pytest.raises(FileNotFoundError, match=r"ae_7\.pt does not exist"):
        load(tmp_path, step=7)


def test_without_a_configuration_a_file_may_not_say_its_class(tmp_path):
    w = weights()
    state = {**linear(w), "b_dec": w["b_dec"], "k": torch.tensor(K), "threshold": torch.tensor(0.3)}
    trained(tmp_path, state)
    with pytest.raises(DictionaryFormatError, match="give dict_class= one of them"):
        load(tmp_path)
    assert load(tmp_path, dict_class="BatchTopKSAE").nonlinearity.name == "batch_topk"
    assert load(tmp_path, dict_class="AutoEncoderTopK").nonlinearity.name == "topk"
