import pytest
import torch
from cases import HIDDEN, WIDTH
from torch import nn

from manifold_unlearn.activations.sites import find_decoder, resolve_site, site_names


def test_every_named_site_resolves_in_the_order_in_which_it_is_computed(model):
    called = []
    ids = torch.arange(5)[None]
    for name in site_names(model):
        site = resolve_site(model, name)
        note = lambda *_, name=name: called.append(name)  # noqa: E731
        if site.reads == "output":
            site.module.register_forward_hook(note)
        else:
            site.module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(input_ids=ids)
    assert called == site_names(model)
    assert len(called) == 1 + 5 * 3


def test_the_output_matrices_have_the_widths_of_their_sites(model):
    decoder = find_decoder(model)
    for block in decoder.blocks:
        mlp = getattr(block, decoder.layout.mlp)
        attn = getattr(block, decoder.layout.attn)
        shape = getattr(mlp, decoder.layout.mlp_out).weight.shape
        assert sorted(shape) == [WIDTH, HIDDEN]
        assert WIDTH in getattr(attn, decoder.layout.attn_out).weight.shape
    assert all(table.weight.shape[1] == WIDTH for table in decoder.tables)


def test_embedding_tables_and_final_norm_are_the_models(model):
    decoder = find_decoder(model)
    assert decoder.tables[0] is model.get_input_embeddings()
    assert decoder.final_norm.weight.shape == (WIDTH,)


def test_only_gemma_normalizes_what_its_blocks_write(model, architecture):
    assert find_decoder(model).normalizes_writes == (architecture == "gemma3")


def test_a_module_path_is_a_site_too(llama):
    site = resolve_site(llama, "model.layers.1.self_attn.q_proj")
    assert site.module is llama.model.layers[1].self_attn.q_proj
    assert site.reads == "output"


def test_a_block_that_is_not_there_names_the_last_ones(llama):
    with pytest.raises(ValueError, match=r"no site 'layers.12.mlp'.*3 blocks.*layers.2.mlp"):
        resolve_site(llama, "layers.12.mlp")


def test_a_misspelt_site_lists_those_near_it(llama):
    with pytest.raises(ValueError, match=r"no site 'layers.1.mpl'.* Near it: .*layers.1.mlp"):
        resolve_site(llama, "layers.1.mpl")


def test_the_empty_name_is_no_site(llama):
    with pytest.raises(ValueError, match="no site ''"):
        resolve_site(llama, "")


def test_a_model_of_no_known_layout_says_so_and_is_addressed_by_path():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="none of the known decoder layouts"):
        resolve_site(model, "layers.0")
    assert resolve_site(model, "0").module is model[0]


def test_a_block_that_lacks_a_part_of_the_layout_is_not_taken_for_one(llama):
    del llama.model.layers[2].mlp.down_proj
    with pytest.raises(ValueError, match="none of the known decoder layouts"):
        find_decoder(llama)
