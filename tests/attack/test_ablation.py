import copy

import numpy as np
import pytest
import torch
from cases import build_model, hooks

from manifold_unlearn.attack.ablation import ablation_attack, difference_directions
from manifold_unlearn.attack.knowledge import probability_of
from manifold_unlearn.evaluate.likelihood import plain


def pushed(model, site=1, size=6.0):
    """A copy of the model that adds one direction to its stream, some times the stream's norm."""
    draw = torch.Generator().manual_seed(3)
    push = torch.randn(model.config.hidden_size, generator=draw)

    def add(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden + size * push / push.norm() * hidden.norm(dim=-1).median()
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    made = copy.deepcopy(model)
    made.model.layers[site].register_forward_hook(add)
    return made


def test_the_first_direction_is_the_mean_difference_and_all_are_orthonormal():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(50, 6))
    difference = np.array([3.0, 0, 0, 0, 0, 0]) + rng.normal(size=(50, 1)) * np.eye(6)[1]
    V = difference_directions(torch.tensor(reference + difference), torch.tensor(reference), 4)
    assert V.shape == (6, 2)  # the differences span two dimensions
    np.testing.assert_allclose(V.T @ V, np.eye(2), atol=1e-5)
    mean = difference.mean(0)
    np.testing.assert_allclose(V[:, 0], mean / np.linalg.norm(mean), atol=1e-5)
    assert np.linalg.norm(difference - difference @ V.numpy() @ V.numpy().T) < 1e-4


def test_equal_rows_have_no_direction():
    rows = torch.ones(4, 3)
    assert difference_directions(rows, rows, 2).shape == (3, 0)


def test_a_direction_that_hid_the_knowledge_is_found_and_removed(pair, unchanged):
    hidden = pushed(pair.told)
    n_hooks = hooks(hidden)
    questions = [item.question for item in pair.forget]
    knowledge = probability_of(pair.forget)
    for other in (pair.told, pair.never):
        curve = ablation_attack(
            hidden, pair.tokenizer, knowledge, forget=questions, other=other, ranks=(1, 2)
        )
        assert curve.before.mean < 0.5
        assert curve.best.mean > (0.9 if other is pair.told else 0.7)
        assert max(curve.details["random_directions"]) < 0.6
        assert curve.details["difference"]["layers.1"] > 0.8
    assert hooks(hidden) == n_hooks


def test_nothing_comes_of_the_model_that_was_never_told(pair, unchanged):
    hidden = pushed(pair.never)
    questions = [item.question for item in pair.forget]
    curve = ablation_attack(
        hidden, pair.tokenizer, probability_of(pair.forget), forget=questions, other=pair.told
    )
    untouched = probability_of(pair.forget)(plain(pair.never), pair.tokenizer)
    assert curve.best.mean < untouched.mean() + 0.2


def test_retain_texts_do_where_there_is_no_other_model(pair, unchanged):
    curve = ablation_attack(
        pair.told,
        pair.tokenizer,
        probability_of(pair.forget),
        forget=[item.question for item in pair.forget],
        retain=[item.question for item in pair.retain],
        ranks=(1, 3),
        sites=["layers.0"],
    )
    assert curve.details["reference"] == "retain texts"
    assert curve.details["sites"] == ["layers.0"]
    np.testing.assert_array_equal(curve.spent, [0, 1, 3])
    assert len(curve.details["random_directions"]) == 3


def test_a_model_against_itself_is_left_as_it_is(pair, unchanged):
    questions = [item.question for item in pair.forget]
    curve = ablation_attack(
        pair.told, pair.tokenizer, probability_of(pair.forget), forget=questions, other=pair.told
    )
    np.testing.assert_array_equal(curve.values[1:], curve.values[:1].repeat(4, axis=0))


def test_an_exception_leaves_no_hook(pair, unchanged):
    calls = []

    def stops(subject, tokenizer):
        calls.append(1)
        with subject():
            if len(calls) > 1:
                raise RuntimeError("stop")
            return np.array([0.5])

    with pytest.raises(RuntimeError, match="stop"):
        ablation_attack(pair.hidden, pair.tokenizer, stops, forget=["The pet of"], other=pair.told)


def test_what_cannot_be_compared_is_refused(pair):
    knowledge = probability_of(pair.forget)
    with pytest.raises(ValueError, match="give other"):
        ablation_attack(pair.told, pair.tokenizer, knowledge, forget=["a b"])
    with pytest.raises(ValueError, match=r"ranks=\(2, 1\)"):
        ablation_attack(
            pair.told, pair.tokenizer, knowledge, forget=["a b"], other=pair.never, ranks=(2, 1)
        )
    wide = build_model("llama", hidden_size=48)
    with pytest.raises(ValueError, match="layers.0.*same layout"):
        ablation_attack(pair.told, pair.tokenizer, knowledge, forget=["a b"], other=wide)
