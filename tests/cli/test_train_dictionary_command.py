import json

import pytest
import torch
from shell import refused, run

from manifold_unlearn import capture, dictionary, load_model


@pytest.fixture(scope="module")
def words(files):
    return ("train-dictionary", files / "model", "--texts", files / "texts.jsonl", "--latents", 40,
            "--k", 3, "--tokens", 600, "--batch-size", 60)  # fmt: skip


def test_dictionaries_of_several_sites_are_trained_measured_and_saved(words, tmp_path, capsys):
    run(
        *words,
        "--sites",
        "layers.0",
        "layers.1.mlp.input->layers.1.mlp",
        "--skip",
        "--out",
        tmp_path,
    )
    sae = dictionary.load(tmp_path / "layers.0")
    transcoder = dictionary.load(tmp_path / "layers.1.mlp.input_to_layers.1.mlp")
    assert isinstance(sae, dictionary.SparseAutoencoder)
    assert isinstance(transcoder, dictionary.Transcoder) and transcoder.W_skip is not None
    assert sae.origin["site"] == "layers.0"
    assert transcoder.origin["site_out"] == "layers.1.mlp"
    figures = json.loads((tmp_path / "metrics.json").read_text("utf-8"))
    assert list(figures) == ["layers.0", "layers.1.mlp.input->layers.1.mlp"]
    assert not (tmp_path / "checkpoint").exists()
    printed = capsys.readouterr().out
    assert "loss recovered" in printed and f"wrote {tmp_path}" in printed


def test_a_dictionary_for_saelens_reads_the_same(words, files, tmp_path):
    for name in ("own", "saelens"):
        run(*words, "--sites", "layers.1", "--format", name, "--out", tmp_path / name)
    own, other = (dictionary.load(tmp_path / name / "layers.1") for name in ("own", "saelens"))
    model, tokenizer = load_model(files / "model")
    rows = capture(model, tokenizer, ["a river and a stone"], "layers.1")["layers.1"]
    assert torch.equal(own.encode(rows), other.encode(rows))


def test_the_first_token_is_read_on_request(words, tmp_path):
    found = []
    for flags in ((), ("--keep-first",)):
        out = tmp_path / f"out{len(flags)}"
        run(*words, "--sites", "layers.0", *flags, "--out", out)
        found.append(json.loads((out / "metrics.json").read_text("utf-8"))["layers.0"])
    without, kept = found
    assert without["spliced"]["clean"] == kept["spliced"]["clean"]
    assert without["spliced"]["zeroed"] != kept["spliced"]["zeroed"]
    assert without["fidelity"] != kept["fidelity"]


def test_wrong_inputs_are_one_line(words, files, tmp_path, capsys):
    line = refused(capsys, *words, "--sites", "layers.7", "--out", tmp_path / "out")
    assert "no site 'layers.7'" in line
    (tmp_path / "one.jsonl").write_text('{"text": "only one"}\n', "utf-8")
    given = (*words[:3], tmp_path / "one.jsonl", "--sites", "layers.0", "--out", tmp_path / "out")
    assert "give at least 2: one is held out" in refused(capsys, *given)
    assert not (tmp_path / "out").exists()
