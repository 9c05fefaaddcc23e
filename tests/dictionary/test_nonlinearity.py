import numpy as np
import pytest
import torch

from manifold_unlearn.dictionary.nonlinearity import (
    AbsTopK,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    ReLU,
    TopK,
    largest,
    make_nonlinearity,
)

PRE = torch.tensor([[3.0, -4.0, 1.0, 2.0], [-1.0, -2.0, -3.0, 0.5]])
ALL = ("relu", "topk", "abs_topk", "groupmax", "batch_topk", "jumprelu", "gated")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (ReLU(), [[3, 0, 1, 2], [0, 0, 0, 0.5]]),
        (TopK(2), [[3, 0, 0, 2], [0, 0, 0, 0.5]]),
        (AbsTopK(2), [[3, -4, 0, 0], [0, -2, -3, 0]]),
        (GroupMax(2), [[3, 0, 0, 2], [0, 0, 0, 0.5]]),
        (BatchTopK(1), [[3, 0, 0, 2], [0, 0, 0, 0]]),
        (JumpReLU(4, threshold=1.5), [[3, 0, 0, 2], [0, 0, 0, 0]]),
    ],
)
def test_values_on_two_rows(shape, expected):
    assert shape(PRE).tolist() == expected


def test_a_scale_ranks_but_does_not_multiply():
    scale = torch.tensor([0.1, 1.0, 9.0, 1.0])
    assert TopK(1)(PRE, scale).tolist() == [[0, 0, 1, 0], [0, 0, 0, 0.5]]
    assert GroupMax(2)(PRE, scale)[0].tolist() == [3, 0, 1, 0]
    assert BatchTopK(1)(PRE, scale)[0].tolist() == [0, 0, 1, 2]


def test_more_than_there_are_is_all_of_them():
    assert torch.equal(TopK(9)(PRE), PRE.relu())
    assert torch.equal(BatchTopK(9)(PRE), PRE.relu())


def test_after_training_a_row_does_not_depend_on_its_batch():
    shape = BatchTopK(2, decay=0.5)
    draw = torch.Generator().manual_seed(0)
    least = []
    for _ in range(12):
        pre = torch.randn(64, 20, generator=draw)
        kept = shape(pre)
        values = kept[kept > 0]
        assert len(values) == 128
        assert values.min() >= pre.flatten().topk(128).values.min()
        least.append(float(values.min()))
    expected = least[0]
    for value in least[1:]:
        expected = 0.5 * expected + 0.5 * value
    assert float(shape.threshold) == pytest.approx(expected, rel=1e-5)
    shape.eval()
    pre = torch.randn(64, 20, generator=draw)
    assert torch.equal(shape(pre)[:3], shape(pre[:3]))
    assert torch.equal(shape(pre), torch.where(pre > shape.threshold, pre, 0.0))
    before = shape.threshold.clone()
    shape(100 * pre)
    assert torch.equal(shape.threshold, before)


def test_the_jump_learns_its_threshold_through_a_rectangle():
    shape = JumpReLU(3, threshold=1.0, bandwidth=0.5)
    pre = torch.tensor([[1.1, 0.8, 2.0], [0.9, 1.3, 1.2]], requires_grad=True)
    grad = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    shape(pre).backward(grad)
    near = np.array([[1, 1, 0], [1, 0, 1]])
    expected = -(1.0 / 0.5) * (near * grad.numpy()).sum(0)
    np.testing.assert_allclose(shape.threshold.grad.numpy(), expected)
    assert torch.equal(pre.grad, grad * (pre > 1))
    shape.threshold.grad = None
    steps = shape.step(pre)
    assert steps.tolist() == [[1, 0, 1], [0, 1, 1]]
    steps.sum().backward()
    np.testing.assert_allclose(shape.threshold.grad.numpy(), -near.sum(0) / 0.5)


def test_the_gate_and_the_magnitude_are_two_readings():
    shape = Gated(2)
    with torch.no_grad():
        shape.gate_bias.copy_(torch.tensor([1.0, -2.0]))
        shape.log_gain.copy_(torch.tensor([np.log(3.0), 0.0]))
        shape.magnitude_bias.copy_(torch.tensor([2.0, 1.0]))
    pre = torch.tensor([[-0.5, 1.5], [-2.0, 3.0]])
    assert torch.allclose(shape(pre), torch.tensor([[0.5, 0.0], [0.0, 4.0]]))
    assert torch.allclose(shape.gate(pre), torch.tensor([[0.5, 0.0], [0.0, 1.0]]))


@pytest.mark.parametrize("name", ALL)
def test_a_configuration_makes_the_same_again(name):
    made = make_nonlinearity(
        {"name": name, **({"k": 3} if "top" in name or "max" in name else {})}, 6
    )
    again = make_nonlinearity(made.config(), 6)
    assert type(again) is type(made)
    assert again.config() == made.config()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "softmax"}, "nonlinearity 'softmax' is not one of relu, topk"),
        ({}, "nonlinearity None is not one of"),
        ({"name": "topk"}, "topk takes k; got nothing"),
        ("topk", "topk takes k; got nothing"),
        ({"name": "relu", "k": 3}, "relu takes nothing; got k"),
        ({"name": "topk", "k": 0}, "k=0 must be at least 1"),
        ({"name": "batch_topk", "k": 0}, "k=0 must be at least 1"),
        ({"name": "groupmax", "k": 0}, "k=0 must be at least 1"),
        ({"name": "jumprelu", "threshold": 0.0}, "threshold=0.0 and bandwidth=0.001 must be"),
    ],
)
def test_wrong_configurations_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        make_nonlinearity(config, 4)


def test_groups_must_divide_the_latents():
    with pytest.raises(ValueError, match="k=3 groups do not divide 4 latents"):
        GroupMax(3)(PRE)


@pytest.mark.parametrize("d", [800, 801, 40])
def test_the_largest_are_found_in_two_rounds_as_in_one(d):
    values = torch.randn(50, d, generator=torch.Generator().manual_seed(0))
    expected = np.sort(np.argsort(-values.numpy(), axis=1)[:, :20], axis=1)
    np.testing.assert_array_equal(largest(values, 20).sort(1).values.numpy(), expected)


def test_a_name_alone_is_enough_where_nothing_is_needed():
    assert make_nonlinearity("relu", 4).config() == {"name": "relu"}
    assert make_nonlinearity("jumprelu", 4).threshold.shape == (4,)
