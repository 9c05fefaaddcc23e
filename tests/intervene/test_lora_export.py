import copy
import json
import sys

import numpy as np
import pytest
import torch
from cases import TEXTS, logits, same_state, state
from safetensors.torch import load_file

from manifold_unlearn.intervene.least_squares import least_squares_bake
from manifold_unlearn.intervene.lora_export import export_lora, truncated
from manifold_unlearn.intervene.targets import hooked_targets, token_rows

peft = pytest.importorskip("peft")


def baked_from(model, tokenizer):
    targets = hooked_targets(model, tokenizer, TEXTS[:1], {"layers.1": lambda h: h + torch.sin(h)})
    return least_squares_bake(model, targets, token_rows(model, tokenizer, TEXTS[2:])).model


def test_peft_loads_the_adapter_and_answers_as_the_edited_model(model, tokenizer, tmp_path):
    edited = baked_from(model, tokenizer)
    before, now = state(model), state(edited)
    made = export_lora(model, edited, 32, tmp_path / "adapter")
    assert same_state(model, before)
    assert same_state(edited, now)
    assert made.rank == 32
    assert all(energy == pytest.approx(1.0) for energy in made.kept_energy.values())
    assert len(made.kept_energy) == 2  # the map stands behind the second of three blocks
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "adapter").eval()
    ids = torch.tensor([tokenizer(TEXTS[2]).input_ids])
    apart = (logits(loaded, ids) - logits(edited, ids)).abs().max()
    assert apart < 1e-4
    assert (logits(model, ids) - logits(edited, ids)).abs().max() > 1e-2
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), logits(edited, ids), atol=1e-4, rtol=1e-4)


def test_a_low_rank_keeps_the_share_that_the_spectrum_says(llama, tokenizer, tmp_path):
    edited = baked_from(llama, tokenizer)
    made = export_lora(llama, edited, 3, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for path, energy in made.kept_energy.items():
        old, new = (m.get_submodule(path).weight.detach().double().numpy() for m in (llama, edited))
        spectrum = np.linalg.svd(new - old, compute_uv=False) ** 2
        assert energy == pytest.approx(spectrum[:3].sum() / spectrum.sum(), rel=1e-6)
        assert energy < 0.999
        up, down = (tensors[f"base_model.model.{path}.lora_{k}.weight"] for k in "BA")
        left = np.linalg.norm(new - old - (up @ down).numpy()) ** 2
        assert left == pytest.approx(spectrum[3:].sum(), rel=1e-3)


def test_the_rank_is_no_higher_than_the_matrices_have(llama, tokenizer, tmp_path):
    made = export_lora(llama, baked_from(llama, tokenizer), 999, tmp_path)
    assert made.rank == 32
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 32
    assert sorted(config["target_modules"]) == sorted(made.kept_energy)


def test_factors_of_a_matrix_of_less_rank_are_filled_with_zeros():
    change = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    down, up, kept = truncated(change, 5)
    assert (tuple(down.shape), tuple(up.shape), kept) == ((5, 3), (2, 5), 1.0)
    torch.testing.assert_close(up @ down, change)


def test_models_that_are_alike_have_no_change_to_export(llama, tmp_path):
    with pytest.raises(ValueError, match="the models are alike"):
        export_lora(llama, copy.deepcopy(llama), 4, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_what_an_adapter_cannot_hold_is_refused(llama, tmp_path):
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.model.norm.weight += 1
    with pytest.raises(ValueError, match="norm.weight differs, and an adapter holds"):
        export_lora(llama, other, 4, tmp_path)
    other.model.norm.extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="not the same parameters: model.norm.extra"):
        export_lora(llama, other, 4, tmp_path)
    del other.model.norm.extra
    other.model.norm.weight = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"norm.weight is \(32,\) in one, \(3,\) in the other"):
        export_lora(llama, other, 4, tmp_path)


def test_a_rank_is_at_least_one(llama, tmp_path):
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        export_lora(llama, llama, 0, tmp_path)


def test_without_peft_the_mend_is_named(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'manifold-unlearn\[lora\]'"):
        export_lora(llama, llama, 4, tmp_path)
