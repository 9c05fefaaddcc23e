import itertools

import numpy as np
import pytest

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.attack.sampled import sampling_attack
from manifold_unlearn.evaluate import plain

ITEMS = [Item("Iron", "rusts"), Item("Water", "boils over")]


@pytest.fixture
def said(monkeypatch):
    """Four samples of each item, and greedy answers, without a model."""
    samples = [["it rusts", "", "no", "rusts"], ["boils", "over", "boils over", "x"]]
    room = "manifold_unlearn.attack.sampled."
    monkeypatch.setattr(room + "sample_answers", lambda *a, **k: samples)
    monkeypatch.setattr(room + "greedy_answers", lambda *a, **k: ["no", "boils"])
    return np.array([[1, 0, 0, 1], [0.5, 0.5, 1, 0]])


def test_each_point_is_the_mean_of_the_best_over_all_subsets(said):
    curve = sampling_attack(None, None, ITEMS, k=(1, 2, 3, 4))
    assert curve.unit == "samples" and curve.spent.tolist() == [0, 1, 2, 3, 4]
    assert curve.values[0].tolist() == [0, 0.5]  # greedy
    for k in range(1, 5):
        best = [max(c) for row in said for c in itertools.combinations(row, k)]
        assert curve.values[k] == pytest.approx(np.reshape(best, (2, -1)).mean(axis=1))
    assert curve.details["n_empty"] == 1


def test_it_runs_on_a_model_and_repeats_itself(llama, tokenizer):
    runs = [
        sampling_attack(
            plain(llama), tokenizer, ITEMS, k=(1, 3), n_samples=5, max_new_tokens=4, random_state=s
        )
        for s in (0, 0, 1)
    ]
    assert runs[0].values.shape == (3, 2)
    assert np.array_equal(runs[0].values, runs[1].values)
    assert runs[0].details["n_samples"] == 5


def test_what_cannot_be_estimated_is_an_error(said):
    with pytest.raises(ValueError, match="holds a plain text"):
        sampling_attack(None, None, [Item("text")])
    with pytest.raises(ValueError, match=r"k=\(2, 2\) must ascend from 1"):
        sampling_attack(None, None, ITEMS, k=(2, 2))
    with pytest.raises(ValueError, match="n_samples=4 is fewer than k=8"):
        sampling_attack(None, None, ITEMS, k=(1, 8), n_samples=4)
    with pytest.raises(ValueError, match="score answered nan to 'no'"):
        sampling_attack(None, None, ITEMS, k=(1,), score=lambda a, b: float("nan"))
