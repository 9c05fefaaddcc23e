import json

import numpy as np
import pytest
import torch
from cases import same_state, state
from safetensors.torch import load_file, save_file

from manifold_unlearn.testbed import cache, models, training
from manifold_unlearn.testbed.models import load_testbed
from manifold_unlearn.testbed.training import Recipe
from manifold_unlearn.testbed.world import FictionalWorld

WORLD = FictionalWorld(n_people=6, n_forget=2, n_holdout=1, n_attributes=1, n_filler=10)
RECIPE = Recipe(
    d_model=16, d_hidden=24, n_layers=2, n_heads=2, n_steps=3, batch_size=2, texts_per_row=2
)


def load(world=WORLD, recipe=RECIPE, **options):
    return load_testbed(recipe, world=world, device="cpu", progress=False, **options)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A cache of its own, empty at first."""
    monkeypatch.setenv("MANIFOLD_UNLEARN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "testbed"


def test_what_is_cached_is_the_same_to_the_bit(place, monkeypatch):
    first = load()
    assert len(list(place.iterdir())) == 2
    monkeypatch.setattr(models, "train", None)
    again = load()
    for name in ("told", "never_told"):
        assert same_state(getattr(again, name), state(getattr(first, name)))
        assert not getattr(again, name).training
        assert again.training[name] == first.training[name]
    assert again.told.config.to_dict() == {**first.told.config.to_dict(), **_origin(again.told)}


def _origin(model):
    """Fields that say where a model was read from and in what dtype."""
    config = model.config.to_dict()
    return {
        key: config[key] for key in ("_name_or_path", "architectures", "dtype") if key in config
    }


def test_told_and_never_told_differ_and_start_alike():
    bed = load(recipe=Recipe(**{**vars(RECIPE), "n_steps": 1, "learning_rate": 0.0}))
    assert same_state(bed.told, state(bed.never_told))
    assert not same_state(load().told, state(load().never_told))


def test_without_the_cache_nothing_is_written_or_read(place):
    load(cache=False)
    assert not place.exists()


def test_the_validation_world_shares_the_told_model(place):
    first = load()
    split = load(world=WORLD.validation_split())
    assert same_state(split.told, state(first.told))
    assert not same_state(split.never_told, state(first.never_told))
    assert len(list(place.iterdir())) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"random_state": 1},
        {"world": FictionalWorld(6, 2, 1, 1, n_filler=10, random_state=5)},
        {"recipe": Recipe(**{**vars(RECIPE), "learning_rate": 1e-3})},
    ],
    ids=["seed", "world", "recipe"],
)
def test_another_cause_is_another_entry(place, change):
    load()
    load(**change)
    assert len(list(place.iterdir())) == 4


def test_another_version_of_the_code_trains_again(place, monkeypatch):
    load()
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    load()
    assert len(list(place.iterdir())) == 4


def truncate(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def flip(directory):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def lose_weights(directory):
    (directory / "model.safetensors").unlink()


def garble(directory):
    (directory / "testbed.json").write_text("{", encoding="utf-8")


def lose_key(directory):
    (directory / "testbed.json").write_text("{}", encoding="utf-8")


@pytest.mark.parametrize("damage", [truncate, flip, lose_weights, garble, lose_key])
def test_a_damaged_model_is_trained_again_with_a_warning(place, damage):
    first = load()
    for directory in place.iterdir():
        damage(directory)
    with pytest.warns(UserWarning, match=r"cached model in .* is damaged .* trained again"):
        again = load()
    assert same_state(again.told, state(first.told))
    assert same_state(load().never_told, state(first.never_told))


def test_an_interrupted_training_leaves_nothing(place, monkeypatch):
    def interrupt(*args, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_loss", interrupt)
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        load()
    assert torch.get_num_threads() == threads
    assert not place.exists() or not list(place.iterdir())


def test_an_interrupted_writing_leaves_nothing(place, monkeypatch):
    def interrupt(model, tokenizer, directory):
        model.save_pretrained(directory)
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "write_model", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load()
    assert not list(place.iterdir())


def test_the_place_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MANIFOLD_UNLEARN_CACHE", str(tmp_path / "own"))
    assert cache.cache_directory() == tmp_path / "own"
    monkeypatch.delenv("MANIFOLD_UNLEARN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_directory() == tmp_path / "xdg" / "manifold-unlearn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_directory() == tmp_path / ".cache" / "manifold-unlearn"


def test_a_cached_directory_is_a_model_of_its_own(place):
    from manifold_unlearn.activations.models import load_model

    bed = load()
    found = [load_model(directory) for directory in sorted(place.iterdir())]
    assert any(same_state(model.cpu(), state(bed.told)) for model, _ in found)
    text = WORLD.forget[0].text
    assert found[0][1](text)["input_ids"] == bed.tokenizer(text)["input_ids"]
    manifest = json.loads((next(place.iterdir()) / "testbed.json").read_text("utf-8"))
    assert len(manifest["training"]["losses"]) == 3
    assert np.isfinite(manifest["training"]["losses"]).all()
