"""Which format a path is of, and where its names lie in a model."""

import foreign_files as foreign
import pytest
import torch
from foreign_files import K, draw, weights

from manifold_unlearn.dictionary import SparseAutoencoder
from manifold_unlearn.dictionary.formats import FORMATS, DictionaryFormatError, load, save
from manifold_unlearn.dictionary.formats.hooks import hook_of, site_of


def test_a_path_with_nothing_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none does not exist; .*snapshot_download"):
        load(tmp_path / "none")
    with pytest.raises(DictionaryFormatError, match=r"holds no files: no format .* sparsify \("):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("no weights")
    with pytest.raises(DictionaryFormatError, match=r"holds notes.txt: no format that is known"):
        load(tmp_path)
    with pytest.raises(DictionaryFormatError, match=r"holds notes.txt: no format that is known"):
        load(tmp_path / "notes.txt")


def test_two_formats_in_one_directory_ask_for_one(tmp_path):
    foreign.saelens(tmp_path, "standard", weights())
    w = weights(seed=5)
    foreign.write_torch(
        tmp_path / "ae.pt",
        {
            "encoder.weight": w["W_enc"].T,
            "encoder.bias": w["b_enc"],
            "decoder.weight": w["W_dec"].T,
            "bias": w["b_dec"],
        },
    )
    with pytest.raises(DictionaryFormatError, match="formats saelens, dictionary_learning; give"):
        load(tmp_path)
    assert torch.equal(load(tmp_path, format="saelens").W_enc, weights()["W_enc"])
    assert torch.equal(load(tmp_path, format="dictionary_learning").W_enc, w["W_enc"])
    assert torch.equal(load(tmp_path / "ae.pt").W_enc, w["W_enc"])


@pytest.mark.parametrize("name", ["trainer_state.pt", "notes.pt"])
def test_a_file_beside_a_dictionary_does_not_stand_in_its_way(tmp_path, name):
    foreign.saelens(tmp_path, "standard", weights())
    (tmp_path / name).write_bytes(b"the state of an optimizer, or anything")
    assert torch.equal(load(tmp_path).W_enc, weights()["W_enc"])
    (tmp_path / "sae_weights.safetensors").unlink()
    with pytest.raises(DictionaryFormatError, match="no format that is known|notes.pt is not read"):
        load(tmp_path)


def test_a_format_that_is_not_there_says_what_is(tmp_path):
    foreign.saelens(tmp_path, "standard", weights())
    words = r"not of the format sparsify \(cfg.json, sae.safetensors\); it holds cfg.json, sae_"
    with pytest.raises(DictionaryFormatError, match=words):
        load(tmp_path, format="sparsify")
    with pytest.raises(ValueError, match="format='gguf' is not one of auto, own, saelens"):
        load(tmp_path, format="gguf")


def test_keywords_that_mean_nothing_are_refused(tmp_path):
    foreign.saelens(tmp_path, "standard", weights())
    with pytest.raises(TypeError, match="takes dict_class, k, layer, scale, step; got depth"):
        load(tmp_path, depth=2)
    with pytest.raises(ValueError, match="of the format saelens, without layer"):
        load(tmp_path, layer=2)


def test_the_one_dictionary_inside_is_found_and_keywords_reach_it(tmp_path):
    w = weights()
    state = {**w, "W_enc": w["W_enc"].T.contiguous(), "W_dec": w["W_dec"].T.contiguous()}
    foreign.write_torch(tmp_path / "a" / "b" / "layer3.sae.pt", state)
    (tmp_path / "a" / "empty").mkdir()
    assert load(tmp_path, k=K).origin["site"] == "layers.3"


def test_every_format_is_named_once():
    assert len(set(FORMATS)) == len(FORMATS) == 15


def test_what_is_loaded_is_ready_to_use(tmp_path):
    foreign.saelens(tmp_path, "jumprelu", {**weights(), "threshold": draw(20).abs()})
    coder = load(tmp_path)
    assert not coder.training
    assert all(parameter.requires_grad for parameter in coder.parameters())
    coder(draw(4, 6)).sum().backward()
    assert coder.decoder.grad is not None
    assert {p.device.type for p in coder.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.0.hook_resid_pre", "embed"),
        ("blocks.12.hook_resid_pre", "layers.11"),
        ("blocks.12.hook_resid_post", "layers.12"),
        ("blocks.12.hook_attn_out", "layers.12.attn"),
        ("blocks.12.hook_mlp_out", "layers.12.mlp"),
        ("blocks.12.mlp.hook_in", "layers.12.mlp.input"),
        ("blocks.12.mlp.hook_post", "layers.12.mlp.hidden"),
        ("blocks.12.ln2.hook_normalized", "blocks.12.ln2.hook_normalized"),
        ("blocks.12.attn.hook_z", "blocks.12.attn.hook_z"),
        ("model.layers.12.output", "layers.12"),
        ("model.layers.12", "layers.12"),
        ("model.layers.12.mlp.output", "layers.12.mlp"),
        ("model.layers.12.mlp.down_proj.input", "layers.12.mlp.hidden"),
        ("model.layers.12.self_attn.o_proj.input", "model.layers.12.self_attn.o_proj.input"),
        ("model.layers.1.pre_feedforward_layernorm.output",
         "model.layers.1.pre_feedforward_layernorm"),
        ("gpt_neox.layers.2.attention", "layers.2.attn"),
        ("transformer.h.3.attn", "layers.3.attn"),
        ("resid_post_layer_3", "layers.3"),
        ("attention_out_layer_3", "layers.3.attn"),
        ("mlp_out_layer_3", "layers.3.mlp"),
        ("model.embed_tokens", "embed"),
        ("vision_tower.blocks", "vision_tower.blocks"),
    ],
)  # fmt: skip
def test_names_of_others_are_sites_here(hook, site):
    assert site_of(hook) == site
    if hook.startswith("blocks.") and hook != "blocks.12.hook_resid_pre":
        assert hook_of(site) == hook


@pytest.mark.parametrize("model", ["gemma-2-2b", "google/gemma-3-1b-pt"])
def test_gemma_writes_to_the_stream_through_a_norm(model):
    assert site_of("blocks.4.hook_mlp_out", model) == "model.layers.4.post_feedforward_layernorm"
    assert site_of("blocks.4.hook_attn_out", model) == "model.layers.4.post_attention_layernorm"
    assert site_of("blocks.4.hook_resid_post", model) == "layers.4"


def test_a_site_of_a_loaded_dictionary_is_one_of_the_model(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from manifold_unlearn.activations.sites import resolve_site

    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=9
    )
    model = LlamaForCausalLM(config)
    hooks = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    foreign.saelens(tmp_path, "transcoder", weights(), hooks, d_out=6)
    origin = load(tmp_path).origin
    for key in ("site_in", "site_out"):
        assert resolve_site(model, origin[key]).module is model.model.layers[1].mlp


def test_a_format_to_save_in_must_be_known(tmp_path):
    with pytest.raises(ValueError, match="format='npz' is not one of saelens, sparsify, own"):
        save(SparseAutoencoder(4, 8), tmp_path / "a", format="npz")
