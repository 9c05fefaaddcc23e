import warnings

import numpy as np
import pytest
import torch
from cases import GATES, two_classes
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from manifold_unlearn.erase.gate import ForgetGate

FIGURES = ("threshold_", "auc_", "false_positive_rate_", "detection_rate_", "promised_rate_")


@pytest.fixture(params=GATES)
def gate(request):
    return ForgetGate(**GATES[request.param], n_landmarks=128, min_auc=0)


@pytest.fixture(scope="module")
def data():
    return two_classes(shift=6)


@parametrize_with_checks([ForgetGate(**p, min_auc=0) for p in GATES.values()])
def test_scikit_learn_contract(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        check(estimator)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_in_numpy_out_at_its_dtype(gate, data, dtype):
    X = data[0].astype(dtype)
    gate.fit(X, data[1])
    for out in (gate.log_ratio(X), gate.gathered_evidence(X), gate.gate(X)):
        assert isinstance(out, np.ndarray)
        assert (out.dtype, out.shape) == (dtype, (len(X),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torch_in_torch_out_at_its_dtype_and_device(gate, data, dtype):
    X = torch.tensor(data[0], dtype=dtype)
    gate.fit(X, torch.tensor(data[1]))
    for out in (gate.log_ratio(X), gate.gathered_evidence(X), gate.gate(X)):
        assert (out.dtype, out.device, out.shape) == (dtype, X.device, (len(X),))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_rows_on_a_gpu_stay_there_and_agree(gate, data):
    X, y = torch.tensor(data[0]), torch.tensor(data[1])
    expected = clone(gate).fit(X, y).log_ratio(X)
    out = gate.fit(X.cuda(), y.cuda()).log_ratio(X.cuda())
    assert out.is_cuda
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-6, atol=1e-6)


def test_torch_and_numpy_agree(gate, data):
    X, y = data
    by_numpy, by_torch = clone(gate).fit(X, y), clone(gate).fit(torch.tensor(X), torch.tensor(y))
    assert [getattr(by_torch, f) for f in FIGURES] == [getattr(by_numpy, f) for f in FIGURES]
    np.testing.assert_array_equal(by_torch.gate(X), by_numpy.gate(X))


def test_rows_are_scored_alike_alone_and_together(gate, data):
    X, y = data
    whole = gate.fit(X, y).log_ratio(X)
    split = np.concatenate([gate.log_ratio(part) for part in np.array_split(X, 7)])
    np.testing.assert_allclose(split, whole, rtol=1e-9, atol=1e-9)


def test_two_fits_are_equal_and_the_data_is_left_alone(gate, data):
    X, y = data[0].copy(), data[1].copy()
    a, b = clone(gate).fit(X, y), clone(gate).fit(X, y)
    np.testing.assert_array_equal(a.gate(X), b.gate(X))
    np.testing.assert_array_equal(X, data[0])
    np.testing.assert_array_equal(y, data[1])


def test_labels_of_any_kind_beside_one_are_retain(gate, data):
    X, y = data
    many = np.where(y == 1, 1, np.arange(len(y)) % 3 * 2)
    np.testing.assert_array_equal(clone(gate).fit(X, y).gate(X), clone(gate).fit(X, many).gate(X))


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_saved_then_loaded_is_equal(gate, data, tmp_path, kind, dtype):
    X = kind(data[0].astype(dtype))
    expected = gate.fit(X, data[1]).gate(X)
    gate.save(tmp_path / "gate")
    again = ForgetGate.load(tmp_path / "gate")
    assert again.get_params() == gate.get_params()
    figures = [*FIGURES, "n_features_in_", "n_calibration_"]
    assert [getattr(again, f) for f in figures] == [getattr(gate, f) for f in figures]
    assert again.frozen_.sequential == gate.frozen_.sequential
    np.testing.assert_array_equal(again.gate(X), expected)


@pytest.mark.parametrize("use", ["log_ratio", "gathered_evidence", "gate", "save"])
def test_before_the_fit_there_is_nothing_to_use(gate, tmp_path, use):
    with pytest.raises(NotFittedError, match="not fitted yet"):
        getattr(gate, use)(tmp_path / "x" if use == "save" else np.ones((1, 2)))
