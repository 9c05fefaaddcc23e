import numpy as np
import pytest
import torch
from cases import same_state, state

from manifold_unlearn.testbed.tokenizer import build_tokenizer
from manifold_unlearn.testbed.training import Recipe, initial_model, plan, train

TEXTS = [f"The {a} {b} is {c}." for a in ("old", "red") for b in ("cup", "hat") for c in "abc"]
TOKENIZER = build_tokenizer(TEXTS)
RECIPE = Recipe(
    d_model=16, d_hidden=24, n_layers=2, n_heads=2, context=64, n_steps=30, n_warmup=5,
    batch_size=2, texts_per_row=2, learning_rate=1e-2,
)  # fmt: skip
CPU = torch.device("cpu")


def trained(seed=0, recipe=RECIPE):
    slots = plan(len(TEXTS), range(len(TEXTS)), recipe, seed)
    return train(recipe, TOKENIZER, TEXTS, slots, random_state=seed, device=CPU, progress=False)


# --- the order of the texts -----------------------------------------------------------------


def test_every_pass_holds_every_text_once():
    slots = plan(20, range(20), RECIPE, 0).ravel()
    for start in range(0, 120, 20):
        assert sorted(slots[start : start + 20]) == list(range(20))
    assert slots.shape == (120,)


def test_the_twin_differs_only_where_a_forgotten_text_stood():
    told, twin = (plan(20, kept, RECIPE, 3) for kept in (range(20), range(5, 20)))
    assert told.shape == twin.shape == (30, 2, 2)
    np.testing.assert_array_equal(twin[told >= 5], told[told >= 5])
    assert set(twin.ravel()) == set(range(5, 20))
    assert len(set(twin[told < 5])) > 5


def test_another_seed_is_another_order():
    assert not np.array_equal(*(plan(20, range(20), RECIPE, seed) for seed in (0, 1)))


# --- the model ------------------------------------------------------------------------------


def test_the_initial_weights_depend_on_the_seed_alone_and_leave_the_global_state():
    before = torch.get_rng_state()
    first = state(initial_model(RECIPE, TOKENIZER, 0))
    torch.rand(7)
    assert same_state(initial_model(RECIPE, TOKENIZER, 0), first)
    assert not same_state(initial_model(RECIPE, TOKENIZER, 1), first)
    torch.set_rng_state(before)
    initial_model(RECIPE, TOKENIZER, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_two_trainings_are_bit_identical_whatever_the_number_of_threads():
    first, losses = trained()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        second, again = trained()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert losses == again
    assert same_state(second, state(first))
    assert not first.training
    assert not same_state(trained(seed=1)[0], state(first))


def test_training_lowers_the_loss():
    losses = trained()[1]
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


def test_the_first_loss_is_the_mean_over_all_tokens_but_the_first():
    """Written out: the initial model on the first batch, row by row, without padding."""
    slots = plan(len(TEXTS), range(len(TEXTS)), RECIPE, 0)
    model = initial_model(RECIPE, TOKENIZER, 0)
    total, count = 0.0, 0
    for row in slots[0]:
        ids = [t for i in row for t in (*TOKENIZER(TEXTS[i])["input_ids"], TOKENIZER.eos_token_id)]
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(logp[k, ids[k + 1]]) for k in range(len(ids) - 1))
        count += len(ids) - 1
    assert trained()[1][0] == pytest.approx(total / count, rel=1e-5)


def test_a_row_longer_than_the_context_is_an_error():
    with pytest.raises(ValueError, match=r"a row of the training has 1\d tokens; .* context is 8"):
        trained(recipe=Recipe(**{**vars(RECIPE), "context": 8}))
