from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import state

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.attack.latent import LatentConfig, latent_attack

QUICK = LatentConfig(epsilons=(0.1, 0.4), n_steps=4, n_bisections=2, control="perturbed")


def test_what_is_hidden_comes_out_under_a_push_that_does_not_do_for_the_never_told(pair, unchanged):
    config = LatentConfig(epsilons=(0.25, 0.5, 1.0), n_bisections=0)
    hidden, never = (
        latent_attack(model, pair.tokenizer, pair.forget, config=config)
        for model in (pair.hidden, pair.never)
    )
    assert hidden.before.mean < never.before.mean + 0.05
    assert hidden.values[3].mean() > never.values[3].mean() + 0.1
    assert hidden.details["gap"][1] > 0.3  # random answers need more


def test_the_never_told_model_yields_wrong_answers_of_the_right_kind_as_easily(pair, unchanged):
    config = LatentConfig(epsilons=(0.0625, 0.125), control="perturbed", n_bisections=0)
    told = latent_attack(pair.told, pair.tokenizer, pair.forget, config=config)
    never = latent_attack(pair.never, pair.tokenizer, pair.forget, config=config)
    assert told.details["gap"][2] > 0.6
    assert never.details["gap"][2] < 0.2


def changes(pair, config):
    """Norm of what was added to each row ``(passes, items, prompt tokens)``, and the curve."""
    lengths = [len(pair.tokenizer(item.question).input_ids) for item in pair.forget]
    width = max(set(lengths), key=lengths.count)  # no padding, whose rows mean nothing
    items = [i for i, n in zip(pair.forget, lengths, strict=True) if n == width][:3]
    seen = []
    block = pair.hidden.model.layers[2]
    handle = block.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    try:
        curve = latent_attack(pair.hidden, pair.tokenizer, items, config=config)
    finally:
        handle.remove()
    seen = [row for row in seen if row.shape == seen[-1].shape]
    clean = seen[0]
    moved = torch.stack([row - clean for row in seen]).norm(dim=-1)[:, :, :width]
    assert len(moved) > 2 * config.n_steps
    return moved, curve


def test_no_row_moves_beyond_epsilon_nor_the_opening_token(pair):
    moved, curve = changes(pair, replace(QUICK, control="others"))
    bound = 0.4 * curve.details["median_norm"]
    assert 0.9 * bound < moved.max() <= bound * (1 + 1e-4)
    assert moved[:, :, 0].max() == 0


def test_only_the_last_token_moves_when_asked(pair):
    moved, _ = changes(pair, replace(QUICK, control="others", tokens="last"))
    assert (moved.amax((0, 1)) > 1e-3).sum() == 1


def test_more_is_never_less_and_stars_lie_on_the_grid_or_below(pair, unchanged):
    curve = latent_attack(pair.hidden, pair.tokenizer, pair.forget, config=QUICK)
    assert (np.diff(curve.values, axis=0) >= -1e-6).all()
    np.testing.assert_allclose(curve.spent, [0, 0.1, 0.4])
    assert curve.details["gradient_steps"] == [0, 4, 8]
    for i, star in enumerate(curve.details["epsilon_star"]):
        out = np.flatnonzero(curve.values[:, i] >= 0.5)
        assert (star is None) == (not out.size)
        if star is not None:
            assert star <= curve.spent[out[0]]
            assert star >= (curve.spent[out[0] - 1] if out[0] else 0)


def test_batches_and_repeats_do_not_matter(pair, unchanged):
    config = replace(QUICK, n_bisections=0)
    whole = latent_attack(pair.hidden, pair.tokenizer, pair.forget[:5], config=config)
    again = latent_attack(pair.hidden, pair.tokenizer, pair.forget[:5], config=config)
    np.testing.assert_array_equal(whole.values, again.values)
    small = latent_attack(
        pair.hidden, pair.tokenizer, pair.forget[:5], config=replace(config, batch_size=2)
    )
    np.testing.assert_allclose(whole.values, small.values, atol=2e-3)


def test_every_architecture_can_be_attacked(model, pair):
    before = state(model)
    curve = latent_attack(model, pair.tokenizer, pair.forget[:2], config=QUICK)
    assert curve.values[-1].mean() > curve.values[0].mean()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_bad_settings_are_refused(pair):
    with pytest.raises(ValueError, match="items is empty"):
        latent_attack(pair.told, pair.tokenizer, [])
    with pytest.raises(ValueError, match="item 0 has no answer"):
        latent_attack(pair.told, pair.tokenizer, [Item("text")])
    with pytest.raises(ValueError, match="no site 'layers.9'"):
        latent_attack(pair.told, pair.tokenizer, pair.forget, site="layers.9")
    with pytest.raises(ValueError, match="no perturbed_answer"):
        bare = [replace(pair.forget[0], perturbed_answer=())]
        latent_attack(pair.told, pair.tokenizer, bare, config=QUICK)
    with pytest.raises(ValueError, match="control='none'"):
        latent_attack(pair.told, pair.tokenizer, pair.forget, config=LatentConfig(control="none"))
    for options, words in [
        ({"epsilons": (0.2, 0.1)}, "ascending"),
        ({"n_steps": 0}, "at least 1"),
        ({"tokens": "all"}, "tokens='all'"),
        ({"threshold": 1.0}, "threshold=1.0"),
    ]:
        with pytest.raises(ValueError, match=words):
            LatentConfig(**options)
