import copy

import pytest
import torch

from manifold_unlearn.evaluate import shuffled_weights


def test_every_weight_tensor_keeps_its_entries_in_another_order(model):
    before = copy.deepcopy(model.state_dict())
    made = shuffled_weights(model)
    for name, weight in made.named_parameters():
        old = before[name]
        assert torch.equal(weight.flatten().sort().values, old.flatten().sort().values), name
        if len(old.unique()) > 8:
            assert not torch.equal(weight, old), name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_order_follows_from_the_random_state(llama):
    def rows(random_state):
        return shuffled_weights(llama, random_state).get_input_embeddings().weight

    assert torch.equal(rows(3), rows(3))
    assert not torch.equal(rows(3), rows(4))


def test_tied_weights_stay_tied(llama):
    llama.config.tie_word_embeddings = True
    llama.get_output_embeddings().weight = llama.get_input_embeddings().weight
    made = shuffled_weights(llama)
    assert made.get_output_embeddings().weight is made.get_input_embeddings().weight


def test_a_tensor_is_shuffled_across_its_rows():
    layer = torch.nn.Linear(40, 40)
    made = shuffled_weights(layer)
    in_row = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(layer.weight, made.weight)]  # noqa: B905
    assert sum(in_row) / 40 == pytest.approx(1, abs=1)  # of 40 entries, one is expected to stay
