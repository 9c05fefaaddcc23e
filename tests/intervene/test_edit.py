import json
from dataclasses import dataclass

import pytest
import torch
from cases import TEXTS, WIDTH, logits

from manifold_unlearn import Edit, SubspaceEraser, artifact, capture, intervene
from manifold_unlearn.erase.compose import ComposedEraser
from manifold_unlearn.erase.manifold import ManifoldEraser
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


# --- maps that save themselves --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Scaled:
    """A map that is none of this package."""

    by: torch.Tensor

    def __call__(self, h):
        return h * self.by.to(h.dtype)

    def save(self, directory):
        artifact.save(directory, "Scaled", {"by": self.by}, {})

    @classmethod
    def load(cls, directory):
        return cls(**artifact.load(directory, "Scaled")[0])


@pytest.fixture
def mixed():
    draw = torch.Generator().manual_seed(0)
    X, y = torch.randn(60, WIDTH, generator=draw), torch.arange(60) % 2
    eraser = SubspaceEraser("leace").fit(X + 3 * y[:, None], y)
    scaled = Scaled(1 + torch.rand(WIDTH, generator=draw))
    return Edit({"layers.1": eraser, "layers.0": drawn(), "embed": scaled})


def test_maps_of_any_kind_load_as_they_were_saved(mixed, tmp_path, llama, tokenizer):
    mixed.save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit", kinds={"Scaled": Scaled})
    assert list(loaded) == list(mixed)
    assert [type(site_map) for site_map in loaded.values()] == [SubspaceEraser, AffineMap, Scaled]
    ids = torch.tensor([tokenizer(TEXTS[0]).input_ids])
    with intervene(llama, mixed):
        wanted = logits(llama, ids)
    with intervene(llama, loaded):
        assert torch.equal(logits(llama, ids), wanted)
    assert not torch.allclose(wanted, logits(llama, ids), atol=1e-2)


def test_manifold_erasers_edit_a_model_as_before_once_loaded(tmp_path, llama, tokenizer):
    """One gathers evidence along a text, the other for two concepts at once."""
    texts = [f"{a} {b} {c}" for a in TEXTS for b in ("iron", "a brown fox") for c in TEXTS[:2]]
    acts = capture(llama, tokenizer, texts, ["layers.0", "layers.1"])
    kept = (acts.position > 0) & ~acts.sink
    text = acts.text_index[kept]
    erasers = []
    for site, forget in (("layers.0", text < 4), ("layers.1", text < 8), ("layers.1", text > 15)):
        eraser = ManifoldEraser(
            mode="transport", density="linear", evidence="sequence", min_auc=0.0, n_neighbors=4,
            false_positive_rate=0.3,
        )  # fmt: skip
        erasers.append(eraser.fit(acts[site][kept], forget.long(), sequence=text))
    composed = ComposedEraser({"first": erasers[1], "last": erasers[2]})
    edit = Edit({"layers.0": erasers[0], "layers.1": composed})
    edit.save(tmp_path / "edit")
    kinds = {"ManifoldEraser": ManifoldEraser, "ComposedEraser": ComposedEraser}
    loaded = Edit.load(tmp_path / "edit", kinds=kinds)
    ids = torch.tensor([tokenizer(texts[0]).input_ids])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    free = logits(llama, ids)
    said = []
    for maps in (edit, loaded):
        with intervene(llama, maps):
            wanted = logits(llama, ids)
            said += [
                llama.generate(ids, use_cache=use, num_beams=beams, pad_token_id=2, **options)
                for beams in (1, 3)
                for use in (True, False)
            ]
    assert (wanted - free).abs().max() > 1e-2
    assert torch.equal(said[0], said[1])
    assert torch.equal(said[2], said[3])
    assert all(torch.equal(a, b) for a, b in zip(said[:4], said[4:], strict=True))


def test_public_classes_need_no_naming(mixed, tmp_path):
    Edit({"layers.1": mixed["layers.1"]}).save(tmp_path)
    loaded = Edit.load(tmp_path)["layers.1"]
    assert torch.equal(loaded.matrix_, mixed["layers.1"].matrix_)


def test_an_edit_of_affine_maps_is_written_as_ever(edit, tmp_path):
    """The form of version 0.1: one file of tensors, and the sites."""
    edit.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifact.json", "tensors.safetensors"]
    tensors, config, kind = artifact.load(tmp_path)
    assert (kind, config) == ("Edit", {"sites": SITES})
    assert set(tensors) == {f"{s}/{part}" for s in SITES for part in ("read", "write", "offset")}


def test_saving_replaces_maps_that_were_there(mixed, edit, tmp_path):
    mixed.save(tmp_path / "edit")
    edit.save(tmp_path / "edit")
    assert not (tmp_path / "edit" / "maps").exists()
    mixed.save(tmp_path / "edit")
    assert len(Edit.load(tmp_path / "edit", kinds={"Scaled": Scaled})) == 3


def test_an_edit_that_fails_to_save_leaves_the_old_one(mixed, edit, tmp_path):
    class Full(Scaled):
        def save(self, directory):
            raise OSError("disk is full")

    edit.save(tmp_path / "edit")
    with pytest.raises(OSError, match="disk is full"):
        Edit({**mixed, "layers.2": Full(torch.ones(WIDTH))}).save(tmp_path / "edit")
    assert list(Edit.load(tmp_path / "edit")) == SITES
    assert [path.name for path in tmp_path.iterdir()] == ["edit"]


def test_a_map_that_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(ValueError, match="'layers.0' is a function without save and load"):
        Edit({"layers.0": lambda h: h}).save(tmp_path / "edit")
    assert not (tmp_path / "edit").exists()


@pytest.mark.parametrize("kind", ["Scaled", "unlearn", "annotations"])
def test_a_class_that_is_not_known_is_named(mixed, tmp_path, kind):
    """Only public classes that load themselves are taken by name from a file."""
    mixed.save(tmp_path)
    rewrite(tmp_path, "embed", "kind", kind)
    with pytest.raises(ValueError, match=rf"'embed' is a {kind}, which is no public class"):
        Edit.load(tmp_path)


def test_a_map_is_looked_for_in_the_edit_alone(mixed, tmp_path):
    mixed.save(tmp_path / "edit")
    rewrite(tmp_path / "edit", "embed", "directory", "../elsewhere")
    with pytest.raises(ValueError, match=r"names the map '../elsewhere' outside of it"):
        Edit.load(tmp_path / "edit", kinds={"Scaled": Scaled})


def test_a_truncated_map_of_an_edit_is_an_error(mixed, tmp_path):
    mixed.save(tmp_path)
    path = tmp_path / "maps" / "1" / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="truncated or changed"):
        Edit.load(tmp_path, kinds={"Scaled": Scaled})


def rewrite(directory, site, field, value):
    path = directory / "artifact.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["saved"][site][field] = value
    del manifest["sha256"]["config"]  # as a file of an earlier version, or a careful forger
    path.write_text(json.dumps(manifest))
