import foreign_files as foreign
import numpy as np
import pytest
import torch
from foreign_files import D, H, K, array, draw, rows, weights

from manifold_unlearn.dictionary import (
    Crosscoder,
    CrossLayerTranscoder,
    SparseAutoencoder,
    Transcoder,
)
from manifold_unlearn.dictionary.formats import DictionaryFormatError, load


class LanguageModelConfig:
    """Stands for the class whose objects the peer pickles; no reader may need it."""

    def __init__(self, **fields):
        self.__dict__.update(fields)


@pytest.mark.parametrize("transcodes", [True, False])
def test_transcoder_circuits(tmp_path, transcodes):
    w, x = weights(), rows()
    config = LanguageModelConfig(
        hook_point="blocks.8.ln2.hook_normalized" if transcodes else "blocks.8.hook_mlp_out",
        out_hook_point="blocks.8.hook_mlp_out",
        model_name="gpt2-small",
        dtype=torch.float32,
        device=torch.device("cpu"),
        is_transcoder=transcodes,
        lr=[1e-3, {"nested": (1, None)}],
    )
    state, out = dict(w), w
    if transcodes:
        state["b_dec_out"] = draw(D, seed=9)
        out = {**w, "b_dec": state["b_dec_out"]}
    foreign.write_torch(tmp_path / "final.pt", {"cfg": config, "state_dict": state})
    coder = load(tmp_path / "final.pt")
    f = foreign.relu(foreign.pre(x, w, w["b_dec"]))
    foreign.agree(coder, x, f, foreign.decode(f, out))
    assert type(coder) is (Transcoder if transcodes else SparseAutoencoder)
    assert coder.origin["config"]["lr"] == [1e-3, {"nested": [1, None]}]
    assert coder.origin["config"]["dtype"] == "torch.float32"
    key, site = ("site_out", "layers.8.mlp") if transcodes else ("site", "layers.8.mlp")
    assert coder.origin[key] == site
    if transcodes:
        assert coder.origin["site_in"] == "blocks.8.ln2.hook_normalized"
        assert torch.equal(coder.b_in, w["b_dec"])


def test_a_transposed_tensor_of_a_pickle_keeps_its_order(tmp_path):
    w = weights()
    w["W_enc"] = draw(H, D).T  # stored by columns
    value = {
        "cfg": LanguageModelConfig(),
        "state_dict": {k: torch.nn.Parameter(v) for k, v in w.items()},
    }
    foreign.write_torch(tmp_path / "a.pt", value)
    assert torch.equal(load(tmp_path).W_enc, draw(H, D).T)


def plt(directory, rule, skip=False, layers=(0, 1)):
    said = {
        "model_name": "meta-llama/Llama-3.2-1B",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "scan": "somewhere",
    }
    lines = [f"{name}: {value}" for name, value in said.items()]
    if rule == "topk":
        lines += ["activation: topk", f"k: {K}"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text("\n".join(lines))
    for i in layers:
        w = weights(seed=i)
        tensors = {**w, "W_enc": w["W_enc"].T}
        if rule == "jumprelu":
            tensors["activation_function.threshold"] = draw(H, seed=7)
        if skip:
            tensors["W_skip"] = draw(D, D, seed=8)
        foreign.write_safetensors(directory / f"layer_{i}.safetensors", tensors)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("rule", ["relu", "jumprelu", "topk"])
def test_circuit_tracers_transcoders(tmp_path, rule, skip):
    plt(tmp_path, rule, skip)
    w, x = weights(seed=1), rows()
    z = foreign.pre(x, w)
    f = {
        "relu": foreign.relu(z),
        "jumprelu": np.where(z > array(draw(H, seed=7)), z, 0),  # negative ones pass too
        "topk": foreign.top(z, K),
    }[rule]
    w["W_skip"] = draw(D, D, seed=8).T
    for coder in (load(tmp_path, layer=1), load(tmp_path / "layer_1.safetensors")):
        foreign.agree(coder, x, f, foreign.decode(f, w, x if skip else None))
        assert coder.origin["site_in"] == "layers.1.mlp.input"
        assert coder.origin["site_out"] == "layers.1.mlp"
    with pytest.raises(DictionaryFormatError, match="layers 0, 1, and none was asked for"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["transcoder_set", "cross_layer_transcoder"])
def test_a_configuration_that_only_names_weights_says_where_they_lie(tmp_path, kind):
    text = f"model_kind: {kind}\ntranscoders: ['hf://them/a/layer_0.safetensors']\n"
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(FileNotFoundError, match=r"lie at hf://them/a/layer_0.safetensors, .*Fetch"):
        load(tmp_path)
    (tmp_path / "config.yaml").write_text(f"model_kind: {kind}")
    with pytest.raises(FileNotFoundError, match="holds no weights: they lie elsewhere"):
        load(tmp_path)


def test_a_yaml_that_names_objects_is_refused(tmp_path):
    plt(tmp_path, "relu")
    (tmp_path / "config.yaml").write_text("a: !!python/object/apply:os.system ['touch /tmp/x']")
    with pytest.raises(DictionaryFormatError, match="not readable as YAML"):
        load(tmp_path, layer=0)
    (tmp_path / "config.yaml").write_text("activation: gelu")
    with pytest.raises(DictionaryFormatError, match="activation='gelu' is not one of"):
        load(tmp_path, layer=0)


def clt(directory, jumps, n_layers=3, d_out=D):
    layers = []
    for i in range(n_layers):
        w = weights(seed=i)
        encoder = {f"W_enc_{i}": w["W_enc"].T, f"b_enc_{i}": w["b_enc"]}
        encoder[f"b_dec_{i}"] = draw(d_out, seed=i)
        if jumps:
            encoder[f"threshold_{i}"] = draw(H, seed=7 + i)
        decoder = {f"W_dec_{i}": draw(H, n_layers - i, d_out, seed=i)}
        foreign.write_safetensors(directory / f"W_enc_{i}.safetensors", encoder)
        foreign.write_safetensors(directory / f"W_dec_{i}.safetensors", decoder)
        layers.append({**encoder, **decoder})
    text = "model_kind: cross_layer_transcoder\nfeature_input_hook: hook_resid_mid\n"
    (directory / "config.yaml").write_text(text + "feature_output_hook: hook_mlp_out\n")
    return layers


@pytest.mark.parametrize("jumps", [False, True])
def test_circuit_tracers_cross_layer_transcoder(tmp_path, jumps):
    layers, x = clt(tmp_path, jumps, d_out=4), draw(40, 3, D, seed=5)
    f, out = [], np.stack([array(w[f"b_dec_{i}"]) for i, w in enumerate(layers)])
    out = np.repeat(out[None], len(x), axis=0)
    for i, w in enumerate(layers):
        z = array(x[:, i]) @ array(w[f"W_enc_{i}"]).T + array(w[f"b_enc_{i}"])
        f.append(np.where(z > array(w[f"threshold_{i}"]), z, 0) if jumps else foreign.relu(z))
        out[:, i:] += np.einsum("nh,hld->nld", f[i], array(w[f"W_dec_{i}"]))
    coder = load(tmp_path)
    foreign.agree(coder, x, np.stack(f, axis=1), out)
    assert isinstance(coder, CrossLayerTranscoder)
    assert coder.origin["site_in"] == [f"blocks.{i}.hook_resid_mid" for i in range(3)]
    assert coder.origin["site_out"] == [f"layers.{i}.mlp" for i in range(3)]


def test_a_cross_layer_transcoder_must_be_whole(tmp_path):
    layers = clt(tmp_path, False)
    (tmp_path / "W_enc_1.safetensors").unlink()
    with pytest.raises(DictionaryFormatError, match="encoders of layers 0, 2"):
        load(tmp_path)
    (tmp_path / "W_enc_2.safetensors").unlink()
    with pytest.raises(DictionaryFormatError, match="writes 3 layers from 0 on, of 1"):
        load(tmp_path)
    skipping = {**layers[0], "W_skip_0": draw(D, D)}
    foreign.write_safetensors(tmp_path / "W_enc_0.safetensors", skipping)
    with pytest.raises(DictionaryFormatError, match="W_skip_0: no definition"):
        load(tmp_path)


def crosscoder_weights(n=2):
    return {
        "W_enc": draw(n, D, H),
        "W_dec": draw(H, n, D, seed=1),
        "b_enc": draw(H, seed=2),
        "b_dec": draw(n, D, seed=3),
    }


@pytest.mark.parametrize("scale", [None, (2.0, 0.5)])
def test_crosscoder_of_two_models(tmp_path, scale):
    w, x = crosscoder_weights(), draw(40, 2, D, seed=5)
    foreign.write_torch(tmp_path / "cc_weights.pt", w)
    about = {"dict_size": H, "d_in": D, "hook_point": "blocks.14.hook_resid_pre"}
    foreign.write_json(tmp_path / "cfg.json", about)
    if scale is None:
        with pytest.warns(UserWarning, match="scaled to a mean norm of sqrt"):
            coder = load(tmp_path)
    else:
        coder = load(tmp_path, scale=scale)
    s = np.array(scale or (1, 1))[:, None]
    f = foreign.relu(np.einsum("nsd,sdh->nh", array(x) * s, array(w["W_enc"])) + array(w["b_enc"]))
    out = (np.einsum("nh,hsd->nsd", f, array(w["W_dec"])) + array(w["b_dec"])) / s
    foreign.agree(coder, x, f, out)
    assert isinstance(coder, Crosscoder)
    assert coder.origin["site"] == "layers.13"
    with pytest.raises(ValueError, match="needs one factor for each of 2 streams"):
        load(tmp_path, scale=[1.0])


def learned(n=2, **more):
    return {
        "encoder.weight": draw(n, D, H),
        "encoder.bias": draw(H, seed=1),
        "decoder.weight": draw(n, H, D, seed=2),
        "decoder.bias": draw(n, D, seed=3),
        **more,
    }


@pytest.mark.parametrize("kind", ["CROSSCODER", "SAE", "MIXED", "NONE"])
@pytest.mark.parametrize("file", ["model.safetensors", "ae.pt"])
def test_crosscoder_learning(tmp_path, file, kind):
    t, x = learned(), draw(40, 2, D, seed=5)
    at = torch.tensor(["CROSSCODER", "SAE", "MIXED", "NONE"].index(kind) + 1)
    threshold = 2.0
    state = {
        **{f"_orig_mod.{name}": value for name, value in t.items()},
        "k": torch.tensor(K, dtype=torch.int),
        "threshold": torch.tensor(threshold),
        "code_normalization_id": at,
    }
    write = foreign.write_safetensors if file.endswith("safetensors") else foreign.write_torch
    write(tmp_path / file, state)
    foreign.write_json(tmp_path / "config.json", {"code_normalization_alpha_cc": 0.3})
    decoder = array(t["decoder.weight"])
    each = np.linalg.norm(decoder, axis=2).sum(0)
    joint = np.sqrt((decoder**2).sum((0, 2)))
    norm = {"CROSSCODER": each, "SAE": joint, "MIXED": joint + 0.3 * each, "NONE": 1}[kind]
    z = np.einsum("nld,ldf->nf", array(x), array(t["encoder.weight"])) + array(t["encoder.bias"])
    f = np.where(foreign.relu(z) * norm > threshold, foreign.relu(z), 0)
    out = np.einsum("nf,lfd->nld", f, decoder) + array(t["decoder.bias"])
    coder = load(tmp_path)
    foreign.agree(coder, x, f, out)
    assert coder.rank_by_norm == (kind == "CROSSCODER")


def test_crosscoder_learning_without_a_k_is_a_relu(tmp_path):
    t, x = learned(3), draw(40, 3, D, seed=5)
    foreign.write_torch(tmp_path / "cc.pt", t)
    z = np.einsum("nld,ldf->nf", array(x), array(t["encoder.weight"])) + array(t["encoder.bias"])
    f = foreign.relu(z)
    out = np.einsum("nf,lfd->nld", f, array(t["decoder.weight"])) + array(t["decoder.bias"])
    foreign.agree(load(tmp_path), x, f, out)


def test_crosscoder_learning_says_what_it_does_not_hold(tmp_path):
    state = {"k": torch.tensor(K), "threshold": torch.tensor(-1.0)}
    foreign.write_torch(tmp_path / "a" / "cc.pt", learned(**state))
    with pytest.warns(UserWarning, match="no threshold yet"):
        load(tmp_path / "a")
    state["threshold"] = torch.tensor([0.5, 0.5])
    foreign.write_torch(tmp_path / "b" / "cc.pt", learned(**state))
    with pytest.raises(DictionaryFormatError, match="DECOUPLED: each layer has a code"):
        load(tmp_path / "b")
    foreign.write_torch(tmp_path / "c" / "cc.pt", learned(activation_std=torch.full((D,), 2.0)))
    with pytest.raises(DictionaryFormatError, match="by activation_std, which is not read"):
        load(tmp_path / "c")
    odd = learned()
    odd["decoder.weight"] = draw(3, H, D)
    foreign.write_torch(tmp_path / "d" / "cc.pt", odd)
    with pytest.raises(DictionaryFormatError, match="reads 2 layers and writes 3"):
        load(tmp_path / "d")
