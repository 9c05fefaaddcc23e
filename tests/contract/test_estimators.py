import numpy as np
import pytest
import torch
from cases import ERASERS, two_classes
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from manifold_unlearn import SubspaceEraser

FITTED = ("matrix_", "bias_", "directions_", "contrast_")


@pytest.fixture(params=ERASERS)
def eraser(request):
    return SubspaceEraser(**ERASERS[request.param])


@pytest.fixture(scope="module")
def data():
    return two_classes()


@parametrize_with_checks([SubspaceEraser(method) for method in ERASERS])
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_in_numpy_out_at_its_dtype(eraser, data, dtype):
    X, y = data[0].astype(dtype), data[1]
    out = eraser.fit(X, y).transform(X)
    assert isinstance(out, np.ndarray)
    assert out.dtype == dtype
    assert {getattr(eraser, name).dtype for name in FITTED} == {np.dtype(dtype)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torch_in_torch_out_at_its_dtype_and_device(eraser, data, dtype):
    X, y = torch.tensor(data[0], dtype=dtype), torch.tensor(data[1])
    out = eraser.fit(X, y).transform(X)
    assert isinstance(out, torch.Tensor)
    assert (out.dtype, out.device) == (dtype, X.device)
    for name in FITTED:
        assert (getattr(eraser, name).dtype, getattr(eraser, name).device) == (dtype, X.device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_rows_on_a_gpu_stay_there_and_agree(eraser, data):
    X, y = torch.tensor(data[0]), torch.tensor(data[1])
    expected = clone(eraser).fit(X, y).transform(X)
    out = eraser.fit(X.cuda(), y.cuda()).transform(X.cuda())
    assert out.is_cuda
    assert eraser.matrix_.is_cuda
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-7, atol=1e-7)


def test_torch_and_numpy_agree_and_the_fit_takes_either(eraser, data):
    X, y = data
    by_numpy = clone(eraser).fit(X, y)
    by_torch = clone(eraser).fit(torch.tensor(X), torch.tensor(y))
    np.testing.assert_allclose(by_torch.matrix_, by_numpy.matrix_, rtol=1e-12, atol=1e-12)
    assert isinstance(by_numpy.transform(torch.tensor(X)), torch.Tensor)
    assert isinstance(by_torch.transform(X), np.ndarray)


def test_half_precision_rows_are_accumulated_wider(eraser, data):
    """The map fitted on bfloat16 rows is that of the same rows in float64."""
    X, y = torch.tensor(data[0]).bfloat16(), torch.tensor(data[1])
    narrow, wide = clone(eraser).fit(X, y), clone(eraser).fit(X.double(), y)
    torch.testing.assert_close(narrow.map_.matrix_, wide.map_.matrix_, rtol=1e-9, atol=1e-9)


def test_the_order_of_the_rows_does_not_matter(eraser, data):
    X, y = data
    order = np.random.default_rng(4).permutation(len(y))
    plain, shuffled = clone(eraser).fit(X, y), clone(eraser).fit(X[order], y[order])
    for name in FITTED:
        np.testing.assert_allclose(
            getattr(shuffled, name), getattr(plain, name), rtol=1e-8, atol=1e-9
        )


def test_rows_are_transformed_alike_alone_and_together(eraser, data):
    X, y = data
    whole = eraser.fit(X, y).transform(X)
    split = np.concatenate([eraser.transform(part) for part in np.array_split(X, 7)])
    np.testing.assert_allclose(split, whole, rtol=1e-12, atol=1e-12)


def test_labels_of_any_kind_beside_one_are_retain(eraser, data):
    X, y = data
    many = np.where(y == 1, 1, np.arange(len(y)) % 3 * 2)
    plain, other = clone(eraser).fit(X, y), clone(eraser).fit(X, many)
    np.testing.assert_array_equal(other.matrix_, plain.matrix_)


def test_two_fits_are_equal_and_the_data_is_left_alone(eraser, data):
    X, y = data[0].copy(), data[1].copy()
    a, b = clone(eraser).fit(X, y), clone(eraser).fit(X, y)
    np.testing.assert_array_equal(a.matrix_, b.matrix_)
    a.transform(X)
    np.testing.assert_array_equal(X, data[0])
    np.testing.assert_array_equal(y, data[1])


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_saved_then_loaded_is_equal(eraser, data, tmp_path, kind, dtype):
    X, y = kind(data[0].astype(dtype)), data[1]
    expected = eraser.fit(X, y).transform(X)
    eraser.save(tmp_path / "eraser")
    again = SubspaceEraser.load(tmp_path / "eraser")
    assert again.get_params() == eraser.get_params()
    assert again.n_features_in_ == eraser.n_features_in_
    assert again.shrinkage_ == eraser.shrinkage_
    for name in FITTED:
        saved, loaded = getattr(eraser, name), getattr(again, name)
        assert type(loaded) is type(saved)
        assert loaded.dtype == saved.dtype
        np.testing.assert_array_equal(loaded, saved)
    np.testing.assert_array_equal(again.transform(X), expected)


def test_another_kind_of_fit_is_not_loaded(eraser, data, tmp_path):
    eraser.fit(*data).map_.save(tmp_path / "map")
    with pytest.raises(ValueError, match="holds a AffineMap, not a SubspaceEraser"):
        SubspaceEraser.load(tmp_path / "map")


@pytest.mark.parametrize("use", ["transform", "__call__", "linear", "save"])
def test_before_the_fit_there_is_nothing_to_use(eraser, tmp_path, use):
    arguments = {"transform": [np.ones((1, 2))], "__call__": [torch.ones(2)], "linear": []}
    with pytest.raises(NotFittedError, match="not fitted yet"):
        getattr(eraser, use)(*arguments.get(use, [tmp_path / "x"]))
