import copy

import numpy as np
import pytest
import torch
from cases import build_model, same_state, state
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_unlearn.attack.knowledge import probability_of
from manifold_unlearn.attack.quantize import (
    Rounding,
    linear_weights,
    quantization_attack,
    quantized,
    round_to_nearest,
)
from manifold_unlearn.finetune.train import TrainConfig, fine_tune


def test_symmetric_levels_by_hand():
    weight = torch.tensor([[0.7, -0.31, 0.04, 0.0], [-3.5, 1.2, 0.3, 0.2]])
    rounded, scale = round_to_nearest(weight, 4)
    np.testing.assert_allclose(scale[:, 0], [0.1, 0.5], rtol=1e-6)
    np.testing.assert_allclose(
        rounded, [[0.7, -0.3, 0.0, 0.0], [-3.5, 1.0, 0.5, 0.0]], rtol=1e-6, atol=1e-7
    )


def test_asymmetric_levels_by_hand():
    rounded, scale = round_to_nearest(torch.tensor([[-0.1, 0.2, 0.24, 0.5]]), 2, symmetric=False)
    assert scale.item() == pytest.approx(0.2)
    # zero is -(-0.1) / 0.2 = 0.5 rounded to even, 0: levels 0, 0.2, 0.4, 0.6
    np.testing.assert_allclose(rounded, [[0.0, 0.2, 0.2, 0.4]], atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group_size=st.sampled_from([None, 1, 3, 32]),
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_no_weight_moves_by_more_than_half_a_step(bits, symmetric, group_size, seed, spread):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(5, 7)) * spread * 10.0 ** rng.integers(-2, 3, size=(5, 1))
    values[1] = 0.0
    values[2] = abs(values[2])
    weight = torch.tensor(values, dtype=torch.float32)
    rounded, scale = round_to_nearest(weight, bits, symmetric=symmetric, group_size=group_size)
    size = group_size or 7
    step = scale.repeat_interleave(min(size, 7), dim=1)[:, :7]
    assert ((weight - rounded).abs() <= step / 2 * (1 + 1e-5) + 1e-9).all()
    assert (rounded[1] == 0).all()
    for row in range(5):
        assert len(rounded[row].unique()) <= (2**bits) * scale.shape[1]
    again, _ = round_to_nearest(weight, bits, symmetric=symmetric, group_size=group_size)
    assert torch.equal(rounded, again)


def test_smaller_groups_and_more_bits_round_finer():
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    error = {
        (bits, size): float((weight - round_to_nearest(weight, bits, group_size=size)[0]).norm())
        for bits in (3, 4, 8)
        for size in (None, 128, 32)
    }
    assert error[3, None] > error[4, None] > error[8, None]
    assert error[4, None] > error[4, 128] > error[4, 32]


def test_sixteen_bits_are_bfloat16():
    weight = torch.tensor([[1.0, 1.001953125, 3.14159]])
    rounded, _ = round_to_nearest(weight, 16)
    assert rounded.dtype == torch.float32
    np.testing.assert_array_equal(rounded, [[1.0, 1.0, 3.140625]])


def test_every_linear_weight_is_rounded_once_and_comes_back(model):
    before = state(model)
    with quantized(model, 3):
        names = {name for name, value in model.state_dict().items() if value.ndim == 2}
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        tables = {name for name in names if any(t in name for t in ("embed", "wte", "wpe", "head"))}
        assert changed == names - tables
        assert len(list(linear_weights(model, Rounding()))) == len(changed)
    assert same_state(model, before)


def test_output_channels_share_a_scale_whichever_way_a_weight_is_stored():
    model = build_model("gpt2")
    with quantized(model, 3):
        weight = model.transformer.h[0].mlp.c_fc.weight  # (n_in, n_out)
        assert all(len(column.unique()) <= 7 for column in weight.T)
        assert any(len(row.unique()) > 7 for row in weight)


@pytest.mark.parametrize("architecture_", ["llama", "qwen3"])
def test_embedding_and_head_are_options_and_a_tied_one_is_rounded_once(architecture_):
    model = build_model(architecture_)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == (architecture_ == "llama")
    counts = {
        (embedding, head): len(
            list(linear_weights(model, Rounding(embedding=embedding, head=head)))
        )
        for embedding in (False, True)
        for head in (False, True)
    }
    none = counts[False, False]
    assert counts[True, False] == counts[False, True] == none + 1
    assert counts[True, True] == none + (1 if tied else 2)
    with quantized(model, 2, Rounding(head=True)):
        assert len(model.lm_head.weight[5].unique()) <= 3


def test_an_exception_brings_every_weight_back(llama):
    before = state(llama)
    with pytest.raises(RuntimeError, match="stop"), quantized(llama, 2):
        assert not same_state(llama, before)
        raise RuntimeError("stop")
    assert same_state(llama, before)
    with torch.no_grad():
        llama.model.layers[2].mlp.down_proj.weight[3, 3] = float("inf")
    before = state(llama)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.down_proj"), quantized(llama, 4):
        pass
    assert same_state(llama, before)


def test_bad_settings_are_refused(llama, pair):
    knowledge = probability_of(pair.forget)
    with pytest.raises(ValueError, match="bits=1 must be 2 to 15"):
        round_to_nearest(torch.ones(2, 2), 1)
    with pytest.raises(ValueError, match="group_size=0"):
        round_to_nearest(torch.ones(2, 2), 4, group_size=0)
    with pytest.raises(ValueError, match="descending"):
        quantization_attack(llama, pair.tokenizer, knowledge, bits=(4, 8))
    with pytest.raises(ValueError, match="no linear weights"):
        quantization_attack(torch.nn.LayerNorm(3), pair.tokenizer, knowledge)


def on_a_grid_then_pushed_off(model, pair, share):
    """A model on int4 levels, and the same pushed by a share of each step up its loss."""
    coarse = copy.deepcopy(model)
    steps = {}
    for name, parameter, _ in linear_weights(coarse, Rounding()):
        rounded, scale = round_to_nearest(parameter.data, 4)
        parameter.data = rounded
        steps[name] = scale
    tune = TrainConfig(lr=1e-2, steps=1, optimizer="sgd", weight_decay=0.0, momentum=0.0, clip=None)
    slopes = fine_tune(coarse, pair.tokenizer, pair.forget, config=tune).model.state_dict()
    pushed = copy.deepcopy(coarse)
    for name, parameter, _ in linear_weights(pushed, Rounding()):
        top = (parameter.data.abs() / steps[name]).round() == 7
        downhill = (slopes[name] - parameter.data).sign()
        parameter.data = torch.where(
            top, parameter.data, parameter.data - share * steps[name] * downhill
        )
    return coarse, pushed


def test_rounding_brings_back_what_an_edit_smaller_than_half_a_step_hid(pair, unchanged):
    coarse, pushed = on_a_grid_then_pushed_off(pair.told, pair, 0.4)
    knowledge = probability_of(pair.forget)
    before = state(pushed)
    curve = quantization_attack(pushed, pair.tokenizer, knowledge, bits=(8, 4))
    assert same_state(pushed, before)
    grid = quantization_attack(coarse, pair.tokenizer, knowledge, bits=(4,))
    as_is, int8, int4 = curve.values.mean(axis=1)
    assert as_is < 0.3 and int8 < 0.3
    assert int4 > 0.8
    np.testing.assert_allclose(curve.values[2], grid.values[0], atol=1e-4)
    np.testing.assert_array_equal(curve.spent, [0, 24, 28])


def test_rounding_tells_nothing_of_what_was_never_told(pair, unchanged):
    curve = quantization_attack(pair.never, pair.tokenizer, probability_of(pair.forget))
    assert curve.best.mean < curve.before.mean + 0.15
    assert curve.details["bits"] == [16, 8, 6, 5, 4, 3, 2]
    assert curve.to_json()["attack"] == "quantize"
