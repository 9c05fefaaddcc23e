import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_unlearn.dictionary.codes import SparseCode, decode_sparse, encode_selected


def sparse_rows(n, m, share, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(n, m, generator=draw) * (torch.rand(n, m, generator=draw) < share)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 6), st.integers(1, 5), st.floats(0, 1), st.integers(0, 99))
def test_a_code_is_the_matrix_it_was_made_of(n, m, share, seed):
    dense = sparse_rows(n, m, share, seed)
    code = SparseCode.of(dense)
    assert torch.equal(code.dense(), dense)
    assert torch.equal(code.fires, (dense != 0).any(0))
    assert float(code.l0) == pytest.approx(float((dense != 0).sum() / max(n, 1)))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.floats(0, 1), st.integers(0, 99))
def test_decoding_is_the_product_with_empty_rows_and_repeated_latents(n, m, share, seed):
    dense = sparse_rows(n, m, share, seed)
    weight = torch.randn(m, 3, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(decode_sparse(SparseCode.of(dense), weight), dense @ weight, atol=1e-6)


def test_gradients_are_those_of_finite_differences():
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(4, 3, generator=draw).double() for _ in range(2))
    bias, decoder = torch.randn(4, generator=draw).double(), torch.randn(4, 5, generator=draw)
    inputs = [t.double().requires_grad_() for t in (x, weight, bias, decoder)]
    row, latent = torch.tensor([0, 0, 2, 3, 3]), torch.tensor([1, 3, 0, 3, 2])

    def product(x, weight, bias, decoder):
        code = encode_selected(x, weight, bias, lambda pre: (row, latent))  # noqa: ARG005
        return decode_sparse(code, decoder)

    assert torch.autograd.gradcheck(product, inputs)
    numbers = [t.detach().numpy() for t in inputs]
    pre = numbers[0] @ numbers[1].T + numbers[2]
    kept = np.zeros_like(pre)
    kept[row, latent] = pre[row, latent]
    np.testing.assert_allclose(product(*inputs).detach().numpy(), kept @ numbers[3], atol=1e-12)


def test_what_needs_no_gradient_gets_none():
    x, weight = torch.randn(3, 2), torch.randn(4, 2, requires_grad=True)
    code = encode_selected(x, weight, torch.zeros(4), lambda pre: pre.nonzero(as_tuple=True))
    decode_sparse(code, torch.randn(4, 2)).sum().backward()
    assert weight.grad.shape == (4, 2) and x.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(dtype):
    code = SparseCode.of(sparse_rows(5, 4, 0.5, 0).to(dtype))
    weight = torch.randn(4, 3).to(dtype)
    out = decode_sparse(code, weight)
    assert out.dtype == dtype
    assert torch.allclose(out.float(), code.dense().float() @ weight.float(), atol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_devices_agree():
    dense, weight = sparse_rows(50, 40, 0.1, 0), torch.randn(40, 8)
    near = decode_sparse(SparseCode.of(dense.cuda()), weight.cuda()).cpu()
    assert torch.allclose(near, dense @ weight, atol=1e-5)
