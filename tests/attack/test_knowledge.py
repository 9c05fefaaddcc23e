from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import logits

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.attack.knowledge import (
    accuracy_of,
    measure_name,
    measured,
    probability_of,
    recall_of,
)
from manifold_unlearn.evaluate.likelihood import plain


def test_probability_is_exp_of_the_mean_log_probability_of_the_answer_tokens(pair):
    (found,) = probability_of(pair.forget[:1])(plain(pair.told), pair.tokenizer)
    item = pair.forget[0]
    head = pair.tokenizer(item.question).input_ids
    tail = pair.tokenizer(item.answer, add_special_tokens=False).input_ids
    log_p = logits(pair.told, torch.tensor([head + tail]))[0].log_softmax(-1)
    rows = log_p[range(len(head) - 1, len(head + tail) - 1), tail]
    assert found == pytest.approx(np.exp(rows.mean().item()), rel=1e-5)


def test_the_told_model_knows_and_the_never_told_one_is_at_chance(pair):
    for measure in (probability_of, accuracy_of, recall_of):
        told = measure(pair.forget)(plain(pair.told), pair.tokenizer)
        never = measure(pair.forget)(plain(pair.never), pair.tokenizer)
        assert told.shape == never.shape == (len(pair.forget),)
        assert told.mean() > 0.95
        assert never.mean() < 0.65  # chance is 1 of 4 ranked, of 10 items


def test_plain_texts_have_a_probability(pair):
    texts = [Item(item.text) for item in pair.forget]
    told = probability_of(texts)(plain(pair.told), pair.tokenizer)
    never = probability_of(texts)(plain(pair.never), pair.tokenizer)
    assert told.shape == (10,)
    assert np.isfinite([told, never]).all()


def test_what_cannot_be_measured_is_refused(pair):
    with pytest.raises(ValueError, match="items is empty"):
        probability_of([])
    with pytest.raises(ValueError, match=r"item 1 has no perturbed_answer .*\(1 of 2\)"):
        accuracy_of([pair.forget[0], replace(pair.forget[1], perturbed_answer=())])
    with pytest.raises(ValueError, match="recall_of needs answers"):
        recall_of([Item("a text")])
    with pytest.raises(ValueError, match="mixed in one set"):
        probability_of([Item("a text"), pair.forget[0]])


@pytest.mark.parametrize("values", [[np.nan, 0.5], [0.2, 1.5], [], [[0.1], [0.2]]])
def test_a_measure_that_gives_garbage_is_named(values):
    def broken(subject, tokenizer):
        return np.array(values)

    with pytest.raises(ValueError, match="broken gave"):
        measured(broken, plain(None), None)
    assert measure_name(broken) == "broken"


def test_weights_that_are_not_finite_give_no_silent_nan(pair, llama):
    with torch.no_grad():
        llama.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite|NaN"):
        measured(probability_of(pair.forget), plain(llama), pair.tokenizer)
