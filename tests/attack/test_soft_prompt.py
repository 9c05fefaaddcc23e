from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import logits

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.attack.knowledge import probability_of
from manifold_unlearn.attack.soft_prompt import SoftPromptConfig, soft_prompt_attack
from manifold_unlearn.attack.targets import encode_targets, mean_log_likelihood
from manifold_unlearn.evaluate.likelihood import plain

QUICK = SoftPromptConfig(n_tokens=3, steps=(1, 5, 20), control="perturbed")


@pytest.mark.parametrize("place", ["suffix", "prefix"])
def test_inserting_embeddings_of_tokens_is_inserting_the_tokens(model, tokenizer, place):
    items = [Item("The capital of France is", " Paris"), Item("Water", " boils, it is wet")]
    inserted = torch.tensor([20, 31, 17])
    targets = encode_targets(model, tokenizer, items, place=place, room=3)
    rows = model.get_input_embeddings()(inserted)[None]
    found = mean_log_likelihood(model, targets, rows)
    for item, value in zip(items, found, strict=True):
        head = tokenizer(item.question).input_ids
        tail = tokenizer(item.answer, add_special_tokens=False).input_ids
        cut = 1 if place == "prefix" else len(head)
        ids = [*head[:cut], *inserted.tolist(), *head[cut:], *tail]
        log_p = logits(model, torch.tensor([ids]))[0].log_softmax(-1)
        expected = log_p[range(len(ids) - len(tail) - 1, len(ids) - 1), tail].mean()
        assert value.item() == pytest.approx(expected.item(), abs=2e-5)


def test_a_suffix_stands_before_the_ending(llama, tokenizer):
    item = Item("The capital of France is it?\nYes:", " Paris")
    targets = encode_targets(llama, tokenizer, [item], ending="\nYes:")
    assert tokenizer.decode(targets.head_ids[0], skip_special_tokens=True).endswith("it?")
    assert tokenizer.decode(targets.tail_ids[0]) == "\nYes: Paris"
    assert tokenizer.decode(targets.tail_ids[0][targets.answer[0]]) == " Paris"


def test_the_first_point_is_the_prompt_without_vectors(pair, unchanged):
    curve = soft_prompt_attack(pair.hidden, pair.tokenizer, pair.forget, config=QUICK)
    plainly = probability_of(pair.forget)(plain(pair.hidden), pair.tokenizer)
    np.testing.assert_allclose(curve.values[0], plainly, atol=1e-5)
    np.testing.assert_array_equal(curve.spent, [0, 1, 5, 20])


def test_what_the_attack_gains_over_wrong_answers_is_knowledge(pair, unchanged):
    config = replace(QUICK, place="prefix", steps=(1, 5))
    told, hidden, never = (
        soft_prompt_attack(model, pair.tokenizer, pair.forget, config=config).details["gap"]
        for model in (pair.told, pair.hidden, pair.never)
    )
    assert told[1] > 0.3
    assert sum(hidden[1:]) > sum(never[1:]) + 0.1
    assert never[2] < 0.1


def test_loss_goes_down_with_either_optimizer_and_repeats(pair, unchanged):
    for optimizer in ("adam", "sign"):
        config = replace(QUICK, optimizer=optimizer)
        curve = soft_prompt_attack(pair.never, pair.tokenizer, pair.forget[:4], config=config)
        again = soft_prompt_attack(pair.never, pair.tokenizer, pair.forget[:4], config=config)
        np.testing.assert_array_equal(curve.values, again.values)
        assert (np.diff(curve.values[1:], axis=0) >= -1e-5).all()  # each item keeps its best
        assert curve.values[3].mean() > curve.values[1].mean()


def test_each_item_has_its_own_vectors_whatever_the_batch(pair, unchanged):
    whole = soft_prompt_attack(pair.never, pair.tokenizer, pair.forget[:4], config=QUICK)
    small = replace(QUICK, batch_size=3)
    found = soft_prompt_attack(pair.never, pair.tokenizer, pair.forget[:4], config=small)
    np.testing.assert_allclose(whole.values[1:3], found.values[1:3], atol=1e-3)


def test_a_universal_prompt_is_measured_on_items_it_never_saw(pair, unchanged):
    config = replace(QUICK, universal=True, steps=(1, 20))
    curve = soft_prompt_attack(
        pair.told, pair.tokenizer, pair.forget[:6], held_out=pair.forget[6:], config=config
    )
    assert curve.attack == "soft prompt, universal"
    assert len(curve.details["held_out"]) == 3
    assert curve.details["held_out"][0] > 0.9  # without vectors
    assert curve.values.shape == (3, 6)
    with pytest.raises(ValueError, match="universal=True"):
        soft_prompt_attack(
            pair.told, pair.tokenizer, pair.forget[:6], held_out=pair.forget[6:], config=QUICK
        )


def test_bad_settings_are_refused(pair):
    with pytest.raises(ValueError, match="items is empty"):
        soft_prompt_attack(pair.told, pair.tokenizer, [])
    with pytest.raises(ValueError, match="the model takes 24"):
        config = SoftPromptConfig(n_tokens=40)
        soft_prompt_attack(pair.told, pair.tokenizer, [Item("?" * 30, " cat")], config=config)
    with pytest.raises(ValueError, match="does not end on ending='!'"):
        config = SoftPromptConfig(ending="!")
        soft_prompt_attack(pair.told, pair.tokenizer, pair.forget, config=config)
    with pytest.raises(ValueError, match="place='middle'"):
        config = SoftPromptConfig(place="middle")
        soft_prompt_attack(pair.told, pair.tokenizer, pair.forget, config=config)
    for options, words in [
        ({"steps": ()}, "ascending"),
        ({"n_tokens": 0}, "must be positive"),
        ({"optimizer": "sgd"}, "optimizer='sgd'"),
    ]:
        with pytest.raises(ValueError, match=words):
            SoftPromptConfig(**options)
