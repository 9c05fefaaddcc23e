import json
from dataclasses import replace

import numpy as np
import pytest

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.attack import (
    ATTACKS,
    BUDGETS,
    AttackCurve,
    AttackResults,
    attack_gaps,
    run_attacks,
)

QUICK = BUDGETS["quick"]
SMALL = replace(
    QUICK,
    points=(1, 5),
    n_folds=2,
    samples=(1, 2),
    n_optimized=2,
    gcg=replace(QUICK.gcg, n_steps=2, search_width=4, points=(1,)),
    soft_prompt=replace(QUICK.soft_prompt, steps=(1, 3)),
    latent=replace(QUICK.latent, epsilons=(0.25, 1.0), n_steps=2, n_bisections=0),
)


@pytest.fixture(scope="module")
def results(pair):
    """The whole suite on the model that hides, and on the one never told."""
    return {
        name: run_attacks(
            model,
            pair.tokenizer,
            pair.forget,
            pair.retain,
            unrelated=["Red is a color."],
            budget=SMALL,
        )
        for name, model in (("hidden", pair.hidden), ("never", pair.never))
    }


@pytest.mark.usefixtures("unchanged")
def test_every_attack_runs_or_says_what_it_lacks(results):
    found = results["hidden"]
    assert set(found.curves) | set(found.left_out) == set(ATTACKS)
    assert found.left_out == {"paraphrase": "forget items without paraphrased_question"}
    assert set(found.seconds) == set(found.curves)
    json.dumps(found.to_json(), allow_nan=False)


def test_what_was_hidden_comes_back_and_what_was_never_told_does_not(results):
    gaps = attack_gaps(results["hidden"], results["never"])
    assert [g.gap for g in gaps] == sorted((g.gap for g in gaps), reverse=True)
    worst = gaps[0]
    assert worst.gap > 0.3
    assert worst.interval[0] > 0
    by_name = {g.attack: g for g in gaps}
    assert by_name["relearn_disjoint"].reference_best <= 0.6


def test_only_the_attacks_named_run(pair):
    found = run_attacks(
        pair.told, pair.tokenizer, pair.forget, pair.retain, only=["quantize"], budget=SMALL
    )
    assert list(found.curves) == ["quantize"]


def test_unknown_attacks_and_missing_answers_are_named(pair):
    with pytest.raises(ValueError, match="no attack 'magic'; there are relearn"):
        run_attacks(pair.told, pair.tokenizer, pair.forget, pair.retain, only=["magic"])
    with pytest.raises(ValueError, match="retain is empty"):
        run_attacks(pair.told, pair.tokenizer, pair.forget, [])
    with pytest.raises(ValueError, match=r"forget item 1 has no answer \(1 of 2\)"):
        run_attacks(pair.told, pair.tokenizer, [pair.forget[0], Item("A text.")], pair.retain)


def curve(values, spent=(0, 1)):
    return AttackCurve("x", "accuracy", "steps", np.array(spent, float), np.array(values, float))


def test_models_attacked_with_other_budgets_are_not_compared():
    first = AttackResults({"x": curve([[0, 0], [1, 1]])}, {}, {})
    longer = AttackResults({"x": curve([[0, 0], [1, 1]], (0, 2))}, {}, {})
    fewer = AttackResults({"x": curve([[0], [1]])}, {}, {})
    for other in (longer, fewer):
        with pytest.raises(ValueError, match="same items and budget"):
            attack_gaps(first, other)
    (gap,) = attack_gaps(first, AttackResults({"x": curve([[0, 0], [1, 0]])}, {}, {}))
    assert gap.gap == 0.5
