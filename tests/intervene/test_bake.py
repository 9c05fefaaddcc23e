import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import (
    ARCHITECTURES,
    HIDDEN,
    TEXTS,
    WIDTH,
    build_model,
    hooks,
    logits,
    same_state,
    state,
)
from transformers import AutoModelForCausalLM

from manifold_unlearn import bake, intervene, is_bakeable, load_model
from manifold_unlearn.activations.capture import capture
from manifold_unlearn.activations.corpus import read_items
from manifold_unlearn.activations.sites import find_decoder, site_names
from manifold_unlearn.erase.subspace import SubspaceEraser
from manifold_unlearn.evaluate.likelihood import greedy_answers, plain
from manifold_unlearn.intervene.maps import AffineMap, DenseAffineMap

SHARED = Path(__file__).parents[3] / "shared"
TOLD = SHARED / "models" / "tofu-stories15m" / "told"
QUESTIONS = SHARED / "data" / "tofu" / "forget05_perturbed.jsonl"
PARTS = ["attn", "mlp", "mlp.hidden"]


def projection(width=WIDTH, seed=0, biased=True):
    """An oblique projection of rank two, as erasers are."""
    draw = torch.Generator().manual_seed(seed)
    read, write = (torch.randn(width, 2, generator=draw) for _ in range(2))
    write = write + read
    write = write @ torch.linalg.inv(read.T @ write)
    return AffineMap(read, write, torch.ones(2) if biased else torch.zeros(2))


def map_at(site, biased=True, seed=0):
    return projection(HIDDEN if site.endswith("hidden") else WIDTH, seed, biased)


def batch(tokenizer):
    """Every text, one a row, cut to one length."""
    rows = [(tokenizer(text).input_ids * 8)[:8] for text in TEXTS]
    return torch.tensor(rows)


def greedy(model, ids):
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=2,
    )


def assert_bakes_as_it_hooks(model, maps, tokenizer):
    """Logits within 1e-4, the same greedy tokens, and both unlike the model's own."""
    ids = batch(tokenizer)
    free = logits(model, ids)
    with intervene(model, maps):
        hooked, said = logits(model, ids), greedy(model, ids)
    baked = bake(model, maps)
    assert hooks(baked) == 0
    assert (logits(baked, ids) - hooked).abs().max() <= 1e-4
    assert torch.equal(greedy(baked, ids), said)
    assert (hooked - free).abs().max() > 1e-2
    return baked


def assert_plain_transformers_loads(baked, tmp_path, tokenizer):
    """What save_pretrained wrote answers the same to the bit, and has every weight."""
    baked.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same_state(again, state(baked))
    ids = batch(tokenizer)
    assert torch.equal(logits(again, ids), logits(baked, ids))
    return again


# --- parity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [True, False], ids=["affine", "linear"])
@pytest.mark.parametrize("part", PARTS)
def test_baked_equals_hooked_and_reloads(model, tokenizer, tmp_path, part, biased):
    maps = {f"layers.{i}.{part}": map_at(part, biased, seed=i) for i in (0, 2)}
    possible = [is_bakeable(model, site, site_map) for site, site_map in maps.items()]
    assert possible[0] == possible[1]
    if possible[0]:
        baked = assert_bakes_as_it_hooks(model, maps, tokenizer)
        assert_plain_transformers_loads(baked, tmp_path, tokenizer)
    else:
        assert biased
        with pytest.raises(ValueError, match="has no parameter to keep it in"):
            bake(model, maps)


@pytest.mark.parametrize("biased", [True, False], ids=["affine", "linear"])
def test_embeddings_bake_and_reload_untied(model, tokenizer, tmp_path, biased):
    fitted = projection(biased=biased)
    assert is_bakeable(model, "embed", fitted)
    output = model.get_output_embeddings().weight.clone()
    baked = assert_bakes_as_it_hooks(model, {"embed": fitted}, tokenizer)
    assert torch.equal(baked.get_output_embeddings().weight, output)
    assert baked.get_output_embeddings().weight is not baked.get_input_embeddings().weight
    assert not baked.config.tie_word_embeddings
    again = assert_plain_transformers_loads(baked, tmp_path, tokenizer)
    assert not again.config.tie_word_embeddings


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gemma3"])
def test_the_stream_bakes_and_reads_the_same_everywhere(name, tokenizer, tmp_path):
    model, fitted = build_model(name), projection()
    assert is_bakeable(model, "stream", fitted)
    baked = assert_bakes_as_it_hooks(model, {"stream": fitted}, tokenizer)
    acts = capture(baked, tokenizer, TEXTS, ["embed", "layers.0", "layers.2"])
    for rows in acts.values():
        torch.testing.assert_close(
            rows @ fitted.read, fitted.offset.expand(len(rows), 2), rtol=1e-3, atol=1e-3
        )
    assert_plain_transformers_loads(baked, tmp_path, tokenizer)


def test_every_site_of_a_block_bakes_with_the_others(model, tokenizer):
    maps = {f"layers.{i}.{part}": map_at(part, False, i) for i in range(3) for part in PARTS}
    assert_bakes_as_it_hooks(model, maps, tokenizer)
    backwards = dict(reversed(maps.items()))
    assert_bakes_as_it_hooks(model, backwards, tokenizer)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama"])
def test_biases_of_reader_and_writer_add_up(name, tokenizer):
    model = build_model(name)
    maps = {"layers.1.mlp": map_at("mlp"), "layers.1.mlp.hidden": map_at("hidden", seed=1)}
    assert_bakes_as_it_hooks(model, maps, tokenizer)
    assert_bakes_as_it_hooks(model, dict(reversed(maps.items())), tokenizer)


def test_any_linear_module_bakes_by_its_path(llama, tokenizer):
    maps = {"model.layers.1.self_attn.v_proj": projection(16, biased=False)}
    assert is_bakeable(llama, *maps)
    assert_bakes_as_it_hooks(llama, maps, tokenizer)


def test_a_tied_output_matrix_bakes_without_the_embeddings(llama, tokenizer, tmp_path):
    assert llama.config.tie_word_embeddings
    maps = {"lm_head": projection(300, biased=False)}
    baked = assert_bakes_as_it_hooks(llama, maps, tokenizer)
    assert torch.equal(baked.model.embed_tokens.weight, llama.model.embed_tokens.weight)
    assert_plain_transformers_loads(baked, tmp_path, tokenizer)


def test_a_fitted_eraser_and_bare_arrays_bake_alike(llama, tokenizer):
    acts = capture(llama, tokenizer, TEXTS, "layers.1.mlp")
    eraser = SubspaceEraser().fit(acts["layers.1.mlp"].numpy(), (acts.text_index < 2).numpy())
    baked = assert_bakes_as_it_hooks(llama, {"layers.1.mlp": eraser}, tokenizer)
    bare = SimpleNamespace(matrix_=eraser.matrix_, bias_=eraser.bias_)
    assert same_state(bake(llama, {"layers.1.mlp": bare}), state(baked))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(dtype, tokenizer, architecture):
    model = build_model(architecture, dtype=dtype)
    baked = bake(model, {"layers.1.mlp": projection(biased=False)})
    assert {p.dtype for p in baked.parameters()} == {dtype}
    exact = bake(model.float(), {"layers.1.mlp": projection(biased=False)})
    torch.testing.assert_close(
        find_mlp_out(baked).float(), find_mlp_out(exact), rtol=1e-2, atol=1e-2
    )


def find_mlp_out(model):
    decoder = find_decoder(model)
    mlp = getattr(decoder.blocks[1], decoder.layout.mlp)
    return getattr(mlp, decoder.layout.mlp_out).weight


# --- biases and configuration -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "field", "module"),
    [("layers.1.mlp", "mlp_bias", "mlp.down_proj"),
     ("layers.1.mlp.hidden", "mlp_bias", "mlp.down_proj"),
     ("layers.1.attn", "attention_bias", "self_attn.o_proj")],
)  # fmt: skip
def test_a_bias_sets_its_configuration_field(llama, site, field, module):
    baked = bake(llama, {site: map_at(site)})
    assert getattr(baked.config, field) is True
    assert getattr(llama.config, field) is False
    other = {"mlp_bias": "attention_bias", "attention_bias": "mlp_bias"}[field]
    assert getattr(baked.config, other) is False
    assert baked.model.layers[1].get_submodule(module).bias.any()
    assert not baked.model.layers[0].get_submodule(module).bias.any()


def test_a_map_without_bias_leaves_the_configuration(llama):
    baked = bake(llama, {"layers.1.mlp": projection(biased=False)})
    assert baked.config.to_dict() == llama.config.to_dict()
    assert baked.state_dict().keys() == llama.state_dict().keys()


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_a_bias_without_a_parameter_to_keep_it_is_refused(name):
    model = build_model(name)
    assert is_bakeable(model, "layers.1.mlp", projection(biased=False))
    assert not is_bakeable(model, "layers.1.mlp", projection())
    with pytest.raises(ValueError, match=r"'layers.1.mlp' has a bias, and .*affine=False"):
        bake(model, {"layers.1.mlp": projection()})


# --- refusals, and the model stays as it was ----------------------------------------------------


def test_a_lone_residual_site_is_refused_and_bakeable_sites_named(model):
    assert not is_bakeable(model, "layers.1")
    with pytest.raises(ValueError, match=r"'layers.1' has no exact weight edit.*layers.1.attn"):
        bake(model, {"layers.1": projection()})


def test_an_unfitted_map_is_not_asked_for_its_bias(llama):
    with pytest.raises(ValueError, match="without matrix_ and bias_"):
        is_bakeable(llama, "layers.1.mlp", SubspaceEraser())


def test_what_is_bakeable_of_the_named_sites(model):
    streams = [f"layers.{i}" for i in range(3)]
    refused = {*streams, *(f"{name}.mlp.input" for name in streams)}
    assert {name for name in site_names(model) if not is_bakeable(model, name)} == refused


def test_a_normalized_stream_is_refused():
    model = build_model("gemma3")
    assert not is_bakeable(model, "stream")
    with pytest.raises(ValueError, match="'stream' has no exact weight edit"):
        bake(model, {"stream": projection()})


def test_the_model_given_is_never_touched(model, tokenizer):
    weights, config = state(model), copy.deepcopy(model.config.to_dict())
    ids = batch(tokenizer)
    before = logits(model, ids)
    maps = {"embed": projection(), "layers.1.mlp": projection(biased=False)}
    baked = bake(model, maps)
    assert same_state(model, weights)
    assert model.config.to_dict() == config
    assert torch.equal(logits(model, ids), before)
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in baked.parameters()}
    assert not shared


@pytest.mark.parametrize(
    ("maps", "words"),
    [
        ({}, "site_maps is empty"),
        ({"layers.7.mlp": projection()}, "no site 'layers.7.mlp'"),
        ({"layers.0.mlp": projection(), "layers.1": projection()}, "no exact weight edit"),
        ({"layers.0.mlp": projection(16)}, "was fitted for width 16; the site has width 32"),
        ({"embed": projection(16)}, "was fitted for width 16; the site has width 32"),
        ({"layers.0.mlp.hidden": projection()}, "width 32; the site has width 48"),
        ({"layers.0.mlp": torch.relu}, "only an affine map bakes exactly"),
        ({"layers.0.mlp": DenseAffineMap(torch.eye(32) * np.nan, torch.ones(32))}, "not finite"),
        ({"stream": projection(), "embed": projection()}, "'stream' already edits"),
    ],
)
def test_a_failed_bake_leaves_the_model_as_it_was(llama, maps, words):
    weights, config = state(llama), copy.deepcopy(llama.config.to_dict())
    with pytest.raises(ValueError, match=words):
        bake(llama, maps)
    assert same_state(llama, weights)
    assert llama.config.to_dict() == config
    assert hooks(llama) == 0


def test_an_edited_weight_that_overflows_is_refused_and_the_model_stays():
    model = build_model("llama", dtype=torch.float16)
    weights = state(model)
    huge = DenseAffineMap(1e6 * torch.eye(WIDTH), torch.zeros(WIDTH))
    with pytest.raises(ValueError, match=r"baked weight .*1.mlp.down_proj.weight contains NaN"):
        bake(model, {"layers.1.mlp": huge})
    assert same_state(model, weights)


def test_baking_inside_an_intervene_block_is_refused(llama):
    fitted = projection(biased=False)
    with intervene(llama, {"layers.0.mlp": fitted}):
        with pytest.raises(RuntimeError, match="leave the with block, then bake"):
            bake(llama, {"layers.1.mlp": fitted})
        assert hooks(llama) == 1
    bake(llama, {"layers.1.mlp": fitted})


# --- a real checkpoint ----------------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.skipif(not TOLD.is_dir(), reason="../shared/models/tofu-stories15m is not there")
def test_a_trained_model_bakes_as_it_hooks_on_64_prompts():
    model, tokenizer = load_model(TOLD)
    items = read_items(QUESTIONS, template="Question: {question}\nAnswer:")[:64]
    prompts = [item.question for item in items]
    sites = [f"layers.{i}.{part}" for i in (2, 3, 4) for part in ("attn", "mlp")]
    acts = capture(model, tokenizer, [item.text for item in items], sites)
    kept = ~acts.sink & (acts.position > 0)
    forget = acts.text_index[kept] < 20
    maps = {site: SubspaceEraser(rank=24).fit(acts[site][kept], forget) for site in sites}
    baked = bake(model, maps)
    free = greedy_answers(plain(model), tokenizer, prompts, max_new_tokens=12)
    with intervene(model, maps):
        hooked = greedy_answers(plain(model), tokenizer, prompts, max_new_tokens=12)
        expected = text_logits(model, tokenizer, prompts[0])
    assert greedy_answers(plain(baked), tokenizer, prompts, max_new_tokens=12) == hooked
    assert sum(a != b for a, b in zip(hooked, free, strict=True)) > 10
    assert (text_logits(baked, tokenizer, prompts[0]) - expected).abs().max() <= 1e-4


def text_logits(model, tokenizer, text):
    return logits(model, torch.tensor([tokenizer(text).input_ids]))
