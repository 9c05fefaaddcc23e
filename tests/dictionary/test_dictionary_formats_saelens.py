import json

import foreign_files as foreign
import numpy as np
import pytest
import torch
from foreign_files import D, H, K, array, draw, rows, weights

from manifold_unlearn.dictionary import SparseAutoencoder, Transcoder
from manifold_unlearn.dictionary.formats import DictionaryFormatError, load

META = {"model_name": "gpt2-small", "hook_name": "blocks.5.hook_resid_pre"}


@pytest.mark.parametrize("centered", [True, False])
def test_standard(tmp_path, centered):
    w, x = weights(), rows()
    foreign.saelens(tmp_path, "standard", w, META, apply_b_dec_to_input=centered)
    coder = load(tmp_path)
    f = foreign.relu(foreign.pre(x, w, w["b_dec"] if centered else None))
    foreign.agree(coder, x, f, foreign.decode(f, w))
    assert type(coder) is SparseAutoencoder
    assert coder.centered is centered
    assert coder.origin["site"] == "layers.4"
    assert coder.origin["model"] == "gpt2-small"
    assert coder.origin["config"]["metadata"]["hook_name"] == META["hook_name"]


@pytest.mark.parametrize("ranked", [True, False])
@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_topk_ranks_by_the_decoders_norms_where_it_says_so(tmp_path, architecture, ranked):
    w, x = weights(), rows()
    foreign.saelens(tmp_path, architecture, w, k=K, rescale_acts_by_decoder_norm=ranked)
    z = foreign.pre(x, w, w["b_dec"])
    compared = z * (np.linalg.norm(array(w["W_dec"]), axis=1) if ranked else 1)
    if architecture == "abstopk":
        f = foreign.top(z, K, np.abs(compared))
    else:
        f = foreign.top(foreign.relu(z), K, compared)
    foreign.agree(load(tmp_path), x, f, foreign.decode(f, w))


@pytest.mark.parametrize("logarithm", [True, False])
def test_jumprelu_keeps_what_is_positive_and_above_the_threshold(tmp_path, logarithm):
    w, x = weights(), rows()
    threshold = draw(H, seed=7)
    if logarithm:
        foreign.saelens(tmp_path, "jumprelu", {**w, "log_threshold": threshold})
        threshold = threshold.exp()
    else:
        foreign.saelens(tmp_path, "jumprelu", {**w, "threshold": threshold})
        assert (threshold < 0).any()
    f = foreign.jump(foreign.pre(x, w, w["b_dec"]), threshold)
    foreign.agree(load(tmp_path), x, f, foreign.decode(f, w))


def test_gated(tmp_path):
    w, x = weights(), rows()
    gates = {
        name: draw(H, seed=i, scale=0.5) for i, name in enumerate(["b_gate", "b_mag", "r_mag"])
    }
    b_enc = w.pop("b_enc")
    foreign.saelens(tmp_path, "gated", {**w, **gates})
    z = foreign.pre(x, {**w, "b_enc": 0 * b_enc}, w["b_dec"])
    magnitude = foreign.relu(z * np.exp(array(gates["r_mag"])) + array(gates["b_mag"]))
    f = np.where(z + array(gates["b_gate"]) > 0, magnitude, 0)
    foreign.agree(load(tmp_path), x, f, foreign.decode(f, w))


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_a_checkpoint_of_batchtopk_fires_above_its_threshold(tmp_path, architecture):
    w, x = weights(), rows()
    threshold = torch.tensor(0.7, dtype=torch.float64)
    foreign.saelens(tmp_path, architecture, {**w, "topk_threshold": threshold}, k=3.4)
    coder = load(tmp_path)
    f = foreign.jump(foreign.pre(x, w, w["b_dec"]), threshold)
    foreign.agree(coder, x, f, foreign.decode(f, w))
    assert coder.dtype == torch.float32
    assert coder.nonlinearity.k == 3


@pytest.mark.parametrize("jumps", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_transcoders(tmp_path, jumps, skip):
    w, x = weights(d_out=4), rows()
    tensors = dict(w)
    name = "_".join(["jumprelu"] * jumps + ["skip"] * skip + ["transcoder"])
    if jumps:
        tensors["threshold"] = draw(H, seed=7).abs()
    if skip:
        tensors["W_skip"] = draw(4, D, seed=8)
        w["W_skip"] = tensors["W_skip"].T
    hooks = {"hook_name": "blocks.2.mlp.hook_in", "hook_name_out": "blocks.2.hook_mlp_out"}
    foreign.saelens(tmp_path, name, tensors, hooks, d_out=4, apply_b_dec_to_input=False)
    coder = load(tmp_path)
    z = foreign.pre(x, w)
    f = foreign.jump(z, tensors["threshold"]) if jumps else foreign.relu(z)
    foreign.agree(coder, x, f, foreign.decode(f, w, x if skip else None))
    assert isinstance(coder, Transcoder)
    assert coder.origin["site_in"] == "layers.2.mlp.input"
    assert coder.origin["site_out"] == "layers.2.mlp"


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
def test_rows_are_normalized_and_outputs_brought_back(tmp_path, kind):
    w, x = weights(), 1e-3 * rows()  # small: 1e-5 is added where it divides, and only there
    foreign.saelens(tmp_path, "standard", w, normalize_activations=kind)
    z = array(x)
    if kind == "layer_norm":
        mean, size = z.mean(1, keepdims=True), z.std(1, ddof=1, keepdims=True)
        scaled = (z - mean) / (size + 1e-5)
    else:
        mean, size = 0, np.linalg.norm(z, axis=1, keepdims=True) / np.sqrt(D)
        scaled = z / size
    f = foreign.relu(foreign.pre(torch.from_numpy(scaled), w, w["b_dec"]))
    foreign.agree(load(tmp_path), x, f, foreign.decode(f, w) * size + mean, 1e-4)


def test_a_training_that_scales_its_rows_keeps_the_factor_beside(tmp_path):
    w, x = weights(), rows()
    foreign.saelens(tmp_path, "standard", w, normalize_activations="expected_average_only_in")
    with pytest.warns(UserWarning, match="without the factor"):
        plain = load(tmp_path)
    f = foreign.relu(foreign.pre(x, w, w["b_dec"]))
    foreign.agree(plain, x, f, foreign.decode(f, w))
    foreign.write_json(tmp_path / "activation_scaler.json", {"scaling_factor": 2.5})
    f = foreign.relu(foreign.pre(2.5 * x, w, w["b_dec"]))
    foreign.agree(load(tmp_path), x, f, foreign.decode(f, w) / 2.5)


@pytest.mark.parametrize("centered", [True, False])
def test_whitening_is_folded_into_the_weights(tmp_path, centered):
    w, x = weights(), rows()
    config = {"normalize_activations": "covariance_whitening", "apply_b_dec_to_input": centered}
    foreign.saelens(tmp_path, "standard", w, **config)
    with pytest.raises(DictionaryFormatError, match="activation_whitening.safetensors is missing"):
        load(tmp_path)
    mean, matrix = draw(D, seed=1).double(), (draw(D, D, seed=2) + 3 * torch.eye(D)).double()
    kept = {"mean": mean, "matrix": matrix, "inverse_matrix": torch.linalg.inv(matrix)}
    foreign.write_safetensors(tmp_path / "activation_whitening.safetensors", kept)
    z = torch.from_numpy((array(x) - mean.numpy()) @ matrix.numpy())
    f = foreign.relu(foreign.pre(z, w, w["b_dec"] if centered else None))
    back = foreign.decode(f, w) @ np.linalg.inv(matrix.numpy()) + mean.numpy()
    foreign.agree(load(tmp_path), x, f, back, 1e-4)


def test_files_of_version_5_are_flat_and_spelled_otherwise(tmp_path):
    w, x = weights(), rows()
    config = {
        "d_in": D,
        "d_sae": H,
        "hook_point": "blocks.3.attn.hook_z",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": False,
        "model_name": "gpt2",
    }
    foreign.write_json(tmp_path / "cfg.json", config)
    tensors = {**w, "scaling_factor": torch.ones(H)}
    foreign.write_safetensors(tmp_path / "sae_weights.safetensors", tensors)
    coder = load(tmp_path)
    f = foreign.top(foreign.relu(foreign.pre(x, w, w["b_dec"])), K)
    foreign.agree(coder, x, f, foreign.decode(f, w))
    assert coder.origin["site"] == "blocks.3.attn.hook_z"


def test_a_factor_of_a_fine_tuning_scales_what_a_latent_writes(tmp_path):
    w, x = weights(), rows()
    factor = 1 + draw(H, seed=5).abs()
    foreign.saelens(tmp_path, "standard", {**w, "scaling_factor": factor})
    f = foreign.relu(foreign.pre(x, w, w["b_dec"]))
    decoded = foreign.decode(f * array(factor), w)
    foreign.agree(load(tmp_path), x, f, decoded)


@pytest.mark.parametrize(
    ("architecture", "config", "words"),
    [
        ("matching_pursuit", {}, "matching_pursuit: its code is found by iteration"),
        ("temporal", {}, "temporal: its code depends on the tokens before"),
        ("newer", {}, "architecture 'newer', which is not one of standard"),
        ("standard", {"activation_fn": "tanh-relu"}, "the activation 'tanh-relu'"),
        ("standard", {"normalize_activations": "odd"}, "normalize_activations='odd'"),
        ("transcoder", {"normalize_activations": "layer_norm"}, "cannot be expressed"),
        ("topk", {"k": 0}, "k=0 must be at least 1"),
        ("topk", {"k": "three"}, "k='three' is not a whole number"),
        ("topk", {}, "k=None is not a whole number"),
        ("jumprelu", {}, "has no tensor threshold"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(tmp_path, architecture, config, words):
    foreign.saelens(tmp_path, architecture, weights(), **config)
    with pytest.raises(DictionaryFormatError, match=words):
        load(tmp_path)


def test_what_is_said_of_the_training_does_not_overrule_what_is(tmp_path):
    about = {"k": 99, "apply_b_dec_to_input": False, "training_architecture": "batchtopk"}
    foreign.saelens(tmp_path, "topk", weights(), about, k=K)
    coder = load(tmp_path)
    assert coder.nonlinearity.k == K
    assert coder.centered


def test_weights_without_their_configuration_say_what_is_missing(tmp_path):
    foreign.saelens(tmp_path, "standard", weights())
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(DictionaryFormatError, match="cfg.json is missing"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_file_of_the_directory_means_the_directory(tmp_path, name):
    foreign.saelens(tmp_path, "standard", weights())
    assert torch.equal(load(tmp_path / name).W_enc, weights()["W_enc"])


def test_half_precision_stays_and_mixed_precision_is_not_lost(tmp_path):
    half = {name: value.bfloat16() for name, value in weights().items()}
    foreign.saelens(tmp_path / "half", "standard", half)
    assert load(tmp_path / "half").dtype == torch.bfloat16
    foreign.saelens(tmp_path / "mixed", "standard", {**half, "b_dec": weights()["b_dec"]})
    mixed = load(tmp_path / "mixed")
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed.b_dec, weights()["b_dec"])


def test_gemma_reads_the_mlp_behind_a_norm(tmp_path):
    hooks = {"model_name": "gemma-2-2b", "hook_name": "blocks.7.hook_mlp_out"}
    foreign.saelens(tmp_path, "standard", weights(), hooks)
    assert load(tmp_path).origin["site"] == "model.layers.7.post_feedforward_layernorm"


def test_the_configuration_of_origin_is_json(tmp_path):
    foreign.saelens(tmp_path, "standard", weights(), {"odd": float("nan")})
    json.dumps(load(tmp_path).origin, allow_nan=False)
