from types import SimpleNamespace

import numpy as np
import pytest
import torch

from manifold_unlearn.intervene.edit import Edit
from manifold_unlearn.intervene.maps import (
    AffineMap,
    AffineSiteMap,
    DenseAffineMap,
    SiteMap,
    affine_parts,
    bias_free,
    callable_map,
)


def low_rank(d=6, r=2, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    read, write = (torch.randn(d, r, generator=draw, dtype=dtype) for _ in range(2))
    return AffineMap(read, write, torch.randn(r, generator=draw, dtype=dtype))


def rows(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9), dtype=dtype)


def test_a_low_rank_map_is_its_matrix_and_bias():
    fitted, h = low_rank(), rows(2, 3, 6)
    assert fitted.matrix_.shape == (6, 6)
    torch.testing.assert_close(fitted(h), h @ fitted.matrix_.T + fitted.bias_)
    assert torch.linalg.matrix_rank(torch.eye(6) - fitted.matrix_.float()) == 2


def test_its_linear_part_has_no_bias():
    fitted, h = low_rank(), rows(4, 6)
    assert fitted.bias_.any()
    torch.testing.assert_close(fitted.linear()(h), h @ fitted.matrix_.T)


def test_a_dual_pair_reads_its_offset_afterwards():
    fitted = low_rank()
    write = fitted.write @ torch.linalg.inv(fitted.read.T @ fitted.write)
    dual = AffineMap(fitted.read, write, fitted.offset)
    once = dual(rows(4, 6))
    torch.testing.assert_close(once @ dual.read, dual.offset.expand(4, 2))
    torch.testing.assert_close(dual(once), once)


def test_a_dense_map_is_its_matrix_and_bias():
    dense, h = DenseAffineMap(rows(6, 6), rows(6)), rows(2, 3, 6).flip(0)
    torch.testing.assert_close(
        dense(h), torch.einsum("ij,abj->abi", dense.matrix_, h) + dense.bias_
    )
    torch.testing.assert_close(dense.linear()(h), h @ dense.matrix_.T)


@pytest.mark.parametrize("make", [low_rank, lambda: DenseAffineMap(rows(6, 6), rows(6))])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_keep_their_dtype_and_half_precision_is_edited_in_float32(make, dtype):
    fitted, h = make(), rows(5, 6).to(dtype)
    expected = h.double() @ fitted.matrix_.T + fitted.bias_
    for placed in (fitted, fitted.to("cpu", dtype)):
        assert placed(h).dtype == dtype
        torch.testing.assert_close(placed(h), expected.to(dtype), rtol=2e-2, atol=2e-2)
    exact = fitted.to("cpu", dtype).matrix_.dtype
    assert exact == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_change_of_half_precision_rows_is_computed_in_float32(dtype):
    h = rows(200, 6).to(dtype)
    dense = DenseAffineMap(rows(6, 6), rows(6)).to("cpu", dtype)
    expected = (h.float() @ dense.matrix_.T + dense.bias_).to(dtype)
    assert torch.equal(dense(h), expected)
    assert not torch.equal(h @ dense.matrix_.T.to(dtype) + dense.bias_.to(dtype), expected)
    thin = low_rank().to("cpu", dtype)
    change = (h.float() @ thin.read - thin.offset) @ thin.write.T
    assert torch.equal(thin(h), h - change.to(dtype))


def test_rows_given_are_not_written_to():
    h = rows(3, 6)
    before = h.clone()
    low_rank()(h)
    assert torch.equal(h, before)


def test_a_map_saves_and_loads(tmp_path):
    fitted = low_rank(dtype=torch.float32)
    fitted.save(tmp_path / "map")
    again = AffineMap.load(tmp_path / "map")
    for part in ("read", "write", "offset"):
        assert torch.equal(getattr(again, part), getattr(fitted, part))


def test_an_edit_saves_and_loads_with_its_sites_in_order(tmp_path):
    edit = Edit({"layers.1.mlp": low_rank(), "embed": low_rank(seed=1)})
    edit.save(tmp_path / "edit")
    again = Edit.load(tmp_path / "edit")
    assert list(again) == ["layers.1.mlp", "embed"]
    assert len(again) == 2
    for site in edit:
        assert torch.equal(again[site].matrix_, edit[site].matrix_)
        assert torch.equal(again[site].bias_, edit[site].bias_)


def test_an_edit_with_one_map_at_two_sites_saves(tmp_path):
    fitted = low_rank()
    Edit({"layers.0": fitted, "layers.1": fitted}).save(tmp_path / "edit")
    again = Edit.load(tmp_path / "edit")
    assert torch.equal(again["layers.0"].read, again["layers.1"].read)


def test_a_map_is_not_loaded_as_an_edit(tmp_path):
    low_rank().save(tmp_path / "map")
    with pytest.raises(ValueError, match="holds a AffineMap, not a Edit"):
        Edit.load(tmp_path / "map")


def test_what_has_matrix_and_bias_satisfies_the_protocol_by_shape():
    bare = SimpleNamespace(matrix_=np.eye(3), bias_=np.ones(3))
    assert isinstance(bare, AffineSiteMap)
    assert isinstance(low_rank(), SiteMap)
    assert not isinstance(SimpleNamespace(matrix_=0), AffineSiteMap)


def test_a_bare_matrix_and_bias_become_callable():
    bare = SimpleNamespace(matrix_=2 * np.eye(3), bias_=np.arange(3.0))
    h = rows(2, 3)
    torch.testing.assert_close(callable_map(bare, "x")(h), 2 * h + torch.arange(3.0))
    torch.testing.assert_close(bias_free(bare, "x")(h), 2 * h)
    fitted = low_rank()
    assert callable_map(fitted, "x") is fitted


@pytest.mark.parametrize(
    ("bare", "words"),
    [
        (torch.relu, "the map at 'x' is a .* without matrix_ and bias_"),
        (SimpleNamespace(matrix_=np.eye(3), bias_=np.ones(2)), r"matrix_ .3, 3. and bias_ .2,."),
        (SimpleNamespace(matrix_=np.ones((2, 3)), bias_=np.ones(3)), r"matrix_ .2, 3."),
        (SimpleNamespace(matrix_=np.eye(2), bias_=np.array([0, np.nan])), "is not finite"),
    ],
)
def test_what_is_not_an_affine_map_is_refused(bare, words):
    with pytest.raises(ValueError, match=words):
        affine_parts(bare, "x")
