"""Every loss against its formula in numpy, and its gradient where it is not autograd's own."""

import numpy as np
import pytest
import torch

from manifold_unlearn.dictionary import SparseCode
from manifold_unlearn.dictionary import objectives as losses
from manifold_unlearn.dictionary.nonlinearity import JumpReLU


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def tensor(array):
    return torch.tensor(array, dtype=torch.float64)


def fvu(target, output):
    return ((target - output) ** 2).sum() / ((target - target.mean(0)) ** 2).sum()


def test_unexplained_variance(rng):
    y, out = rng.normal(size=(2, 20, 5)) + 3
    found = losses.fraction_of_variance_unexplained(tensor(y), tensor(out))
    assert found.item() == pytest.approx(fvu(y, out))
    assert float(losses.fraction_of_variance_unexplained(tensor(y), tensor(y))) == 0
    mean = np.broadcast_to(y.mean(0), y.shape)
    assert float(losses.fraction_of_variance_unexplained(tensor(y), tensor(mean))) == (
        pytest.approx(1)
    )


def test_unexplained_variance_weighs_streams_alike(rng):
    y, out = rng.normal(size=(2, 20, 3, 5))
    loud = np.array([1, 100, 0.01])[:, None]
    expected = np.mean([fvu(y[:, s], out[:, s]) for s in range(3)])
    found = losses.fraction_of_variance_unexplained(tensor(y * loud), tensor(out * loud))
    assert found.item() == pytest.approx(expected)


def test_constant_rows_have_a_finite_loss():
    y = torch.ones(4, 3)
    assert torch.isfinite(losses.fraction_of_variance_unexplained(y, y))


def test_l1_is_weighted_by_the_decoder_of_each_stream(rng):
    f, flat, streams = (
        rng.uniform(size=(6, 4)),
        rng.normal(size=(4, 5)),
        rng.normal(size=(4, 2, 5)),
    )
    weights = np.sqrt((flat**2).sum(1))
    found = losses.l1_penalty(tensor(f), losses.decoder_norms(tensor(flat)))
    assert found.item() == pytest.approx((f * weights).sum() / 6)
    weights = np.sqrt((streams**2).sum(2)).sum(1)
    found = losses.l1_penalty(tensor(f), losses.decoder_norms(tensor(streams)))
    assert found.item() == pytest.approx((f * weights).sum() / 6)


def test_l0_counts_and_pulls_thresholds_by_the_rectangle(rng):
    pre, threshold, width = rng.normal(size=(50, 4)), np.array([0.1, 0.3, 0.5, 0.7]), 0.4
    shape = JumpReLU(4, bandwidth=width).double()
    with torch.no_grad():
        shape.threshold.copy_(tensor(threshold))
    count = losses.l0_penalty(tensor(pre), shape)
    assert count.item() == pytest.approx((pre > threshold).sum() / 50)
    count.backward()
    near = (np.abs(pre - threshold) < width / 2).sum(0)
    np.testing.assert_allclose(shape.threshold.grad.numpy(), -near / width / 50, rtol=1e-12)
    l0 = (pre > threshold).sum() / 50
    found = losses.l0_penalty(tensor(pre), shape, target=2.0)
    assert found.item() == pytest.approx((l0 / 2 - 1) ** 2)


def test_tanh_counts_softly(rng):
    f, norms = rng.uniform(size=(6, 4)), rng.uniform(size=4)
    found = losses.tanh_penalty(tensor(f), tensor(norms), steepness=3.0)
    assert found.item() == pytest.approx(np.tanh(3 * f * norms).sum() / 6)


def test_gates_learn_through_a_frozen_decoder(rng):
    y, gate, decoder, bias = (
        tensor(rng.normal(size=shape)) for shape in ((9, 5), (9, 4), (4, 5), (5,))
    )
    for each in (gate, decoder, bias):
        each.requires_grad_()
    found = losses.gated_auxiliary(y, gate, decoder, bias)
    plain = [each.detach().numpy() for each in (y, gate, decoder, bias)]
    assert found.item() == pytest.approx(fvu(plain[0], plain[1] @ plain[2] + plain[3]))
    found.backward()
    assert decoder.grad is None and bias.grad is None
    assert gate.grad.abs().sum() > 0


@pytest.mark.parametrize(("k", "n_dead"), [(2, 6), (8, 6)])
def test_dead_latents_rebuild_the_error(rng, k, n_dead):
    error, read = rng.normal(size=(2, 30, 5))
    encoder, decoder = rng.normal(size=(2, n_dead, 5))
    bias = rng.normal(size=n_dead)
    pre = read @ encoder.T + bias
    kept = np.argsort(-pre, axis=1)[:, :k]
    z = np.zeros_like(pre)
    np.put_along_axis(z, kept, np.maximum(np.take_along_axis(pre, kept, 1), 0), 1)
    expected = min(n_dead / k, 1) * fvu(error, z @ decoder)
    weights = [tensor(array).requires_grad_() for array in (encoder, bias, decoder)]
    carried = tensor(error).requires_grad_()
    found = losses.auxiliary_of_dead(carried, tensor(read), losses.Dead(*weights), k)
    assert found.item() == pytest.approx(expected)
    found.backward()
    assert carried.grad is None
    assert all(weight.grad.abs().sum() > 0 for weight in weights)


def test_no_dead_latents_no_loss():
    none = losses.Dead(torch.empty(0, 3), torch.empty(0), torch.empty(0, 3))
    assert float(losses.auxiliary_of_dead(torch.ones(2, 3), torch.ones(2, 3), none, 4)) == 0


def test_prefixes_each_do_alone(rng):
    f = rng.uniform(size=(12, 6)) * (rng.uniform(size=(12, 6)) < 0.5)
    y, decoder, bias = rng.normal(size=(12, 4)), rng.normal(size=(6, 4)), rng.normal(size=4)
    expected = sum(fvu(y, f[:, :end] @ decoder[:end] + bias) for end in (1, 3, 6))
    code = SparseCode.of(tensor(f))
    found = losses.prefix_losses(tensor(y), code, tensor(decoder), tensor(bias), (1, 2, 3))
    assert found.item() == pytest.approx(expected)


def test_delta_is_for_exclusive_latents_alone(rng):
    f, y, decoder = (
        rng.uniform(size=(12, 4)),
        rng.normal(size=(12, 2, 3)),
        rng.normal(size=(4, 2, 3)),
    )
    exclusive = np.array([False, False, True, True])
    change = y[:, 1] - y[:, 0]
    rebuilt = f[:, 2:] @ (decoder[2:, 1] - decoder[2:, 0])
    expected = fvu(change - change.mean(0), rebuilt - rebuilt.mean(0))
    weight = tensor(decoder).requires_grad_()
    found = losses.delta_loss(tensor(y), SparseCode.of(tensor(f)), weight, torch.tensor(exclusive))
    assert found.item() == pytest.approx(expected)
    found.backward()
    assert weight.grad[:2].abs().sum() == 0 and weight.grad[2:].abs().sum() > 0


def test_delta_needs_two_streams():
    code = SparseCode.of(torch.ones(3, 2))
    with pytest.raises(ValueError, match="needs two streams"):
        losses.delta_loss(
            torch.ones(3, 3, 4), code, torch.ones(2, 3, 4), torch.ones(2, dtype=torch.bool)
        )
