"""Files that the libraries themselves write and read; each test needs its library.

``sae-lens``, ``eai-sparsify`` and ``dictionary-learning==0.1.0``, one at a time: their requirements
differ. Figures are the largest differences found on these rows.
"""

import json

import pytest
import torch
from foreign_files import draw

from manifold_unlearn.dictionary import SparseAutoencoder, SparseCoder, Transcoder
from manifold_unlearn.dictionary.formats import (
    DictionaryFormatError,
    fold_encoder_bias,
    load,
    save,
)

D, H, K = 16, 64, 4
X = draw(500, D, seed=99)
CLOSE = 2e-5  # float32 products in another order, of values up to 20


def stirred(module):
    """With values of its own in every tensor."""
    state = module.state_dict()
    for i, (name, value) in enumerate(state.items()):
        if value.is_floating_point() and value.ndim:
            state[name] = draw(*value.shape, seed=i, scale=0.3)
            if name.endswith("threshold"):
                state[name] = state[name].abs()
    module.load_state_dict(state)
    return module


def compared(record_property, ours, theirs):
    """The largest difference of pairs of tensors, recorded, and each within tolerance."""
    largest = max(
        float((a.float() - b.float()).abs().max()) for a, b in zip(ours, theirs, strict=True)
    )
    record_property("largest_difference", largest)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.isfinite(a).all()
        assert (a - b).abs().max() <= CLOSE * max(1, float(b.abs().max()))
    return largest


SAELENS = {
    "standard": {},
    "uncentered": {"architecture": "standard", "apply_b_dec_to_input": False},
    "layer norm": {"architecture": "standard", "normalize_activations": "layer_norm"},
    "constant norm": {"architecture": "standard", "normalize_activations": "constant_norm_rescale"},
    "topk": {"k": K},
    "topk ranked": {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"k": K},
    "jumprelu": {},
    "gated": {},
    "transcoder": {"d_out": 8},
    "skip_transcoder": {"d_out": 8},
    "jumprelu_transcoder": {"d_out": 8},
    "jumprelu_skip_transcoder": {"d_out": 8},
}


def saelens_made(name):
    registry = pytest.importorskip("sae_lens.registry")
    config = dict(SAELENS[name])
    architecture = config.pop("architecture", name)
    if "transcoder" in architecture:
        config["apply_b_dec_to_input"] = False
    try:
        kind, settings = registry.get_sae_class(architecture)
    except ValueError:
        pytest.skip(f"this SAELens has no {architecture}")
    return stirred(kind(settings(d_in=D, d_sae=H, **config)))


@pytest.mark.parametrize("name", SAELENS)
@torch.no_grad()
def test_what_saelens_writes_is_read(tmp_path, record_property, name):
    theirs = saelens_made(name)
    theirs.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    theirs.save_model(tmp_path)
    ours = load(tmp_path)
    encoded = theirs.encode(X)
    scale = ours.decoder.norm(dim=1) if "ranked" in name else 1  # they answer scaled activations
    compared(record_property, [ours.encode(X) * scale, ours(X)], [encoded, theirs(X)])
    assert "layers.2" in ours.origin.values()


@pytest.mark.parametrize("name", SAELENS)
@torch.no_grad()
def test_what_is_written_for_saelens_is_read_by_it(tmp_path, record_property, name):
    sae_lens = pytest.importorskip("sae_lens")
    saelens_made(name).save_model(tmp_path / "a")
    ours = load(tmp_path / "a")
    save(ours, tmp_path / "b", format="saelens")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "b")
    again = saelens_made(name)
    assert again.cfg.architecture() == theirs.cfg.architecture()
    for key, value in again.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key
    scale = ours.decoder.norm(dim=1) if "ranked" in name else 1
    compared(record_property, [ours.encode(X) * scale, ours(X)], [theirs.encode(X), theirs(X)])


@pytest.mark.parametrize("kind", ["batch_topk", "gated", "jumprelu", "relu", "topk"])
@torch.no_grad()
def test_a_dictionary_of_ours_is_read_by_saelens(tmp_path, record_property, kind):
    sae_lens = pytest.importorskip("sae_lens")
    rule = {"name": kind, **({"k": K} if "topk" in kind else {})}
    ours = stirred(SparseAutoencoder(D, H, rule)).eval()
    if kind == "batch_topk":
        ours.nonlinearity.threshold.fill_(0.7)
    if kind == "gated":
        fold_encoder_bias(ours)
    ours.origin = {"site": "layers.7", "model": "gpt2"}
    save(ours, tmp_path / "a", format="saelens")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "a")
    f = theirs.encode(X)
    compared(record_property, [ours.encode(X), ours(X)], [f, theirs.decode(f)])
    assert theirs.cfg.metadata.hook_name == "blocks.7.hook_resid_post"
    assert theirs.cfg.metadata.model_name == "gpt2"


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka_batchtopk", "topk"])
@torch.no_grad()
def test_a_checkpoint_of_a_training_of_saelens_is_read(tmp_path, record_property, kind):
    registry = pytest.importorskip("sae_lens.registry")
    made, settings = registry.get_sae_training_class(kind)
    widths = {"matryoshka_widths": [16, H]} if "matryoshka" in kind else {}
    theirs = stirred(made(settings(d_in=D, d_sae=H, k=K, **widths)))
    if kind != "topk":
        theirs.topk_threshold.fill_(0.7)
    theirs.save_model(tmp_path / "training")
    theirs.save_inference_model(tmp_path / "inference")
    training, inference = load(tmp_path / "training"), load(tmp_path / "inference")
    compared(record_property, [training(X)], [inference(X)])
    assert inference.nonlinearity.name == ("topk" if kind == "topk" else "jumprelu")


@pytest.mark.parametrize("architecture", ["matching_pursuit", "temporal"])
def test_what_saelens_alone_can_express_is_refused_by_name(tmp_path, architecture):
    registry = pytest.importorskip("sae_lens.registry")
    kind, settings = registry.get_sae_class(architecture)
    heads = {"n_heads": 2, "bottleneck_factor": 2} if architecture == "temporal" else {}
    kind(settings(d_in=D, d_sae=H, **heads)).save_model(tmp_path)
    with pytest.raises(DictionaryFormatError, match=f"architecture {architecture}: its code"):
        load(tmp_path)


SPARSIFY = [
    (rule, transcode, skip)
    for rule in ("topk", "groupmax")
    for transcode in (False, True)
    for skip in (False, True)
]


def sparsify_encoded(theirs):
    found = theirs.encode(X)
    return torch.zeros(len(X), theirs.num_latents).scatter_(1, found.top_indices, found.top_acts)


@pytest.mark.parametrize("said", [0, H])
@pytest.mark.parametrize(("rule", "transcode", "skip"), SPARSIFY)
@torch.no_grad()
def test_sparsify_both_ways(tmp_path, record_property, rule, transcode, skip, said):
    sparsify = pytest.importorskip("sparsify")
    config = sparsify.SparseCoderConfig(
        activation=rule,
        expansion_factor=H // D,
        num_latents=said,
        k=K,
        transcode=transcode,
        skip_connection=skip,
    )
    theirs = stirred(sparsify.SparseCoder(D, config))
    theirs.save_to_disk(tmp_path / "layers.2")
    ours = load(tmp_path / "layers.2")
    compared(
        record_property,
        [ours.encode(X), ours(X)],
        [sparsify_encoded(theirs), theirs(X).sae_out],
    )
    save(ours, tmp_path / "back", format="sparsify")
    again = sparsify.SparseCoder.load_from_disk(tmp_path / "back")
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert torch.equal(theirs(X).sae_out, again(X).sae_out)
    assert load(tmp_path / "back").origin == {**ours.origin, "config": json.loads(
        (tmp_path / "back" / "cfg.json").read_text())}  # fmt: skip


@pytest.mark.parametrize("transcode", [False, True])
@torch.no_grad()
def test_a_dictionary_of_ours_is_read_by_sparsify(tmp_path, record_property, transcode):
    sparsify = pytest.importorskip("sparsify")
    rule = {"name": "topk", "k": K}
    ours = stirred(
        Transcoder(D, H, D, rule, skip=True) if transcode else SparseAutoencoder(D, H, rule)
    )
    save(ours, tmp_path / "a", format="sparsify")
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path / "a")
    compared(
        record_property, [ours.encode(X), ours(X)], [sparsify_encoded(theirs), theirs(X).sae_out]
    )


LEARNED = {
    "AutoEncoder": "dictionary",
    "AutoEncoderNew": "dictionary",
    "GatedAutoEncoder": "dictionary",
    "JumpReluAutoEncoder": "dictionary",
    "AutoEncoderTopK": "trainers.top_k",
    "BatchTopKSAE": "trainers.batch_top_k",
    "MatryoshkaBatchTopKSAE": "trainers.matryoshka_batch_top_k",
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("threshold", [0.5, -1.0])
@pytest.mark.parametrize("name", LEARNED)
@torch.no_grad()
def test_dictionary_learning(tmp_path, record_property, name, threshold, nested):
    module = pytest.importorskip(f"dictionary_learning.{LEARNED[name]}")
    extra = {"k": K} if "TopK" in name else {}
    if "Matryoshka" in name:
        extra["group_sizes"] = [16, H - 16]
    theirs = stirred(getattr(module, name)(D, H, **extra))
    if "TopK" in name:
        theirs.threshold.fill_(threshold)
    trainer = {
        "dict_class": name,
        "layer": 2,
        "lm_name": "m",
        "submodule_name": "resid_post_layer_2",
    }
    state = theirs.state_dict()
    if nested:
        state = {"step": 3, "ae": state, "optimizer": {}, "config": trainer, "norm_factor": 2.5}
    torch.save(state, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    ours = load(tmp_path)
    if nested:  # what its own training does when it saves for good
        if not hasattr(theirs, "scale_biases"):
            pytest.skip(f"{name} is not trained on scaled rows")
        theirs.scale_biases(2.5)
    f = theirs.encode(X)
    compared(record_property, [ours.encode(X), ours(X)], [f, theirs.decode(f)])
    assert isinstance(ours, SparseCoder)
    assert ours.origin["site"] == "layers.2"
