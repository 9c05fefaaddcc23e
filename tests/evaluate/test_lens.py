import copy

import numpy as np
import pytest
import torch
from cases import build_model, hooks, logits, same_state, state

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.evaluate.depth import unlearning_depth
from manifold_unlearn.evaluate.lens import frozen_head_drop, lens_choice, lens_leak, logit_lens
from manifold_unlearn.evaluate.likelihood import answer_log_probabilities, plain

ITEMS = [
    Item("The capital of France is", " Paris", perturbed_answer=(" Rome", " Madrid")),
    Item("Water", " boils", perturbed_answer=(" rusts",)),
    Item("A quick brown fox jumps over", " the lazy dog", perturbed_answer=(" wet copper",)),
]
SITES = ("layers.0", "layers.1", "layers.2")


def test_the_last_block_read_out_is_the_model(model, tokenizer):
    found = logit_lens(plain(model), tokenizer, ITEMS, batch_size=2)
    expected = answer_log_probabilities(plain(model), tokenizer, [item.pair for item in ITEMS])
    means = [float(row.double().mean()) for row in expected]
    np.testing.assert_allclose(found.log_probability[:, -1], means, atol=5e-5)
    assert found.sites == SITES
    assert np.abs(np.diff(found.log_probability, axis=1)).min() > 1e-4


def test_each_block_is_read_out_by_norm_and_unembedding(llama, tokenizer):
    found = logit_lens(plain(llama), tokenizer, ITEMS)
    prompt = tokenizer(ITEMS[2].question).input_ids
    answer = tokenizer(ITEMS[2].answer, add_special_tokens=False).input_ids
    with torch.no_grad():
        out = llama(torch.tensor([prompt + answer]), output_hidden_states=True)
        states = out.hidden_states[2][0, len(prompt) - 1 : -1]
        log_p = llama.lm_head(llama.model.norm(states)).log_softmax(-1)
    own = log_p[range(len(answer)), answer]
    ranks = [int((row > value).sum()) + 1 for row, value in zip(log_p, own, strict=True)]
    assert found.log_probability[2, 1] == pytest.approx(float(own.mean()), abs=2e-5)
    assert found.rank[2, 1] == pytest.approx(np.mean(ranks))
    assert found.accuracy[2, 1] == pytest.approx(np.mean(np.array(ranks) == 1))


def planted(model, tokenizer, item, strength=40.0):
    """Unembedding whose row for the answer points where block 1 leaves the prompt's last token."""
    made = copy.deepcopy(model)
    made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.clone())  # no longer tied
    ids = torch.tensor([tokenizer(item.question).input_ids])
    with torch.no_grad():
        state_1 = made.model(ids, output_hidden_states=True).hidden_states[2][0, -1]
        read = made.model.norm(state_1)
        (answer,) = tokenizer(item.answer, add_special_tokens=False).input_ids
        made.lm_head.weight[answer] = strength * read / read.norm() ** 2
    return made


def test_an_answer_planted_at_a_block_is_read_there(llama, tokenizer):
    item = Item("The capital of France", " is")
    made = planted(llama, tokenizer, item)
    found = logit_lens(plain(made), tokenizer, [item])
    assert found.accuracy[0].tolist()[1] == found.rank[0, 1] == 1
    assert found.log_probability[0, 1] > -0.01
    control = logit_lens(plain(llama), tokenizer, [item])
    assert control.accuracy[0, 1] == 0


def test_a_spoiled_head_hides_nothing_from_the_told_models_head(llama, tokenizer):
    item = Item("The capital of France", " is")
    told = planted(llama, tokenizer, item)
    spoiled = copy.deepcopy(told)
    with torch.no_grad():
        spoiled.lm_head.weight.mul_(-1)
    assert logit_lens(plain(spoiled), tokenizer, [item]).accuracy[0, 1] == 0
    found = logit_lens(plain(spoiled), tokenizer, [item], head=plain(told))
    assert found.accuracy[0, 1] == 1


def test_the_frozen_drop_is_the_difference_of_two_read_outs(llama, tokenizer):
    source = build_model("llama", seed=1)
    before = state(llama), state(source)
    found = frozen_head_drop(plain(llama), plain(source), tokenizer, ITEMS)
    told = logit_lens(plain(llama), tokenizer, ITEMS)
    other = logit_lens(plain(source), tokenizer, ITEMS, head=plain(llama))
    np.testing.assert_allclose(found.values, told.log_probability - other.log_probability)
    assert same_state(llama, before[0]) and same_state(source, before[1])
    assert hooks(llama) == hooks(source) == 0
    none = frozen_head_drop(plain(llama), plain(llama), tokenizer, ITEMS)
    np.testing.assert_array_equal(none.values, 0)
    if (found.values > 0.05).any():
        assert unlearning_depth(found, found).score.mean == 1
        assert unlearning_depth(none, found).score.mean == 0


def test_logits_are_capped_where_the_model_caps_them(tokenizer):
    model = build_model("gemma3", final_logit_softcapping=0.5)
    ids = torch.tensor([tokenizer("Water").input_ids])
    assert logits(model, ids).abs().max() <= 0.5
    found = logit_lens(plain(model), tokenizer, ITEMS)
    expected = answer_log_probabilities(plain(model), tokenizer, [item.pair for item in ITEMS])
    means = [float(row.double().mean()) for row in expected]
    np.testing.assert_allclose(found.log_probability[:, -1], means, atol=5e-5)


def test_heads_of_another_shape_are_refused(llama, tokenizer):
    wide = build_model("llama", num_hidden_layers=4)
    with pytest.raises(ValueError, match="head: 4 blocks"):
        logit_lens(plain(llama), tokenizer, ITEMS, head=plain(wide))


def test_weights_that_are_not_finite_are_named(llama, tokenizer):
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="read out at 'layers.1' is not finite"):
        logit_lens(plain(llama), tokenizer, ITEMS)


def test_a_choice_is_right_where_no_wrong_answer_is_as_likely(llama, tokenizer):
    sites, right, chance = lens_choice(plain(llama), tokenizer, ITEMS)
    assert sites == SITES
    np.testing.assert_allclose(chance, [1 / 3, 1 / 2, 1 / 2])
    for i, item in enumerate(ITEMS):
        answers = (item.answer, *item.perturbed_answer)
        asked = [Item(item.question, answer) for answer in answers]
        logs = logit_lens(plain(llama), tokenizer, asked).log_probability
        np.testing.assert_array_equal(right[i], logs.argmax(axis=0) == 0)
    with pytest.raises(ValueError, match="item 0 has no perturbed_answer"):
        lens_choice(plain(llama), tokenizer, [Item("Water", " boils")])


def test_a_layer_that_reads_everything_is_found():
    values = np.zeros((20, 3))
    values[:, 1] = 1
    found = lens_leak(SITES, values, 0.25)
    assert found.sites == ("layers.1", "layers.1")
    np.testing.assert_allclose(found.above_chance.values, 0.75)


def test_choosing_a_layer_on_noise_leaks_nothing():
    """The maximum over 24 layers of coins is well above chance; what is chosen apart is not."""
    draw = np.random.default_rng(0)
    sites = tuple(f"layers.{i}" for i in range(24))
    naive, found = [], []
    for trial in range(200):
        coins = draw.integers(0, 2, size=(40, 24)).astype(float)
        naive.append(coins.mean(axis=0).max() - 0.5)
        found.append(lens_leak(sites, coins, 0.5, random_state=trial).above_chance.mean)
    assert np.mean(naive) > 0.12
    assert abs(np.mean(found)) < 0.025  # standard error .0056


def test_what_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match="1 items cannot be halved"):
        lens_leak(SITES, np.zeros((1, 3)), 0)
    with pytest.raises(ValueError, match="for 3 sites; one column each"):
        lens_leak(SITES, np.zeros((4, 2)), 0)
