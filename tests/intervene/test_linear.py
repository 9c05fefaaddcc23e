import pytest
import torch
from cases import HIDDEN, WIDTH, build_model

from manifold_unlearn.intervene.linear import linear_at


@pytest.mark.parametrize("part", ["attn", "mlp", "mlp.hidden"])
def test_the_writer_and_the_reader_of_a_block_are_found(model, part):
    linear = linear_at(model, f"layers.1.{part}")
    assert model.get_submodule(linear.path) is linear.module
    assert linear.role == ("reads" if part == "mlp.hidden" else "writes")
    assert linear.width == (HIDDEN if part == "mlp.hidden" else WIDTH)
    d_in = HIDDEN if part.startswith("mlp") else 32
    assert tuple(linear.weight.shape) == (WIDTH, d_in)
    keys = torch.randn(5, d_in, generator=torch.Generator().manual_seed(0))
    bias = 0 if linear.module.bias is None else linear.module.bias
    with torch.no_grad():
        torch.testing.assert_close(
            (keys.double() @ linear.weight.T).float() + bias, linear.module(keys), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_weight_written_is_the_weight_read(name):
    linear = linear_at(build_model(name), "layers.0.mlp")
    assert linear.transposed == (name == "gpt2")
    wanted = torch.arange(WIDTH * HIDDEN, dtype=torch.float64).reshape(WIDTH, HIDDEN)
    linear.write(wanted)
    assert torch.equal(linear.weight, wanted)
    assert linear.module.weight.dtype == torch.float32


@pytest.mark.parametrize("site", ["embed", "layers.1", "model.norm"])
def test_where_no_linear_module_writes_there_is_none(llama, site):
    assert linear_at(llama, site) is None
