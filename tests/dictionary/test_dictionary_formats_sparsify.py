import foreign_files as foreign
import numpy as np
import pytest
from foreign_files import D, H, K, array, draw, rows

from manifold_unlearn.dictionary import SparseAutoencoder, SparseCoder, Transcoder
from manifold_unlearn.dictionary.formats import DictionaryFormatError, load

N = 4 * D


def tensors():
    return {
        "encoder.weight": draw(N, D),
        "encoder.bias": draw(N, seed=1),
        "W_dec": draw(N, D, seed=2),
        "b_dec": draw(D, seed=3),
    }


def reference(t, x, rule, centered):
    z = (array(x) - centered * array(t["b_dec"])) @ array(t["encoder.weight"]).T
    z = foreign.relu(z + array(t["encoder.bias"]))
    if rule == "topk":
        f = foreign.top(z, K)
    else:
        groups = z.reshape(len(z), K, -1)
        best = groups == groups.max(2, keepdims=True)
        f = np.where(best, groups, 0).reshape(z.shape)
    return f, f @ array(t["W_dec"]) + array(t["b_dec"])


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("rule", ["topk", "groupmax"])
def test_every_kind(tmp_path, rule, transcode, skip):
    t, x = tensors(), rows()
    f, out = reference(t, x, rule, centered=not transcode)
    if skip:
        t["W_skip"] = draw(D, D, seed=4)
        out = out + array(x) @ array(t["W_skip"]).T
    place = foreign.sparsify(
        tmp_path / "layers.3.mlp", t, activation=rule, transcode=transcode, skip_connection=skip
    )
    coder = load(place)
    foreign.agree(coder, x, f, out)
    assert type(coder) is (Transcoder if transcode else SparseCoder if skip else SparseAutoencoder)
    sites = {name: value for name, value in coder.origin.items() if name.startswith("site")}
    both = {"site_in": "layers.3.mlp.input", "site_out": "layers.3.mlp"}
    assert sites == (both if transcode else {"site": "layers.3.mlp"})


@pytest.mark.parametrize(
    ("folder", "site"),
    [
        ("layers.10", "layers.10"),
        ("h.3.mlp", "layers.3.mlp"),
        ("layers.2.attention", "layers.2.attn"),
        ("embed_tokens", "embed"),
        ("layers.4/seed7", "layers.4"),
        ("mine", None),
    ],
)
def test_a_hookpoints_directory_is_its_site(tmp_path, folder, site):
    place = foreign.sparsify(tmp_path / "run" / folder, tensors())
    parent = place.parent.parent if "seed" in folder else place.parent
    foreign.write_json(parent / "config.json", {"model": "EleutherAI/pythia-70m"})
    origin = load(place).origin
    assert origin.get("site") == site
    assert origin.get("model") == "EleutherAI/pythia-70m"


def test_a_run_of_several_hookpoints_asks_which(tmp_path):
    foreign.sparsify(tmp_path / "layers.0", tensors())
    foreign.sparsify(tmp_path / "layers.1", tensors())
    with pytest.raises(DictionaryFormatError, match=r"2 dictionaries \(layers.0, layers.1\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_latents": H}, "says 20 latents of 6 features; encoder.weight has shape"),
        ({"d_in": 7}, "of 7 features"),
        ({"activation": "relu"}, "activation='relu' is not one of"),
        ({"k": -1}, "k=-1 must be at least 1"),
        ({"activation": "groupmax", "k": 5}, "k=5 does not divide 24"),
        ({"skip_connection": True}, "has no tensor W_skip"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, config, words):
    foreign.sparsify(tmp_path, tensors(), **config)
    with pytest.raises(DictionaryFormatError, match=words):
        load(tmp_path)


def test_the_number_of_latents_may_be_said(tmp_path):
    foreign.sparsify(tmp_path, tensors(), num_latents=N, expansion_factor=99)
    assert load(tmp_path).d_sae == N


def test_weights_without_their_configuration_say_what_is_missing(tmp_path):
    foreign.sparsify(tmp_path, tensors())
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(DictionaryFormatError, match="cfg.json is missing"):
        load(tmp_path)
