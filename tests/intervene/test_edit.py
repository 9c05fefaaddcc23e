import pytest
import torch
from cases import TEXTS, WIDTH, logits

from manifold_unlearn import Edit, SubspaceEraser, intervene
from manifold_unlearn.intervene.maps import AffineMap

SITES = ["layers.2.attn", "layers.0.mlp", "embed"]


def drawn(rank=2, seed=0, width=WIDTH):
    draw = torch.Generator().manual_seed(seed)
    read, write = (torch.randn(width, rank, generator=draw).double() for _ in range(2))
    return AffineMap(read / width**0.5, write / width**0.5, torch.ones(rank).double())


@pytest.fixture
def edit():
    return Edit({site: drawn(rank, rank) for rank, site in enumerate(SITES, start=1)})


def test_an_edit_is_the_mapping_of_its_maps(edit):
    assert list(edit) == SITES
    assert len(edit) == 3
    assert edit["embed"] is edit.maps["embed"]
    assert "layers.1" not in edit


def test_an_edit_loads_as_it_was_saved(edit, tmp_path):
    edit.save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit")
    assert list(loaded) == SITES
    for site in SITES:
        for part in ("read", "write", "offset"):
            was, now = getattr(edit[site], part), getattr(loaded[site], part)
            assert now.dtype == was.dtype
            assert torch.equal(now, was)


def test_a_loaded_edit_does_to_a_model_what_the_saved_one_did(edit, tmp_path, llama, tokenizer):
    ids = torch.tensor([tokenizer(TEXTS[0]).input_ids])
    before = logits(llama, ids)
    edit.save(tmp_path)
    with intervene(llama, edit):
        wanted = logits(llama, ids)
    with intervene(llama, Edit.load(tmp_path)):
        torch.testing.assert_close(logits(llama, ids), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(wanted, before, atol=1e-2)


def test_saving_again_replaces_the_edit_as_a_whole(edit, tmp_path):
    edit.save(tmp_path / "edit")
    Edit({"layers.1": drawn()}).save(tmp_path / "edit")
    assert list(Edit.load(tmp_path / "edit")) == ["layers.1"]
    assert [path.name for path in tmp_path.iterdir()] == ["edit"]


def test_a_directory_of_something_else_is_not_replaced(edit, tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="is not an artifact; choose another directory"):
        edit.save(tmp_path)
    assert (tmp_path / "letters.txt").read_text() == "dear"


def test_another_artifact_is_no_edit(tmp_path):
    drawn().save(tmp_path)
    with pytest.raises(ValueError, match="holds a AffineMap, not a Edit"):
        Edit.load(tmp_path)


def test_an_edit_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no artifact"):
        Edit.load(tmp_path / "nowhere")


def test_a_truncated_edit_is_an_error(edit, tmp_path):
    edit.save(tmp_path)
    whole = (tmp_path / "tensors.safetensors").read_bytes()
    (tmp_path / "tensors.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="truncated or changed"):
        Edit.load(tmp_path)


def test_maps_that_erasers_fitted_save_as_an_edit(tmp_path):
    draw = torch.Generator().manual_seed(0)
    X, y = torch.randn(60, WIDTH, generator=draw), torch.arange(60) % 2
    eraser = SubspaceEraser("pca", 2, protect_retain=False).fit(X + 3 * y[:, None], y)
    Edit({"layers.0": eraser.map_}).save(tmp_path)
    loaded = Edit.load(tmp_path)["layers.0"]
    assert torch.equal(loaded.read, eraser.map_.read)
    assert torch.equal(loaded.write, eraser.map_.write)
    assert not torch.equal(loaded.read, loaded.write)
