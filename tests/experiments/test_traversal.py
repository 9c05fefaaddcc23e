"""What the traversal experiment makes of its rows; running it takes a quarter of an hour."""

import numpy as np
import pytest
import torch

SCRIPT = "traversal.py"


def rows(curve, chord, gap, n=20):
    walks = [
        {"stage": "energy", "task": "weekdays", "neighbors": i < 5, "pca": curve + 0.001 * i,
         "pca_bhattacharyya": curve**2 + 0.001 * i, "chord": chord + 0.001 * i,
         "chord_bhattacharyya": chord**2 + 0.001 * i}
        for i in range(n)
    ]  # fmt: skip
    return [
        {"stage": "shape", "task": "weekdays", "verdict": "manifold"}, *walks,
        {"stage": "steering", "task": "weekdays", "difference": gap},
        {"stage": "steering", "task": "weekdays", "difference": None, "error": "no common range"},
    ]  # fmt: skip


def test_a_curve_that_keeps_nearer_and_steers_as_strongly_meets_every_target(experiment):
    made = experiment.claims(rows(0.1, 0.5, 0.2), experiment.Config(), "run")
    assert len(made) == 8 and all(c["holds"] for c in made if "neighbors (" not in c["claim"])
    assert made[-1]["value"] == "1 of 1"


@pytest.mark.parametrize(
    ("curve", "gap", "missed"),
    [(0.4, 0.2, "energy of the curve"), (0.6, 0.2, "energy of the curve"),
     (0.1, -0.2, "difference of means")],
)  # fmt: skip
def test_what_falls_short_is_a_claim_that_does_not_hold(experiment, curve, gap, missed):
    made = experiment.claims(rows(curve, 0.5, gap), experiment.Config(), "run")
    failed = [c["claim"] for c in made if not c["holds"]]
    assert failed and all(missed in claim for claim in failed if "neighbors (" not in claim)


def test_few_pairs_prove_nothing(experiment):
    """A sign test over four pairs cannot come below .01."""
    made = experiment.claims(rows(0.1, 0.5, 0.2, n=4), experiment.Config(), "run")
    assert not any(c["holds"] for c in made if "sign test" in c["claim"])


@pytest.mark.parametrize("name", ["weekdays", "months", "numbers", "sentiment"])
def test_prompts_end_with_the_value_and_no_walked_one_was_fitted_on(experiment, name):
    task = experiment.TASKS[name]
    assert len(set(task.said)) == len(task.values)
    fitted = [prompt for prompt, _ in task.prompts(experiment.LEADS)]
    for prompt, value in task.prompts(experiment.LEADS):
        assert value in prompt if task.frame else prompt.endswith(f"{value},")
    walked = experiment.held_out(task, 6)
    assert len(set(walked)) == 6 and not set(walked) & set(fitted)


def test_a_list_that_goes_around_is_followed_by_the_next_value(experiment):
    task = experiment.TASKS["weekdays"]
    assert task.said[task.values.index("Sunday")] == " Monday"
    ((prompt, _),) = [p for p in task.prompts(("",)) if p[1] == "Tuesday"]
    assert prompt.split(", ")[-3:] == ["Sunday", "Monday", "Tuesday,"]
    assert prompt.count("Tuesday") == 2


def test_pairs_are_drawn_where_there_are_too_many(experiment):
    task = experiment.TASKS["months"]
    assert len(experiment.pairs_of(task, 100, 0)) == 66
    drawn = experiment.pairs_of(task, 24, 0)
    assert len(set(drawn)) == 24 and drawn == experiment.pairs_of(task, 24, 0)


def test_outward_leads_on_from_the_end_away_from_the_mean(experiment):
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    path = experiment.ManifoldPath(
        points, torch.tensor([0.0, 1.0]), "spline", torch.zeros(2), torch.eye(2)
    )
    further = experiment.outward(path.resampled(5), 3.0)
    assert np.allclose(further.points[2], [0, 1]) and np.allclose(further.points[-1], [0, 3])
    assert np.allclose(further.points[:3], path.resampled(3).points)
