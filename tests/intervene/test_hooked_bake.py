import pytest
import torch
from cases import TEXTS, logits, same_state, state

from manifold_unlearn import bake, intervene
from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.evaluate.kept import kept_behavior
from manifold_unlearn.evaluate.likelihood import plain
from manifold_unlearn.intervene.hooked_bake import LeastSquares
from manifold_unlearn.intervene.least_squares import least_squares_bake
from manifold_unlearn.intervene.maps import AffineMap
from manifold_unlearn.intervene.targets import hooked_targets, token_rows

FORGET, RETAIN = [TEXTS[0], TEXTS[2]], [TEXTS[1], TEXTS[4]]


def nudge(h):
    """Not affine, and nothing before the third token."""
    moved = h + 0.3 * torch.sin(h.roll(1, -1))
    moved[:, :2] = h[:, :2]
    return moved


def affine():
    draw = torch.Generator().manual_seed(0)
    read = torch.randn(32, 2, generator=draw)
    return AffineMap(read, 0.1 * read, torch.ones(2))


def test_a_nonlinear_map_bakes_when_it_is_asked_for(model, tokenizer):
    before = state(model)
    asked = LeastSquares(tokenizer, FORGET, RETAIN, ridge=0.1)
    with pytest.raises(ValueError, match="has no exact weight edit.*least_squares=LeastSquares"):
        bake(model, {"layers.0": nudge})
    with pytest.raises(ValueError, match="only an affine map bakes exactly"):
        bake(model, {"layers.0.mlp": nudge})
    baked = bake(model, {"layers.0": nudge}, least_squares=asked)
    assert same_state(model, before)
    items = [Item(text) for text in FORGET]
    hooked = lambda: intervene(model, {"layers.0": nudge})  # noqa: E731
    kept = kept_behavior(hooked, plain(baked), plain(model), tokenizer, items)
    assert kept.divergence > 0.9
    assert kept.log_probability > 0.8


def test_the_plan_is_hooked_targets_and_least_squares(llama, tokenizer):
    maps = {"layers.0": nudge}
    plan = LeastSquares(tokenizer, FORGET, RETAIN, ridge=0.7, layers=[0, 1], n_passes=2)
    targets = hooked_targets(llama, tokenizer, FORGET, maps, layers=[0, 1])
    retain = token_rows(llama, tokenizer, RETAIN)
    expected = least_squares_bake(llama, targets, retain, ridge=0.7, n_passes=2)
    found = plan.bake(llama, maps)
    assert same_state(found.model, state(expected.model))
    assert found.kept == expected.kept
    assert same_state(bake(llama, maps, least_squares=plan), state(expected.model))


def test_where_all_maps_bake_exactly_they_do(llama, tokenizer):
    plan = LeastSquares(tokenizer, FORGET, RETAIN)
    maps = {"layers.1.mlp": affine()}
    assert same_state(bake(llama, maps, least_squares=plan), state(bake(llama, maps)))


def test_an_affine_map_at_a_site_without_exact_edit_is_approximated(llama, tokenizer):
    ids = torch.tensor([tokenizer(FORGET[1]).input_ids])
    maps = {"layers.1": affine()}
    plan = LeastSquares(tokenizer, FORGET, FORGET[:1], ridge=0.0, damping=1e-9)
    with intervene(llama, maps):
        hooked = logits(llama, ids)
    baked = logits(bake(llama, maps, least_squares=plan), ids)
    assert (baked - hooked).norm() < 0.05 * (logits(llama, ids) - hooked).norm()
