"""What is saved comes back to the bit; what a format cannot hold is refused by name."""

import json

import pytest
import torch
from foreign_files import draw
from safetensors.torch import load_file

from manifold_unlearn.dictionary import (
    Crosscoder,
    CrossLayerTranscoder,
    SparseAutoencoder,
    SparseCoder,
    Transcoder,
)
from manifold_unlearn.dictionary.formats import (
    DictionaryFormatError,
    fold_encoder_bias,
    load,
    save,
)

D, H = 6, 24
RULES = {
    "relu": {"name": "relu"},
    "topk": {"name": "topk", "k": 3},
    "abs_topk": {"name": "abs_topk", "k": 3},
    "groupmax": {"name": "groupmax", "k": 3},
    "batch_topk": {"name": "batch_topk", "k": 3},
    "jumprelu": {"name": "jumprelu", "bandwidth": 0.02},
    "gated": {"name": "gated"},
}


def stirred(coder, dtype=torch.float32):
    """With values of its own in every tensor, as after a training."""
    state = coder.state_dict()
    for i, (name, value) in enumerate(state.items()):
        if value.is_floating_point():
            state[name] = draw(*value.shape, seed=i, scale=0.5)
            if "threshold" in name:
                state[name] = state[name].abs()
    coder.load_state_dict(state)
    coder.origin = {"site": "layers.3", "model": "gpt2"}
    if isinstance(coder, Transcoder):
        coder.origin = {"site_in": "layers.3.mlp.input", "site_out": "layers.3.mlp"}
    return coder.to(dtype).eval()


def autoencoder(rule, **options):
    coder = stirred(SparseAutoencoder(D, H, RULES[rule], **options))
    if rule == "gated":
        fold_encoder_bias(coder)
    return coder


CASES = {
    "own": [
        *[(f"sae {rule}", lambda r=rule: autoencoder(r)) for rule in RULES],
        ("deep", lambda: autoencoder("relu", deep=4)),
        ("layer norm", lambda: autoencoder("topk", normalization="layer_norm")),
        ("ranked", lambda: autoencoder("topk", rank_by_norm=True)),
        ("skip", lambda: stirred(Transcoder(D, H, 5, RULES["topk"], skip=True))),
        ("base", lambda: stirred(SparseCoder(D, H, D, centered=True, skip=True))),
    ],
    "saelens": [
        *[(f"sae {r}", lambda r=r: autoencoder(r)) for r in RULES if r != "groupmax"],
        ("uncentered", lambda: autoencoder("relu", centered=False)),
        ("layer norm", lambda: autoencoder("topk", normalization="layer_norm")),
        ("unit rms", lambda: autoencoder("relu", normalization="unit_rms")),
        ("ranked", lambda: autoencoder("topk", rank_by_norm=True)),
        ("ranked by size", lambda: autoencoder("abs_topk", rank_by_norm=True)),
        *[
            (f"transcoder {rule} {skip}",
             lambda r=rule, s=skip: stirred(Transcoder(D, H, 5, RULES[r], skip=s)))
            for rule in ("relu", "jumprelu", "batch_topk")
            for skip in (False, True)
        ],
        ("half", lambda: stirred(SparseAutoencoder(D, H, RULES["relu"]), torch.bfloat16)),
        ("double", lambda: stirred(SparseAutoencoder(D, H, RULES["jumprelu"]), torch.float64)),
    ],
    "sparsify": [
        *[(f"sae {rule}", lambda r=rule: autoencoder(r)) for rule in ("topk", "groupmax")],
        *[
            (f"transcoder {s}", lambda s=s: stirred(Transcoder(D, H, D, RULES["topk"], skip=s)))
            for s in (False, True)
        ],
        ("skip", lambda: stirred(SparseCoder(D, H, D, RULES["topk"], centered=True, skip=True))),
        ("half", lambda: stirred(SparseAutoencoder(D, H, RULES["topk"]), torch.float16)),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("format", "make"),
    [
        pytest.param(format, make, id=f"{format}: {name}")
        for format, cases in CASES.items()
        for name, make in cases
    ],
)
def test_what_is_saved_comes_back_to_the_bit(tmp_path, format, make):
    coder = make()
    save(coder, tmp_path / "a", format=format)
    again = load(tmp_path / "a")
    x = draw(50, D, seed=99)
    for name in ("encoder", "decoder", "b_enc", "b_dec", "W_skip"):
        mine, found = getattr(coder, name), getattr(again, name)
        assert (mine is None and found is None) or torch.equal(mine, found), name
        assert mine is None or mine.dtype == found.dtype
    with torch.no_grad():
        f = coder.encode(x)
        assert torch.equal(f, again.encode(x))
        assert torch.equal(coder.decode(f, x), again.decode(f, x))
        assert f.count_nonzero() > 0
    assert type(again) is type(coder)
    if coder.nonlinearity.name != "batch_topk" or format != "saelens":
        assert again.config() == coder.config()
        torch.testing.assert_close(again.state_dict(), coder.state_dict(), rtol=0, atol=0)
    where = {k: v for k, v in again.origin.items() if k.startswith("site")}
    assert where == {k: v for k, v in coder.origin.items() if k.startswith("site")}
    save(again, tmp_path / "b", format=format)  # and what came back is written as it was
    first, second = (load_file(next((tmp_path / n).glob("*.safetensors"))) for n in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    "make",
    [
        lambda: Crosscoder(2, D, H, RULES["batch_topk"], exclusive=(3, 3)),
        lambda: CrossLayerTranscoder(2, D, H),
    ],
)
def test_what_spans_layers_or_models_comes_back_to_the_bit(tmp_path, make):
    coder = make()
    coder.origin = {"site_in": ["layers.0", "layers.1"]}
    save(coder, tmp_path / "a")
    again = load(tmp_path / "a")
    assert type(again) is type(coder)
    assert again.origin == coder.origin
    assert again.config() == coder.config()
    torch.testing.assert_close(again.state_dict(), coder.state_dict(), rtol=0, atol=0)


def test_batch_topk_of_ranks_is_written_with_a_threshold_for_each_latent(tmp_path):
    coder = autoencoder("batch_topk", rank_by_norm=True)
    with torch.no_grad():
        coder.decoder[2] = 0
    save(coder, tmp_path / "a", format="saelens")
    again, x = load(tmp_path / "a"), draw(200, D, seed=99)
    assert torch.equal(coder.encode(x), again.encode(x))
    assert again.nonlinearity.threshold.max() > 1e30  # of the latent that writes nothing
    metadata = json.loads((tmp_path / "a" / "cfg.json").read_text())["metadata"]
    assert metadata["training_architecture"] == "batchtopk"
    assert metadata["training_k"] == 3


def negative():
    coder = autoencoder("jumprelu")
    with torch.no_grad():
        coder.nonlinearity.threshold[0] = -1
    return coder


def shifted():
    coder = stirred(Transcoder(D, H, D, RULES["topk"]))
    coder.b_in = torch.nn.Parameter(torch.ones(D))
    return coder


def broken():
    coder = autoencoder("topk")
    with torch.no_grad():
        coder.b_dec[1] = float("nan")
    return coder


@pytest.mark.parametrize(
    ("format", "make", "words"),
    [
        ("saelens", lambda: Crosscoder(2, D, H), "cannot hold a Crosscoder"),
        ("sparsify", lambda: CrossLayerTranscoder(2, D, H), "cannot hold a CrossLayerTranscoder"),
        ("saelens", lambda: autoencoder("relu", deep=3), r"hidden layers \(deep=3\)"),
        ("saelens", lambda: autoencoder("groupmax"), "the nonlinearity groupmax"),
        ("saelens", negative, "thresholds below 0"),
        ("saelens", shifted, r"an input shift of its own \(b_in\)"),
        ("saelens", broken, "b_dec holds values that are not finite"),
        ("saelens", lambda: stirred(SparseAutoencoder(D, H, RULES["gated"])),
         r"gated dictionary with an encoder bias .* call dictionary.formats.fold_encoder_bias"),
        ("saelens", lambda: Transcoder(D, H, 5, RULES["topk"]), "a transcoder with topk"),
        ("saelens", lambda: Transcoder(D, H, 5, RULES["relu"], normalization="layer_norm"),
         "a transcoder with a normalization"),
        ("saelens", lambda: SparseCoder(D, H, D, RULES["relu"], centered=True, skip=True),
         "a transcoder with a normalization or a centered input"),
        ("sparsify", lambda: autoencoder("relu"), "the nonlinearity relu, only topk and groupmax"),
        ("sparsify", lambda: autoencoder("abs_topk"), "the nonlinearity abs_topk"),
        ("sparsify", lambda: autoencoder("batch_topk"), "the nonlinearity batch_topk"),
        ("sparsify", lambda: autoencoder("topk", rank_by_norm=True), "a rule of rank"),
        ("sparsify", lambda: autoencoder("topk", normalization="unit_rms"), "normalization="),
        ("sparsify", lambda: autoencoder("topk", centered=False), "input that is not centered"),
        ("sparsify", lambda: Transcoder(D, H, 5, RULES["topk"]), "5 outputs of 6 inputs"),
        ("sparsify", shifted, r"an input shift of its own \(b_in\)"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_is_refused_by_name(tmp_path, format, make, words):
    with pytest.raises(DictionaryFormatError, match=words):
        save(make(), tmp_path / "a", format=format)
    assert not (tmp_path / "a").exists()


def test_folding_the_bias_of_a_gated_dictionary_changes_no_code():
    coder, x = stirred(SparseAutoencoder(D, H, RULES["gated"])), draw(50, D)
    before = coder.encode(x)
    assert coder.b_enc.any()
    fold_encoder_bias(coder)
    assert not coder.b_enc.any()
    torch.testing.assert_close(coder.encode(x), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="'topk' has no gate"):
        fold_encoder_bias(SparseAutoencoder(D, H, RULES["topk"]))


@pytest.mark.parametrize("format", ["own", "saelens", "sparsify"])
def test_a_directory_of_something_else_is_not_replaced(tmp_path, format):
    coder = autoencoder("topk")
    save(coder, tmp_path / "a", format=format)
    save(autoencoder("topk", centered=True), tmp_path / "a", format=format)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="b exists and"):
        save(coder, tmp_path / "b", format=format)
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["thesis.tex"]


def test_what_saelens_said_is_said_again(tmp_path):
    coder = autoencoder("relu")
    metadata = {"sae_lens_version": "5.1.0", "hook_name": "blocks.3.hook_z", "context_size": 128}
    coder.origin = {
        "format": "saelens",
        "site": "blocks.3.hook_z",
        "config": {"reshape_activations": "hook_z", "metadata": metadata},
    }
    save(coder, tmp_path / "a", format="saelens")
    config = json.loads((tmp_path / "a" / "cfg.json").read_text())
    assert config["reshape_activations"] == "hook_z"
    assert config["metadata"] == {**metadata, "sae_lens_version": "6.0.0"}
