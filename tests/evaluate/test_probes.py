import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import hooks, same_state, state
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.evaluate.likelihood import plain
from manifold_unlearn.evaluate.probe_tasks import truth_task
from manifold_unlearn.evaluate.probes import probe, probe_rows

QUICK = {"n_splits": 3, "n_shuffles": 1}


def rows(n_groups=40, per_group=2, width=20, classes=2, planted=0.0, seed=0):
    """Rows at two sites; at ``b`` the label shows along a direction. Groups share their label."""
    draw = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_groups), per_group)
    labels = groups % classes
    X = {site: draw.normal(size=(len(groups), width)) for site in "ab"}
    X["b"] += planted * np.eye(width)[labels]
    return {site: torch.tensor(x, dtype=torch.float32) for site, x in X.items()}, labels, groups


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("classes", [2, 4])
def test_what_is_planted_is_found_there_and_nowhere_else(kind, classes):
    X, labels, groups = rows(classes=classes, planted=8.0)
    found = probe_rows(X, labels, groups, kind=kind, n_splits=3, n_shuffles=1)
    assert found.measure == ("auc" if classes == 2 else "balanced_accuracy")
    assert found.values[1] > 0.97
    assert abs(found.values[0] - 1 / classes) < 0.2  # two standard errors of 80 rows in 40 groups
    assert abs(found.shuffled[1] - 1 / classes) < 0.2
    above = found.above_shuffled()
    assert above[1].interval[0] > 0.2


def test_a_network_finds_what_no_line_does():
    """The label is the sign of a product."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(300, 4))
    X = {"a": torch.tensor(x)}
    labels = (x[:, 0] * x[:, 1] > 0).astype(int)
    linear, mlp = (probe_rows(X, labels, np.arange(300), kind=k) for k in ("linear", "mlp"))
    assert linear.values[0] < 0.62
    assert mlp.values[0] > 0.85


def test_the_measures_are_those_of_sklearn_within_each_part():
    X, labels, groups = rows(planted=1.0)
    found = probe_rows(X, labels, groups, **QUICK)
    ranked = [at for at in (found.fold == part for part in range(3)) if len(set(labels[at])) == 2]
    areas = [roc_auc_score(labels[at], found.readings[1][at]) for at in ranked]
    pairs = [(labels[at] == 1).sum() * (labels[at] == 0).sum() for at in ranked]
    expected = np.average(areas, weights=pairs)
    assert found.values[1] == pytest.approx(expected)
    X, labels, groups = rows(planted=1.0, classes=3)
    found = probe_rows(X, labels, groups, **QUICK)
    assert found.values[1] == pytest.approx(balanced_accuracy_score(labels, found.readings[1]))


def test_a_group_is_never_on_both_sides():
    """What identifies a group would give its label away."""
    X, labels, groups = rows(n_groups=30, per_group=4, width=60)
    labels = np.random.default_rng(1).permutation(np.arange(30) % 2)[groups]
    mark = 6 * np.random.default_rng(2).normal(size=(30, 60))
    X["a"] = torch.tensor(mark[groups]) + X["a"].double()
    assert probe_rows(X, labels, np.arange(len(groups)), **QUICK).values[0] > 0.95  # leaks
    found = probe_rows(X, labels, groups, **QUICK)
    assert found.values[0] < 0.75
    assert all(len(set(found.fold[groups == g])) == 1 for g in range(30))


def test_only_rows_asked_are_judged_and_the_others_train():
    X, labels, groups = rows(planted=8.0)
    asked = groups < 10
    found = probe_rows(X, labels, groups, asked, n_splits=1)
    assert found.readings.shape == (2, asked.sum())
    assert found.values[1] > 0.97
    X["b"][~torch.tensor(asked)] = torch.randn(60, 20, generator=torch.Generator().manual_seed(0))
    assert probe_rows(X, labels, groups, asked, n_splits=1).values[1] < 0.9  # nothing to learn from


def test_what_stands_above_another_model_is_by_pairs():
    X, labels, groups = rows(planted=4.0)
    told, never = (
        probe_rows(X, labels, groups, **QUICK),
        probe_rows({**X, "b": X["a"]}, labels, groups, **QUICK),
    )
    above = told.above(never)
    assert above[0] == (0.0, (0.0, 0.0))
    assert above[1].value == pytest.approx(told.values[1] - never.values[1])
    assert above[1].interval[0] > 0
    low, high = told.intervals[1]
    assert low <= told.values[1] <= high
    assert json.loads(json.dumps(told.to_json()))["n_groups"] == 40
    with pytest.raises(ValueError, match="run one task on both models"):
        told.above(replace(never, labels=1 - labels))


def test_shuffled_labels_keep_their_shares():
    X, labels, groups = rows(classes=4)
    whole = probe_rows(X, labels, groups, **QUICK)
    for shuffled in whole.shuffled_labels:
        assert np.bincount(shuffled).tolist() == np.bincount(labels).tolist()
        assert not np.array_equal(shuffled, labels)
        assert all(len(set(shuffled[groups == g])) == 1 for g in range(40))
    labels = np.arange(len(groups)) % 2  # one of each in every group
    for shuffled in probe_rows(X, labels, groups, **QUICK).shuffled_labels:
        assert all(shuffled[groups == g].sum() == 1 for g in range(40))
        assert not np.array_equal(shuffled, labels)


def test_the_same_seed_gives_the_same_readings():
    X, labels, groups = rows()
    first, second, other = (
        probe_rows(X, labels, groups, random_state=s, **QUICK) for s in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.readings, second.readings)
    assert not np.array_equal(first.fold, other.fold)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "tree"}, "kind='tree' is not 'linear' or 'mlp'"),
        ({"n_splits": 41}, "n_splits=41 with 40 groups"),
        ({"n_splits": 1}, "n_splits=1 trains on rows that are not asked"),
        ({"n_shuffles": 0}, "n_shuffles=0"),
    ],
)
def test_what_cannot_be_probed_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        probe_rows(*rows(), **change)


def test_rows_that_are_not_finite_are_named():
    X, labels, groups = rows()
    X["b"][3, 3] = float("inf")
    with pytest.raises(ValueError, match="rows of 'b' hold NaN or infinity"):
        probe_rows(X, labels, groups, **QUICK)


def test_a_model_is_read_at_the_last_token_of_every_text_in_one_run(llama, tokenizer):
    """The right answer's last token differs from the wrong one's: a random model shows that."""
    before, seen = state(llama), []
    llama.model.register_forward_pre_hook(
        lambda m, a, k: seen.append(len(k["input_ids"])), with_kwargs=True
    )
    items = [Item(f"Thing {i} is", " Paris", perturbed_answer=(" rusts",)) for i in range(12)]
    found = probe(plain(llama), tokenizer, truth_task(items), n_splits=3)
    assert sum(seen) == 24
    assert same_state(llama, before) and hooks(llama) == 1
    assert found.sites == ("layers.0", "layers.1", "layers.2")
    assert (found.values > 0.9).all()
    assert abs(found.shuffled.mean() - 0.5) < 0.3
    by_hand = []
    for text in ("Thing 3 is Paris", "Thing 3 is rusts"):
        with torch.no_grad():
            out = llama(torch.tensor([tokenizer(text).input_ids]), output_hidden_states=True)
        by_hand.append(out.hidden_states[1][0, -1])
    assert not torch.allclose(*by_hand)
