import json

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator

from manifold_unlearn import artifact

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b/c": torch.ones(2, dtype=torch.bfloat16)}
CONFIG = {"name": "x", "numbers": [1, 2.5, None]}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    artifact.save(tmp_path / "fit", "Kind", TENSORS, CONFIG)
    tensors, config, kind = artifact.load(tmp_path / "fit", kind="Kind")
    assert (config, kind) == (CONFIG, "Kind")
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)


def test_two_files_lie_there_and_no_other(tmp_path):
    artifact.save(tmp_path / "deep" / "fit", "Kind", TENSORS, CONFIG)
    assert names(tmp_path / "deep" / "fit") == ["artifact.json", "tensors.safetensors"]
    assert names(tmp_path / "deep") == ["fit"]
    manifest = json.loads((tmp_path / "deep" / "fit" / "artifact.json").read_text())
    assert manifest["schema_version"] == 1


def test_views_are_saved_as_they_read(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    artifact.save(tmp_path / "fit", "Kind", {"t": whole.T, "part": whole[:, ::2]}, {})
    tensors, _, _ = artifact.load(tmp_path / "fit")
    assert torch.equal(tensors["t"], whole.T)
    assert torch.equal(tensors["part"], whole[:, ::2])


def test_the_same_tensor_may_have_two_names(tmp_path):
    shared = torch.ones(3)
    artifact.save(tmp_path / "fit", "Kind", {"a": shared, "b": shared}, {})
    tensors, _, _ = artifact.load(tmp_path / "fit")
    assert torch.equal(tensors["a"], tensors["b"])


def test_saving_again_replaces_the_whole(tmp_path):
    artifact.save(tmp_path / "fit", "Kind", TENSORS, CONFIG)
    artifact.save(tmp_path / "fit", "Kind", {"z": torch.zeros(1)}, {})
    tensors, config, _ = artifact.load(tmp_path / "fit")
    assert list(tensors) == ["z"]
    assert config == {}
    assert names(tmp_path) == ["fit"]


def test_a_save_that_fails_leaves_the_old_and_nothing_beside_it(tmp_path):
    artifact.save(tmp_path / "fit", "Kind", TENSORS, CONFIG)
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifact.save(tmp_path / "fit", "Kind", {"z": torch.zeros(1)}, {"bad": float("nan")})
    assert artifact.load(tmp_path / "fit")[1] == CONFIG
    assert names(tmp_path) == ["fit"]


def test_a_directory_that_is_no_artifact_is_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match="is not an artifact; choose another"):
        artifact.save(tmp_path / "mine", "Kind", TENSORS, CONFIG)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


def test_an_empty_directory_is_used(tmp_path):
    (tmp_path / "fit").mkdir()
    artifact.save(tmp_path / "fit", "Kind", TENSORS, CONFIG)
    assert artifact.load(tmp_path / "fit")[2] == "Kind"


def test_another_kind_is_refused(tmp_path):
    artifact.save(tmp_path / "fit", "Kind", TENSORS, CONFIG)
    with pytest.raises(ValueError, match="holds a Kind, not a Other"):
        artifact.load(tmp_path / "fit", kind="Other")


def test_no_artifact_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no artifact.json"):
        artifact.load(tmp_path / "none")


def test_a_changed_byte_is_found(tmp_path):
    artifact.save(tmp_path / "fit", "Kind", TENSORS, CONFIG)
    path = tmp_path / "fit" / "tensors.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="the file is truncated or changed"):
        artifact.load(tmp_path / "fit")


def test_truncated_tensors_are_found(tmp_path):
    artifact.save(tmp_path / "fit", "Kind", TENSORS, CONFIG)
    path = tmp_path / "fit" / "tensors.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="the file is truncated or changed"):
        artifact.load(tmp_path / "fit")


def test_missing_tensors_are_named(tmp_path):
    artifact.save(tmp_path / "fit", "Kind", TENSORS, CONFIG)
    (tmp_path / "fit" / "tensors.safetensors").unlink()
    with pytest.raises(ValueError, match="tensors.safetensors is missing; restore it"):
        artifact.load(tmp_path / "fit")


def test_tensors_with_a_right_digest_that_are_no_safetensors_are_named(tmp_path):
    artifact.save(tmp_path / "fit", "Kind", TENSORS, CONFIG)
    path, manifest_path = (tmp_path / "fit" / n for n in ("tensors.safetensors", "artifact.json"))
    path.write_bytes(b"not tensors")
    manifest = json.loads(manifest_path.read_text())
    manifest["sha256"]["tensors.safetensors"] = artifact.digest(path)
    manifest_path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="not readable as safetensors"):
        artifact.load(tmp_path / "fit")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "Kind"}', "\xff"])
def test_a_damaged_manifest_is_named(tmp_path, text):
    artifact.save(tmp_path / "fit", "Kind", TENSORS, CONFIG)
    (tmp_path / "fit" / "artifact.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"artifact.json is damaged"):
        artifact.load(tmp_path / "fit")


@pytest.mark.parametrize("change", [("Kind", "Kin6"), ('"config": {', '"config": {"k": 3, ')])
def test_a_manifest_that_says_other_things_than_were_written(tmp_path, change):
    artifact.save(tmp_path / "fit", "Kind", TENSORS, {**CONFIG, 7: "a number as a name", 10: [()]})
    artifact.load(tmp_path / "fit")
    path = tmp_path / "fit" / "artifact.json"
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(ValueError, match="says other things than were written"):
        artifact.load(tmp_path / "fit")


def test_a_manifest_of_before_its_digest_is_read(tmp_path):
    artifact.save(tmp_path / "fit", "Kind", TENSORS, CONFIG)
    path = tmp_path / "fit" / "artifact.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]["config"]
    path.write_text(json.dumps(manifest))
    assert artifact.load(tmp_path / "fit")[1] == CONFIG


def test_a_newer_schema_asks_for_an_upgrade(tmp_path):
    artifact.save(tmp_path / "fit", "Kind", TENSORS, CONFIG)
    path = tmp_path / "fit" / "artifact.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(ValueError, match="schema_version 2; .*Upgrade manifold-unlearn"):
        artifact.load(tmp_path / "fit")


def test_replacing_yields_a_place_beside_and_renames_it(tmp_path):
    target = tmp_path / "new" / "file.txt"
    with artifact.replacing(target) as staged:
        assert staged.parent.parent == target.parent
        staged.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert names(target.parent) == ["file.txt"]


def test_replacing_keeps_the_old_after_an_exception(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(KeyError, match="mine"), artifact.replacing(target) as staged:
        staged.write_text("half")
        raise KeyError("mine")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_json_is_strict_and_readable(tmp_path):
    artifact.write_json(tmp_path / "x.json", {"name": "é", "value": [1, None]})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert "é" in text
    assert json.loads(text) == {"name": "é", "value": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        artifact.write_json(tmp_path / "x.json", float("inf"))
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == text


def test_digest_is_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert artifact.digest(tmp_path / "x").startswith("ba7816bf8f01cfea414140de5dae2223")


class Fitted(BaseEstimator):
    def __init__(self, size=3):
        self.size = size


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_an_estimator_is_saved_with_its_fitted_attributes(tmp_path, kind):
    estimator = Fitted(size=5)
    estimator.matrix_ = kind([[1.0, 2.0], [3.0, 4.0]])
    estimator.scale_, estimator.count_, estimator.name_ = np.float64(2.5), np.int64(3), "x"
    estimator.scratch = np.ones(9)
    artifact.save_estimator(estimator, tmp_path / "fit")
    again = artifact.load_estimator(Fitted, tmp_path / "fit")
    assert again.size == 5
    assert type(again.matrix_) is type(estimator.matrix_)
    np.testing.assert_array_equal(again.matrix_, estimator.matrix_)
    assert (again.scale_, again.count_, again.name_) == (2.5, 3, "x")
    assert not hasattr(again, "scratch")
