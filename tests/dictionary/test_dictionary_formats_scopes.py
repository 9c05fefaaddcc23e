import math

import foreign_files as foreign
import numpy as np
import pytest
import torch
from foreign_files import D, H, K, array, draw, rows, weights

from manifold_unlearn.dictionary import CrossLayerTranscoder, SparseAutoencoder, Transcoder
from manifold_unlearn.dictionary.formats import DictionaryFormatError, load

RES = "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"


def npz(directory, w, threshold, lower=False):
    directory.mkdir(parents=True)
    tensors = {**w, "threshold": threshold}
    named = {k.lower() if lower else k: v.numpy() for k, v in tensors.items()}
    np.savez(directory / "params.npz", **named)
    return directory


@pytest.mark.parametrize("lower", [False, True])
def test_gemma_scope(tmp_path, lower):
    w, x, threshold = weights(), rows(), draw(H, seed=7)
    coder = load(npz(tmp_path / RES, w, threshold, lower))
    f = foreign.jump(foreign.pre(x, w), threshold)
    foreign.agree(coder, x, f, foreign.decode(f, w))
    assert coder.origin["site"] == "layers.20"
    assert coder.origin["model"] == "google/gemma-2-2b"
    assert type(coder) is SparseAutoencoder


@pytest.mark.parametrize(
    ("folder", "sites"),
    [
        ("gemma-scope-9b-it-res/layer_3/a", {"site": "layers.3"}),
        ("gemma-scope-9b-pt-att/layer_3/a", {"site": "blocks.3.attn.hook_z"}),
        (
            "gemma-scope-9b-pt-mlp/layer_3/a",
            {"site": "model.layers.3.post_feedforward_layernorm"},
        ),
        (
            "models--google--gemma-scope-2b-pt-transcoders/snapshots/f00/layer_3/a",
            {
                "site_in": "blocks.3.ln2.hook_normalized",
                "site_out": "model.layers.3.post_feedforward_layernorm",
            },
        ),
        ("elsewhere", {}),
    ],
)
def test_the_path_of_gemma_scope_says_where_it_reads(tmp_path, folder, sites):
    coder = load(npz(tmp_path / folder, weights(), draw(H)))
    found = {name: v for name, v in coder.origin.items() if name.startswith("site")}
    assert found == sites
    assert isinstance(coder, Transcoder) == ("site_out" in sites)


def test_gemma_scope_of_embeddings_reads_rows_before_they_are_scaled(tmp_path):
    w, x, threshold = weights(), rows(), draw(H, seed=7).abs()
    folder = "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
    coder = load(npz(tmp_path / folder, w, threshold))
    f = foreign.jump(foreign.pre(x / math.sqrt(D), w), threshold)
    out = foreign.decode(f * math.sqrt(D), w)
    foreign.agree(coder, x, f, out)
    assert coder.origin["site"] == "embed"


def test_one_of_several_in_gemma_scope_is_found_by_its_path(tmp_path):
    npz(tmp_path / RES, weights(), draw(H))
    assert load(tmp_path).origin["site"] == "layers.20"
    npz(tmp_path / RES.replace("20", "21"), weights(), draw(H))
    with pytest.raises(DictionaryFormatError, match="2 dictionaries"):
        load(tmp_path / "gemma-scope-2b-pt-res")


HOOKS = {
    "architecture": "jump_relu",
    "model_name": "google/gemma-3-1b-pt",
    "hf_hook_point_in": "model.layers.9.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.9.post_feedforward_layernorm.output",
}


def lower(w):
    return {name.lower(): value for name, value in w.items()}


@pytest.mark.parametrize("skip", [False, True])
def test_gemma_scope_2_transcoder(tmp_path, skip):
    w, x, threshold = weights(), rows(), draw(H, seed=7)
    tensors = {**lower(w), "threshold": threshold}
    if skip:
        w["W_skip"] = tensors["affine_skip_connection"] = draw(D, D, seed=8)
    foreign.write_json(tmp_path / "config.json", {**HOOKS, "affine_connection": skip})
    foreign.write_safetensors(tmp_path / "params.safetensors", tensors)
    coder = load(tmp_path)
    f = foreign.jump(foreign.pre(x, w), threshold)
    foreign.agree(coder, x, f, foreign.decode(f, w, x if skip else None))
    assert coder.origin["site_in"] == "model.layers.9.pre_feedforward_layernorm"
    assert coder.origin["site_out"] == "model.layers.9.post_feedforward_layernorm"


def test_gemma_scope_2_autoencoder(tmp_path):
    w, x, threshold = weights(), rows(), draw(H, seed=7)
    said = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.9.output"}
    foreign.write_json(tmp_path / "config.json", said)
    foreign.write_safetensors(tmp_path / "params.safetensors", {**lower(w), "threshold": threshold})
    coder = load(tmp_path)
    f = foreign.jump(foreign.pre(x, w), threshold)
    foreign.agree(coder, x, f, foreign.decode(f, w))
    assert type(coder) is SparseAutoencoder
    assert coder.origin["site"] == "layers.9"


def clt_files(directory, n_layers=3, **extra):
    layers = []
    for i in range(n_layers):
        decoder = draw(H, n_layers, D, seed=i)
        decoder[:, :i] = 0
        w = {**lower(weights(seed=10 * i)), "w_dec": decoder, "threshold": draw(H, seed=i).abs()}
        layers.append(w)
        w |= {name: value + i for name, value in extra.items()}
        foreign.write_safetensors(directory / f"params_layer_{i}.safetensors", w)
    return layers


@pytest.mark.parametrize("skip", [False, True])
def test_gemma_scope_2_cross_layer_transcoder(tmp_path, skip):
    around = {"affine_skip_connection": draw(D, D, seed=6)} if skip else {}
    layers, x = clt_files(tmp_path, **around), draw(40, 3, D, seed=5)
    foreign.write_json(tmp_path / "config.json", HOOKS)
    coder = load(tmp_path)
    f = np.stack(
        [
            foreign.jump(array(x[:, i]) @ array(w["w_enc"]) + array(w["b_enc"]), w["threshold"])
            for i, w in enumerate(layers)
        ],
        axis=1,
    )
    out = np.einsum("nih,ihld->nld", f, np.stack([array(w["w_dec"]) for w in layers]))
    out += np.stack([array(w["b_dec"]) for w in layers])
    if skip:
        linear = np.stack([array(w["affine_skip_connection"]) for w in layers])
        out += np.einsum("nid,ido->nio", array(x), linear)
    foreign.agree(coder, x, f, out)
    assert isinstance(coder, CrossLayerTranscoder)
    assert coder.origin["site_in"][2] == "model.layers.2.pre_feedforward_layernorm"


def test_what_a_cross_layer_transcoder_of_gemma_scope_2_may_not_hold(tmp_path):
    layers = clt_files(tmp_path / "skip", affine_skip_connection=torch.ones(D, D))
    del layers[1]["affine_skip_connection"]
    foreign.write_safetensors(tmp_path / "skip" / "params_layer_1.safetensors", layers[1])
    with pytest.raises(DictionaryFormatError, match="2 of the 3 hold affine_skip"):
        load(tmp_path / "skip")
    clt_files(tmp_path / "gap")
    (tmp_path / "gap" / "params_layer_1.safetensors").unlink()
    with pytest.raises(DictionaryFormatError, match="holds the layers 0, 2"):
        load(tmp_path / "gap")
    (tmp_path / "gap" / "params_layer_2.safetensors").unlink()
    with pytest.raises(DictionaryFormatError, match="writes 3 layers, .* of 1 that are here"):
        load(tmp_path / "gap")
    foreign.write_json(tmp_path / "skip" / "config.json", {"architecture": "topk"})
    with pytest.raises(DictionaryFormatError, match="architecture 'topk'; jump_relu"):
        load(tmp_path / "skip")


def linear(w):
    return {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
        "decoder.bias": w["b_dec"],
    }


def llama(directory, w, **said):
    config = {
        "d_model": D,
        "d_sae": H,
        "hook_point_in": "blocks.15.hook_resid_post",
        "hook_point_out": "blocks.15.hook_resid_post",
        "jump_relu_threshold": 0.6,
        "dataset_average_activation_norm": {"in": 5.0, "out": 8.0},
        **said,
    }
    foreign.write_json(directory / "hyperparams.json", config)
    foreign.write_safetensors(directory / "checkpoints" / "final.safetensors", linear(w))


@pytest.mark.parametrize("inner", ["", "hyperparams.json", "checkpoints/final.safetensors"])
def test_llama_scope_scales_rows_and_threshold_alike(tmp_path, inner):
    w, x = weights(), rows()
    llama(tmp_path, w)
    factor = math.sqrt(D) / 5
    z = foreign.pre(factor * x, w)
    f = np.where(z > 0.6 * factor, z, 0)
    coder = load(tmp_path / inner)
    foreign.agree(coder, x, f, foreign.decode(f, w) / factor)
    assert coder.origin["site"] == "layers.15"


def test_llama_scope_transcoder_scales_its_output_by_another_norm(tmp_path):
    w, x = weights(), rows()
    llama(tmp_path, w, hook_point_out="blocks.15.hook_mlp_out")
    factor, out = math.sqrt(D) / 5, math.sqrt(D) / 8
    z = foreign.pre(factor * x, w)
    f = np.where(z > 0.6 * factor, z, 0)
    coder = load(tmp_path)
    foreign.agree(coder, x, f, foreign.decode(f, w) / out)
    assert coder.origin["site_out"] == "layers.15.mlp"


def test_llama_scope_of_r1_holds_the_logarithm_of_its_thresholds(tmp_path):
    w, x, logarithm = weights(), rows(), draw(H, seed=7)
    said = {"d_model": D, "expansion_factor": 4, "hook_point_in": "blocks.3.hook_resid_post"}
    foreign.write_json(tmp_path / "config.json", said)
    tensors = {**linear(w), "log_jumprelu_threshold": logarithm}
    foreign.write_safetensors(tmp_path / "sae_weights.safetensors", tensors)
    coder = load(tmp_path)
    f = foreign.jump(foreign.pre(x, w), logarithm.exp())
    foreign.agree(coder, x, f, foreign.decode(f, w))
    assert coder.origin["site"] == "layers.3"


def test_llama_scope_without_the_norm_of_its_data_is_refused(tmp_path):
    llama(tmp_path, weights(), dataset_average_activation_norm={})
    with pytest.raises(DictionaryFormatError, match=r"norm\.in=None is not a positive number"):
        load(tmp_path)
    (tmp_path / "hyperparams.json").unlink()
    with pytest.raises(DictionaryFormatError, match="hyperparams.json is missing"):
        load(tmp_path / "checkpoints" / "final.safetensors")


def qwen(directory, layers=(0, 7)):
    for layer in layers:
        w = weights(seed=layer)
        foreign.write_torch(
            directory / f"layer{layer}.sae.pt",
            {**w, "W_enc": w["W_enc"].T.contiguous(), "W_dec": w["W_dec"].T.contiguous()},
        )
    return directory


def test_qwen_scope(tmp_path):
    place = qwen(tmp_path / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}")
    w, x = weights(seed=7), rows()
    f = foreign.top(foreign.relu(foreign.pre(x, w)), K)
    for coder in (load(place, layer=7), load(place / "layer7.sae.pt")):
        foreign.agree(coder, x, f, foreign.decode(f, w))
        assert coder.origin["site"] == "layers.7"
        assert coder.origin["model"] == "Qwen/Qwen3-1.7B-Base"
    with pytest.raises(DictionaryFormatError, match="layers 0, 7, and none was asked for"):
        load(place)
    with pytest.raises(DictionaryFormatError, match="layers 0, 7, and 3 was asked for"):
        load(place, layer=3)


def test_qwen_scope_elsewhere_asks_for_k(tmp_path):
    place = qwen(tmp_path / "mine", layers=[2])
    with pytest.raises(DictionaryFormatError, match="give k= that number"):
        load(place)
    assert load(place, k=5).nonlinearity.k == 5


def openai(path, w, **said):
    state = {
        "pre_bias": w["b_dec"],
        "encoder.weight": w["W_enc"].T.contiguous(),
        "latent_bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
        "stats_last_nonzero": torch.zeros(H, dtype=torch.long),
        "latents_activation_frequency": torch.zeros(H),
        "latents_mean_square": torch.zeros(H),
        **said,
    }
    foreign.write_torch(path, state)
    return path


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_openai_topk_normalizes_each_row(tmp_path, size):
    w, x = weights(), size * rows()
    state = {"k": K, "postact_fn": "ReLU"}
    path = openai(tmp_path / "32k.pt", w, activation="TopK", activation_state_dict=state)
    z = array(x)
    mean, std = z.mean(1, keepdims=True), z.std(1, ddof=1, keepdims=True)
    scaled = torch.from_numpy((z - mean) / (std + 1e-5))
    f = foreign.top(foreign.relu(foreign.pre(scaled, w, w["b_dec"])), K)
    foreign.agree(load(path), x, f, foreign.decode(f, w) * std + mean, 1e-4)


def test_openai_relu_does_not(tmp_path):
    w, x = weights(), rows()
    path = openai(tmp_path / "a.pt", w, activation="ReLU", activation_state_dict={})
    f = foreign.relu(foreign.pre(x, w, w["b_dec"]))
    foreign.agree(load(path), x, f, foreign.decode(f, w))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"activation": "GELU"}, "activation='GELU'"),
        (
            {"activation": "TopK", "activation_state_dict": {"k": 3, "postact_fn": "Identity"}},
            "followed by 'Identity'",
        ),
        ({"activation": "TopK"}, "k=None is not a whole number"),
    ],
)
def test_other_activations_of_openai_are_refused(tmp_path, said, words):
    with pytest.raises(DictionaryFormatError, match=words):
        load(openai(tmp_path / "a.pt", weights(), **said))


@pytest.mark.parametrize("spelling", ["", "_linear"])
def test_two_linear_layers(tmp_path, spelling):
    w, x = weights(), rows()
    state = {name.replace(".", f"{spelling}."): value for name, value in linear(w).items()}
    foreign.write_torch(tmp_path / "DeepSeek-R1-Distill-Llama-8B-l19.pt", state)
    coder = load(tmp_path)
    f = foreign.relu(foreign.pre(x, w))
    foreign.agree(coder, x, f, foreign.decode(f, w))
    assert coder.origin["site"] == "layers.19"
