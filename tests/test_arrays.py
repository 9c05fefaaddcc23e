import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import BaseEstimator

from manifold_unlearn.arrays import (
    as_rows,
    forget_mask,
    generator,
    require_finite,
    resolve_device,
    restore,
    row_blocks,
    row_weights,
    validate,
    working_dtype,
)

NUMPY = [np.float16, np.float32, np.float64, np.int64, np.int8]
TORCH = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", NUMPY)
def test_numpy_rows_come_in_at_the_working_dtype(dtype):
    X = np.arange(6, dtype=dtype).reshape(3, 2)
    rows = as_rows(X)
    narrow = dtype in (np.float16, np.float32)
    assert rows.dtype == (torch.float32 if narrow else torch.float64)
    np.testing.assert_array_equal(rows, X)


@pytest.mark.parametrize("dtype", TORCH)
def test_tensors_come_in_at_the_working_dtype(dtype):
    X = torch.arange(6.0).reshape(3, 2).to(dtype).requires_grad_()
    rows = as_rows(X)
    assert rows.dtype == working_dtype(dtype)
    assert not rows.requires_grad
    assert torch.equal(rows, X.detach().to(rows.dtype))


def test_lists_and_read_only_and_strided_arrays_are_taken():
    assert as_rows([[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]
    X = np.arange(12.0).reshape(3, 4)
    X.setflags(write=False)
    assert as_rows(X[::-1, ::2]).tolist() == [[8, 10], [4, 6], [0, 2]]


@pytest.mark.parametrize(
    ("X", "words"),
    [
        (torch.zeros(3), r"Expected 2D array for rows, got shape \(3,\)"),
        (torch.zeros(3, 2, dtype=torch.complex64), "Complex data not supported"),
        (torch.zeros(0, 2), r"rows has shape \(0, 2\): at least 1 sample"),
        (torch.zeros(2, 0), r"rows has shape \(2, 0\).*1 feature"),
        (np.zeros(3), "Expected 2D array"),
        (np.zeros((2, 2), dtype=complex), "Complex data not supported"),
        (np.zeros((0, 2)), "0 sample"),
    ],
)
def test_what_is_not_rows_is_refused(X, words):
    with pytest.raises(ValueError, match=words):
        as_rows(X, name="rows")


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_row_that_is_not_finite_is_named(kind, bad):
    X = np.zeros((5, 3))
    X[2, 1] = X[4, 0] = bad
    with pytest.raises(ValueError, match="rows contains NaN.*: 2 of 5 rows.* is row 2.*nothing"):
        as_rows(kind(X), name="rows")


def test_infinities_that_cancel_are_found():
    X = torch.tensor([[0.0, 0.0], [torch.inf, -torch.inf]])
    with pytest.raises(ValueError, match="first is row 1"):
        require_finite(X, "X")


def test_a_sum_that_overflows_is_no_infinity():
    require_finite(torch.full((4, 2), 3e38), "X")


def test_float16_that_overflowed_is_told_of_wider_dtypes():
    with pytest.raises(ValueError, match="float16 overflows above 65504: use bfloat16 or float32"):
        require_finite(torch.tensor([[1.0], [1e6]]).half(), "X")


def test_an_empty_tensor_is_finite():
    require_finite(torch.empty(0, 3), "X")


class Estimator(BaseEstimator):
    pass


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_validate_records_then_checks_the_number_of_features(kind):
    estimator = Estimator()
    validate(estimator, kind([[1.0, 2.0]]), reset=True)
    assert estimator.n_features_in_ == 2
    validate(estimator, kind([[3.0, 4.0]]), reset=False)
    with pytest.raises(ValueError, match="X has 3 features, but Estimator is expecting 2"):
        validate(estimator, kind([[1.0, 2.0, 3.0]]), reset=False)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, list])
def test_one_is_forget_and_all_else_is_retain(kind):
    mask = forget_mask(kind([1, 0, 2, 1, -1]), 5)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [True, False, False, True, False]


def test_labels_may_be_a_column_of_a_tensor_or_booleans():
    assert forget_mask(torch.tensor([[1], [0]]), 2).tolist() == [True, False]
    assert forget_mask(np.array([True, False]), 2).tolist() == [True, False]


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (None, "requires y to be passed, but the target y is None"),
        ([1, 0, 1], "inconsistent numbers of samples"),
        ([0, 2], "the forget set is empty: 0 of 2"),
        ([1, 1], "the retain set is empty: 2 of 2"),
    ],
)
def test_labels_that_do_not_fit_are_refused(y, words):
    with pytest.raises(ValueError, match=words):
        forget_mask(y, 2)


def test_no_weights_are_ones_and_weights_are_float64():
    X, forget = torch.zeros(3, 1), torch.tensor([True, False, False])
    assert row_weights(None, X, forget).tolist() == [1, 1, 1]
    weight = row_weights([1, 0, 2], X, forget)
    assert weight.dtype == torch.float64
    assert weight.tolist() == [1, 0, 2]


@pytest.mark.parametrize("weight", [[0, 1, 1], [1, 0, 0]])
def test_a_side_without_weight_is_refused(weight):
    with pytest.raises(ValueError, match="leaves the forget or the retain side without weight"):
        row_weights(weight, torch.zeros(3, 1), torch.tensor([True, False, False]))


@pytest.mark.parametrize("dtype", TORCH)
def test_a_tensor_gets_back_its_dtype(dtype):
    like = torch.zeros(2, dtype=dtype)
    assert restore(torch.ones(3, dtype=torch.float64), like).dtype == dtype
    assert restore(torch.ones(3, dtype=torch.int64), like).dtype == torch.int64


@pytest.mark.parametrize("dtype", NUMPY)
def test_an_array_gets_back_its_float_dtype(dtype):
    back = restore(torch.ones(3), np.zeros(2, dtype=dtype))
    assert isinstance(back, np.ndarray)
    assert back.dtype == (dtype if np.issubdtype(dtype, np.floating) else np.float32)


def test_integer_tensors_get_floats_back():
    assert restore(torch.full((2,), 0.5), torch.zeros(2, dtype=torch.int64)).tolist() == [0.5, 0.5]


def test_a_list_gets_an_array_back():
    assert isinstance(restore(torch.ones(2), [1.0, 2.0]), np.ndarray)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(n=st.integers(0, 40), block=st.integers(1, 12))
def test_blocks_cover_every_row_once(n, block):
    slices = list(row_blocks(n, block))
    assert [i for s in slices for i in range(n)[s]] == list(range(n))
    assert all(0 < s.stop - s.start <= block for s in slices)


@pytest.mark.parametrize("make", [int, np.random.RandomState, np.random.default_rng])
def test_the_same_seed_draws_the_same(make):
    draws = [torch.rand(3, generator=generator(make(seed))) for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_no_seed_draws_anew_and_the_global_state_is_left_alone():
    before = torch.get_rng_state()
    a, b = (torch.rand(3, generator=generator(None)) for _ in range(2))
    assert not torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)


def test_auto_is_the_device_of_the_data():
    assert resolve_device("auto", torch.zeros(1, device="meta")).type == "meta"
    assert resolve_device("cpu", torch.zeros(1, device="meta")).type == "cpu"
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == resolve_device("auto", np.zeros(1)).type == expected
