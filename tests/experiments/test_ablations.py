"""One thing is changed at a time, and what is claimed of it follows from what was measured."""

import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.erase.manifold import ManifoldEraser
from manifold_unlearn.finetune.train import TrainConfig, fine_tune
from manifold_unlearn.intervene.least_squares import least_squares_bake
from manifold_unlearn.recipe.manifold import ManifoldRecipe, bake_manifold, fit_manifold_edit
from manifold_unlearn.testbed.tokenizer import build_tokenizer
from manifold_unlearn.testbed.training import Recipe, initial_model
from manifold_unlearn.testbed.world import FictionalWorld

SCRIPT = "ablations.py"
ROOT = Path(__file__).parents[2]
RESULT = ROOT / "experiments" / "results" / "ablations" / "quick.json"
ONE_NAME = ManifoldRecipe(n_names=1, n_draws=1)
"""Ablations were measured so, one invented name a subject."""


@pytest.fixture(scope="module")
def result():
    return json.loads(RESULT.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def edits(experiment):
    """Edits of a small model that was told of a few people."""
    torch.set_num_threads(1)
    world = FictionalWorld(n_people=8, n_forget=2, n_attributes=2)
    tokenizer = build_tokenizer(list(world.texts("told")))
    blank = initial_model(Recipe(d_model=32, d_hidden=64, n_layers=2), tokenizer, random_state=0)
    teach = TrainConfig(lr=1e-2, steps=60, schedule="constant")
    told = fine_tune(blank, tokenizer, [*world.forget, *world.retain], config=teach).model
    bed = SimpleNamespace(told=told, tokenizer=tokenizer)
    forget = [replace(i, question=q) for i in world.forget for q in wordings(i)]
    retain = [replace(i, question=q) for i in world.retain for q in wordings(i)]
    return experiment.Ablated(bed, forget, [*retain, *map(Item, world.texts("filler")[:20])])


def wordings(item):
    return (item.question, *item.paraphrased_question)


def test_the_default_bake_is_that_of_the_recipe(edits):
    given = (edits.bed.told, edits.bed.tokenizer, edits.forget, edits.retain)
    wanted = dict(bake_manifold(*given, ONE_NAME).model.named_parameters())
    for name, weight in edits.bake().named_parameters():
        assert torch.equal(weight, wanted[name])
    other = edits.bake(ridge=30.0)
    assert any(not torch.equal(w, wanted[name]) for name, w in other.named_parameters())


def test_the_default_hooks_are_those_of_the_recipe(edits):
    given = (edits.bed.told, edits.bed.tokenizer, edits.forget, edits.retain)
    recipe = replace(ONE_NAME, blocks=(0.0,))
    wanted = fit_manifold_edit(*given, recipe)
    found = edits.hooks(blocks=(0.0,))
    assert list(found) == list(wanted) == ["layers.0"]
    mine, its = found["layers.0"], wanted["layers.0"]
    assert torch.equal(torch.as_tensor(mine.targets_), torch.as_tensor(its.targets_))
    assert mine.gate_.threshold_ == its.gate_.threshold_
    unpaired = edits.hooks(blocks=(0.0,), paired=False)["layers.0"]
    assert not torch.equal(torch.as_tensor(unpaired.targets_), torch.as_tensor(its.targets_))


def test_an_adapter_of_full_rank_is_the_bake(edits):
    pytest.importorskip("peft")
    wanted = dict(edits.bake().named_parameters())
    before = {name: w.clone() for name, w in edits.bed.told.named_parameters()}
    gaps = {}
    for rank in (1, 32):
        found = dict(edits.adapted(rank).named_parameters())
        gaps[rank] = max(float((found[name] - w).detach().norm()) for name, w in wanted.items())
    assert gaps[32] < 1e-4 < gaps[1]
    assert all(torch.equal(w, before[name]) for name, w in edits.bed.told.named_parameters())


def test_the_mean_of_names_of_several_lengths_is_refused(edits, monkeypatch):
    first = edits.targets(edits.forget, [0])
    shorter = replace(first, where=first.where.clone().fill_(False))
    found = iter([first, shorter])
    monkeypatch.setattr(sys.modules["ablated"], "blended_targets", lambda *_, **__: next(found))
    with pytest.raises(ValueError, match="names of several lengths in tokens have no mean"):
        edits.targets(edits.forget, [0, 1])


def test_strayed_rows_go_as_far_elsewhere(experiment):
    draw = torch.Generator().manual_seed(1)
    start, end = torch.randn(2, 50, 40, generator=draw)
    found = sys.modules["ablated"].strayed(start, end)
    torch.testing.assert_close((found - start).norm(dim=1), (end - start).norm(dim=1))
    cosines = torch.cosine_similarity(found - start, end - start, dim=1)
    assert cosines.abs().max() < 0.7


def test_some_of_the_retain_texts(experiment):
    some = sys.modules["ablated"].some
    told = [Item(f"{name} {i}", "x", topic=name) for name in "abcd" for i in range(4)]
    retain = [*told, *map(Item, ("one", "two"))]
    assert some(retain) == retain
    assert some(retain, every=4) == [*told[::4], retain[16]]
    assert some(retain, people=0.5) == [*told[:8], *retain[16:]]
    assert some(retain, filler=False) == told


def test_distance_is_the_mean_over_what_is_wanted(experiment):
    now = {"forget": 0.5, "retain": 0.75, "ks_p": 9.0}
    assert experiment.distance(now, {"forget": 0.25, "retain": 1.0}) == 0.25


def test_every_change_names_what_the_edits_take(experiment):
    ablated = sys.modules["ablated"].Ablated
    eraser, hooks, bake, least_squares = (
        set(inspect.signature(f).parameters)
        for f in (ManifoldEraser, ablated.hooks, ablated.bake, least_squares_bake)
    )
    known = {"hooked": eraser | hooks, "baked": bake | least_squares | {"rank"}}
    for part, names in known.items():
        found = experiment.changes(part, experiment.Config())
        assert found[0][:2] == ("default", "default") and not found[0][2]
        assert len({(what, value) for what, value, _ in found}) == len(found)
        for _, _, settings in found:
            assert set(settings) <= names
            assert set(settings.get("of_hooks", {})) <= known["hooked"]
    tables = {"hooked": experiment.HOOKED, "baked": experiment.BAKED}
    for part, _, rivals in experiment.RIVALS:
        for what, values in rivals.items():
            assert set(values) <= set(tables[part][what])
    assert all(value in tables[part][what] for part, _, (what, value) in experiment.ENOUGH)


def test_the_result_has_every_change_of_every_seed(experiment, result):
    config = experiment.PRESETS["quick"]
    for part in config.parts:
        wanted = [(what, value) for what, value, _ in experiment.changes(part, config)]
        for seed in result["config"]["seeds"]:
            found = [
                (r["what"], r["value"])
                for r in result["rows"]
                if r["part"] == part and r["seed"] == seed
            ]
            assert found == wanted


def test_claims_follow_from_the_rows(experiment, result):
    command = experiment.COMMAND.format("quick")
    rows = result["rows"]
    assert json.loads(json.dumps(experiment.claims(rows, command))) == result["claims"]
    changed = ("default", "draw of names", "model")
    alike = [row | {"distance": 0.1} for row in rows]
    far = [row if row["what"] in changed else row | {"distance": 1.0} for row in alike]
    n = len(experiment.RIVALS)
    assert not any(c["holds"] for c in experiment.claims(alike, command)[:n])
    assert all(c["holds"] for c in experiment.claims(far, command)[:n])
    enough = experiment.claims(far, command)[n : n + len(experiment.ENOUGH)]
    assert [c["holds"] for c in enough] == ["three are no better" in c["claim"] for c in enough]
    for value, last in ((0.01, [False, False, False]), (0.9, [True, True, False])):
        found = experiment.claims([row | {"ks_p": value} for row in rows], command)
        assert [c["holds"] for c in found[-3:]] == last


def test_new_rows_replace_old_ones_and_come_in_the_order_of_the_changes(experiment):
    def row(part, what, value, distance):
        return {"seed": 0, "part": part, "what": what, "value": value, "distance": distance}

    told, default = row("model", "model", "told", 1.0), row("baked", "default", "default", 0.1)
    old = [default, told, row("baked", "rank", "8", 0.5), row("baked", "rank", "7", 0.5)]
    new = [row("baked", "rank", "8", 0.2), row("hooked", "blocks", "0", 0.3)]
    found = experiment.merged(old, new, experiment.Config(only=("rank", "blocks")))
    assert found == [told, new[1], default, new[0]]


def test_the_picture_has_a_line_a_change(experiment, result):
    pytest.importorskip("matplotlib")
    axes = experiment.picture(result).axes
    assert [len(ax.get_yticks()) for ax in axes] == [
        len(experiment.changes(part, experiment.PRESETS["quick"])) for part in ("hooked", "baked")
    ]


def test_the_table_gives_the_mean_over_seeds(experiment):
    keys = ("forget", "forget_paraphrase", "retain", "retain_paraphrase", "retain_accuracy",
            "ks_p")  # fmt: skip
    rows = [
        {"seed": seed, "part": "baked", "what": "ridge", "value": "3", "distance": 0.1 + 0.1 * seed}
        | dict.fromkeys(keys, 0.5)
        for seed in (0, 1)
    ]
    assert experiment.table({"rows": rows}).splitlines()[2] == (
        "| baked | ridge: 3 | 0.500 | 0.500 | 0.500 | 0.500 | 0.500 | 0.5 | 0.150 |"
    )
