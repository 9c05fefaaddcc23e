import numpy as np
import pytest

from manifold_unlearn.attack.knowledge import probability_of
from manifold_unlearn.attack.relearn import (
    disjoint_facts_attack,
    relearning_attack,
    steps_to,
)
from manifold_unlearn.attack.results import AttackCurve
from manifold_unlearn.evaluate.likelihood import plain
from manifold_unlearn.finetune.train import TrainConfig

CONFIG = TrainConfig(lr=1e-3, batch_size=16, schedule="constant", weight_decay=0.0)
UNRELATED = ["Iron rusts when it is wet, and copper turns green", "A quick brown fox jumps"]


def test_what_is_hidden_is_relearned_in_fewer_steps_than_what_was_never_told(pair, unchanged):
    knowledge = probability_of(pair.forget)
    curves = [
        relearning_attack(
            model, pair.tokenizer, knowledge, pair.forget, points=(1, 2, 5, 10), config=CONFIG
        )
        for model in (pair.hidden, pair.never)
    ]
    hidden, never = curves
    np.testing.assert_array_equal(hidden.spent, [0, 1, 2, 5, 10])
    np.testing.assert_allclose(
        hidden.before.values, knowledge(plain(pair.hidden), pair.tokenizer), rtol=1e-6
    )
    assert hidden.values[3].mean() > never.values[3].mean() + 0.2
    assert steps_to(hidden, 0.6) < steps_to(never, 0.6)
    assert len(hidden.details["losses"]) == 10


def test_facts_held_out_return_only_where_they_were_hidden(pair, unchanged):
    curves = [
        disjoint_facts_attack(
            model,
            pair.tokenizer,
            pair.forget,
            original=pair.told,
            measure=probability_of,
            n_folds=2,
            points=(1, 5, 20),
            config=CONFIG,
        )
        for model in (pair.hidden, pair.never)
    ]
    hidden, never = curves
    assert hidden.best.mean > hidden.before.mean + 0.15
    assert never.best.mean < never.before.mean + 0.1
    assert hidden.details["recovered"] > never.details["recovered"] + 0.2
    assert hidden.details["accuracy_original"] > 0.95


def test_the_headline_is_the_best_accuracy_over_the_originals(pair, unchanged):
    curve = disjoint_facts_attack(
        pair.hidden, pair.tokenizer, pair.forget, original=pair.told, n_folds=2, points=(1,)
    )
    assert curve.metric == "accuracy"
    assert set(np.unique(curve.values)) <= {0.0, 1.0}
    assert curve.details["recovered"] == pytest.approx(curve.values.mean(1).max() / 1.0)


def test_folds_hold_out_every_item_once_and_keep_groups_whole(pair, unchanged, monkeypatch):
    from manifold_unlearn.attack import relearn

    trained = []
    fit = relearn.fine_tune

    def spy(model, tokenizer, items, **options):
        trained.append([item.question for item in items])
        return fit(model, tokenizer, items, **options)

    monkeypatch.setattr(relearn, "fine_tune", spy)
    groups = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    curve = disjoint_facts_attack(
        pair.hidden,
        pair.tokenizer,
        pair.forget,
        measure=probability_of,
        groups=groups,
        n_folds=3,
        points=(1,),
        config=CONFIG,
    )
    folds = curve.details["folds"]
    assert set(folds) == {0, 1, 2}
    assert all(folds[i] == folds[i + 1] for i in range(0, 10, 2))
    for fold, questions in enumerate(trained):
        held = {item.question for item, f in zip(pair.forget, folds, strict=True) if f == fold}
        assert held.isdisjoint(questions)
        assert len(held) + len(questions) == 10
    assert curve.details["recovered"] is None


def test_unrelated_text_teaches_the_never_told_model_nothing(pair, unchanged):
    curve = relearning_attack(
        pair.never,
        pair.tokenizer,
        probability_of(pair.forget),
        UNRELATED,
        name="unrelated text",
        points=(1, 5, 10),
        config=CONFIG,
    )
    assert curve.attack == "relearn, unrelated text"
    assert curve.best.mean < curve.before.mean + 0.1


def test_steps_to_a_level_are_interpolated():
    values = np.array([[0.1, 0.3], [0.5, 0.5], [0.9, 1.0]])
    curve = AttackCurve("a", "m", "gradient steps", np.array([0.0, 2.0, 10.0]), values)
    assert steps_to(curve, 0.35) == pytest.approx(1.0)
    assert steps_to(curve, 0.1) == 0
    assert steps_to(curve, 0.99) == float("inf")


def test_a_failing_measure_leaves_the_model_alone(pair, unchanged):
    calls = []

    def stops(subject, tokenizer):
        calls.append(1)
        return np.array([0.5 if len(calls) < 2 else np.nan])

    with pytest.raises(ValueError, match="stops gave"):
        relearning_attack(pair.told, pair.tokenizer, stops, UNRELATED, points=(1, 2))


def test_bad_settings_are_refused(pair):
    knowledge = probability_of(pair.forget)
    with pytest.raises(ValueError, match="material is empty"):
        relearning_attack(pair.told, pair.tokenizer, knowledge, [])
    with pytest.raises(ValueError, match=r"points=\(5, 2\)"):
        relearning_attack(pair.told, pair.tokenizer, knowledge, UNRELATED, points=(5, 2))
    with pytest.raises(ValueError, match="3 groups for 10 items"):
        disjoint_facts_attack(pair.told, pair.tokenizer, pair.forget, groups=[1, 2, 3])
    with pytest.raises(ValueError, match="n_folds=11"):
        disjoint_facts_attack(pair.told, pair.tokenizer, pair.forget, n_folds=11)
