import json
from dataclasses import asdict, fields

import pytest
import torch
from torch import nn

from manifold_unlearn.dictionary import SparseAutoencoder, Transcoder
from manifold_unlearn.evaluate import SAEBenchAdapter, SAEBenchConfig

D, LATENTS = 12, 40
SHAPES = [
    {"name": "relu"},
    {"name": "topk", "k": 5},
    {"name": "abs_topk", "k": 5},
    {"name": "batch_topk", "k": 5},
    {"name": "jumprelu"},
    {"name": "gated"},
]
ASKED = {
    "model_name", "d_in", "d_sae", "hook_layer", "hook_name", "context_size", "hook_head_index",
    "architecture", "apply_b_dec_to_input", "finetuning_scaling_factor", "activation_fn_str",
    "activation_fn_kwargs", "prepend_bos", "normalize_activations", "dtype", "device",
    "model_from_pretrained_kwargs", "dataset_path", "dataset_trust_remote_code", "seqpos_slice",
    "training_tokens", "sae_lens_training_version", "neuronpedia_id",
}  # fmt: skip
"""Fields of CustomSAEConfig in sae_bench/custom_saes/custom_sae_config.py."""


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coder_of(shape, **options):
    coder = SparseAutoencoder(D, LATENTS, shape, random_state=0, **options)
    with torch.no_grad():
        coder.decoder.mul_(draw(LATENTS, 1, seed=1).abs() + 0.5)  # of other lengths than 1
        coder.b_enc.copy_(0.1 * draw(LATENTS, seed=2))
        coder.b_dec.copy_(draw(D, seed=3))
        for parameter in coder.nonlinearity.parameters():
            parameter.copy_(0.1 * draw(LATENTS, seed=4).abs() + 0.01)
    coder.origin = {"site": "layers.5", "model": "gpt2"}
    return coder


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s["name"])
def test_what_sae_bench_checks_of_a_custom_dictionary_holds(shape):
    """As ``BaseSAE.test_sae`` and ``check_decoder_norms`` do."""
    coder = coder_of(shape)
    sae, acts = SAEBenchAdapter(coder), draw(3, 7, D)
    assert sae.W_dec.shape == (sae.cfg.d_sae, sae.cfg.d_in)
    assert sae.W_enc.shape == (sae.cfg.d_in, sae.cfg.d_sae)
    assert sae.b_enc.shape == (sae.cfg.d_sae,) and sae.b_dec.shape == (sae.cfg.d_in,)
    assert all(isinstance(w, nn.Parameter) for w in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
    decoded = sae.decode(sae.encode(acts))
    torch.testing.assert_close(sae(acts.flatten(0, 1)).reshape(acts.shape), decoded)
    assert sae.check_decoder_norms()
    torch.testing.assert_close(sae.W_dec.data.norm(dim=1), torch.ones(LATENTS))
    coder.eval()
    torch.testing.assert_close(decoded, coder(acts).detach())  # the outputs stay
    assert not torch.equal(sae.encode(acts), coder.encode(acts))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s["name"])
def test_activations_times_decoder_are_the_outputs(shape):
    """What absorption, TPP and unlearning rely on: f W_dec + b_dec, and latents set to 0."""
    sae, x = SAEBenchAdapter(coder_of(shape)), draw(9, D)
    f = sae.encode(x)
    torch.testing.assert_close(sae.decode(f), f @ sae.W_dec + sae.b_dec)
    gone = torch.zeros(LATENTS, dtype=torch.bool)
    gone[::3] = True
    without = f.clone()
    without[..., gone] = 0.0
    expected = (f * ~gone) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(sae.decode(without), expected)


def test_the_weights_shown_are_those_it_encodes_with():
    x = draw(9, D)
    sae = SAEBenchAdapter(coder_of({"name": "relu"}))
    torch.testing.assert_close(sae.encode(x), ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).relu())
    bare = SAEBenchAdapter(coder_of({"name": "relu"}, centered=False))
    torch.testing.assert_close(bare.encode(x), (x @ bare.W_enc + bare.b_enc).relu())
    assert (sae.cfg.apply_b_dec_to_input, bare.cfg.apply_b_dec_to_input) == (True, False)
    coder = coder_of({"name": "gated"})
    gated = SAEBenchAdapter(coder)
    product = (x - gated.b_dec) @ gated.W_enc
    magnitude = (product * coder.nonlinearity.log_gain.exp() + gated.b_mag).relu()
    fires = gated.encode(x) > 0
    torch.testing.assert_close(gated.encode(x)[fires], magnitude[fires])


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ({"name": "relu"}, "standard"),
        ({"name": "topk", "k": 5}, "topk"),
        ({"name": "batch_topk", "k": 5}, "batchtopk"),
        ({"name": "jumprelu"}, "jumprelu"),
        ({"name": "gated"}, "gated"),
    ],
)
def test_the_configuration_has_every_field_and_is_json(shape, name):
    sae = SAEBenchAdapter(coder_of(shape), context_size=64)
    assert {f.name for f in fields(SAEBenchConfig)} == ASKED
    written = json.loads(json.dumps(asdict(sae.cfg)))
    assert written["architecture"] == name
    assert (written["model_name"], written["hook_name"], written["hook_layer"]) == (
        "gpt2", "blocks.5.hook_resid_post", 5,
    )  # fmt: skip
    assert (written["dtype"], written["device"]) == ("float32", "cpu")
    assert (written["d_in"], written["d_sae"], written["context_size"]) == (D, LATENTS, 64)
    assert written["activation_fn_kwargs"] == ({"k": 5} if "k" in shape else {})


def test_the_configuration_is_written_after_sae_bench_added_to_it():
    """It sets attributes as it loads a dictionary, and writes ``to_dict()`` into its results."""
    cfg = SAEBenchAdapter(coder_of({"name": "topk", "k": 5})).cfg
    cfg.architecture_str, cfg.metadata, cfg.exclude_special_tokens = (
        cfg.architecture,
        object(),
        None,
    )
    written = json.loads(json.dumps(cfg.to_dict()))
    assert set(written) == ASKED and written["architecture"] == "topk"


def test_names_are_those_of_transformer_lens():
    coder = coder_of({"name": "relu"})
    coder.origin = {"site": "layers.3.mlp", "model": "gpt2"}
    assert SAEBenchAdapter(coder).cfg.hook_name == "blocks.3.hook_mlp_out"
    coder.origin = {"site": "embed"}
    sae = SAEBenchAdapter(coder, model_name="gpt2")
    assert (sae.cfg.hook_name, sae.cfg.hook_layer) == ("blocks.0.hook_resid_pre", 0)
    other = SAEBenchAdapter(coder, model_name="a", hook_name="blocks.11.attn.hook_z")
    assert (other.cfg.model_name, other.cfg.hook_layer) == ("a", 11)


def test_it_moves_to_another_dtype_and_leaves_the_dictionary_where_it_was():
    coder = coder_of({"name": "batch_topk", "k": 5}).train()
    before = {name: value.clone() for name, value in coder.state_dict().items()}
    sae = SAEBenchAdapter(coder)
    assert sae.to(device="cpu", dtype=torch.bfloat16) is sae.eval() is sae
    assert sae.dtype == sae.W_dec.dtype == sae.W_enc.dtype == torch.bfloat16
    assert sae.cfg.dtype == "bfloat16"
    assert sae.check_decoder_norms()
    assert sae(draw(4, D).bfloat16()).dtype == torch.bfloat16
    assert coder.training and coder.dtype == torch.float32
    assert all(torch.equal(before[name], value) for name, value in coder.state_dict().items())


def test_a_latent_that_writes_nothing_is_kept_as_it_is():
    coder = coder_of({"name": "relu"})
    with torch.no_grad():
        coder.decoder[3] = 0
    sae = SAEBenchAdapter(coder)
    assert not sae.check_decoder_norms()
    assert torch.isfinite(sae(draw(4, D))).all()


def test_what_sae_bench_cannot_take_is_refused():
    with pytest.raises(ValueError, match="a Transcoder does not"):
        SAEBenchAdapter(Transcoder(D, LATENTS))
    with pytest.raises(ValueError, match="normalization='layer_norm' and deep=0"):
        SAEBenchAdapter(coder_of({"name": "relu"}, normalization="layer_norm"))
    with pytest.raises(ValueError, match="normalization='none' and deep=4"):
        SAEBenchAdapter(coder_of({"name": "relu"}, deep=4))
    coder = coder_of({"name": "relu"})
    coder.origin = {}
    with pytest.raises(ValueError, match="model_name=None, hook_name=None: the dictionary does"):
        SAEBenchAdapter(coder)
    with pytest.raises(ValueError, match="hook_name='ln_final.hook_scale' is in no block"):
        SAEBenchAdapter(coder, model_name="gpt2", hook_name="ln_final.hook_scale")
