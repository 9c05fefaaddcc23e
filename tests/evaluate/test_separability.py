import numpy as np
import pytest
import torch

from manifold_unlearn.evaluate.separability import linear_separability, separability_by_position


def rows(n_groups=40, per_group=3, width=6, shift=0.0, spread=0.0, seed=0):
    """Rows in groups, every other group forget; ``spread`` is what a group's rows share."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_groups), per_group)
    is_forget = groups % 2 == 0
    X = rng.normal(size=(len(groups), width)) + spread * rng.normal(size=(n_groups, width))[groups]
    X[:, 0] += shift * is_forget
    return torch.tensor(X), torch.tensor(is_forget), torch.tensor(groups)


def test_classes_far_apart_are_told_apart_without_error():
    assert linear_separability(*rows(shift=20)) == 1.0


def test_classes_that_are_alike_are_told_apart_by_chance():
    found = [linear_separability(*rows(seed=seed)) for seed in range(8)]
    assert abs(np.mean(found) - 0.5) < 0.06  # eight areas of standard error .05 each


def test_the_area_is_that_of_two_shifted_normals():
    X, is_forget, _ = rows(n_groups=900, per_group=1, width=2, shift=1.0)
    area = linear_separability(X, is_forget, torch.arange(900))
    assert area == pytest.approx(0.760, abs=0.035)  # Phi(1 / sqrt 2), two standard errors


def test_rows_of_one_group_stay_on_one_side_of_the_split():
    X, is_forget, groups = rows(n_groups=30, per_group=8, width=60, spread=20)
    assert linear_separability(X, is_forget, torch.arange(len(groups))) > 0.95  # leaks
    assert linear_separability(X, is_forget, groups) < 0.75


def test_the_same_seed_gives_the_same_area_and_another_another():
    made = rows(shift=0.5)
    first = linear_separability(*made, random_state=0)
    assert first == linear_separability(*made, random_state=0)
    assert first != linear_separability(*made, random_state=1)


def test_too_few_groups_of_a_class_give_nan():
    X, is_forget, groups = rows(n_groups=4, shift=20)
    assert np.isnan(linear_separability(X, is_forget, groups))
    assert linear_separability(X, is_forget, groups, n_splits=2) == 1.0


def test_half_precision_rows_are_told_apart_too():
    X, is_forget, groups = rows(shift=20)
    assert linear_separability(X.bfloat16(), is_forget, groups) == 1.0


def test_each_position_is_judged_by_its_own_rows():
    X, is_forget, groups = rows(n_groups=60, per_group=4)
    from_end = torch.arange(4).repeat(60)
    X[:, 1] += 20 * (is_forget & (from_end == 2))
    areas = separability_by_position(X, from_end, is_forget, groups)
    assert areas[2] == 1.0
    assert max(areas[0], areas[1], areas[3]) < 0.8


def test_rows_before_position_zero_are_left_out():
    X, is_forget, groups = rows(n_groups=60, per_group=4, shift=20)
    from_end = torch.arange(4).repeat(60) - 2
    X[from_end < 0] = float("nan")  # would be an error if read
    assert separability_by_position(X, from_end, is_forget, groups, n_positions=2) == [1.0, 1.0]


def test_a_position_that_no_text_has_gives_nan():
    X, is_forget, groups = rows(shift=20)
    areas = separability_by_position(X, torch.zeros(len(X)), is_forget, groups, n_positions=2)
    assert areas[0] == 1.0
    assert np.isnan(areas[1])


def in_wordings(n_groups=60, seed=0):
    """Two rows a group, of wording 0 and 1; a wording of forget rows has a mark of its own."""
    X, is_forget, groups = rows(n_groups=n_groups, per_group=2, seed=seed)
    wordings = torch.arange(2).repeat(n_groups)
    for wording in (0, 1):
        X[:, 1 + wording] += 20 * (is_forget & (wordings == wording))
    return X, is_forget, groups, wordings


def test_marks_of_a_wording_are_not_taken_for_the_topic():
    X, is_forget, groups, wordings = in_wordings()
    assert linear_separability(X, is_forget, groups) == 1.0
    found = [linear_separability(*in_wordings(seed=seed)) for seed in range(8)]
    assert abs(np.mean(found) - 0.5) < 0.1


def test_a_topic_that_shows_in_every_wording_is_found_across_them():
    X, is_forget, groups, wordings = in_wordings()
    X[:, 0] += 200 * is_forget
    assert linear_separability(X, is_forget, groups, wordings) > 0.99


def test_one_wording_alone_leaves_nothing_to_test_on():
    X, is_forget, groups = rows(shift=20)
    assert np.isnan(linear_separability(X, is_forget, groups, torch.zeros(len(X))))


def test_positions_are_judged_across_wordings_too():
    X, is_forget, groups, wordings = in_wordings()
    position = torch.zeros(len(X))
    across = separability_by_position(X, position, is_forget, groups, wordings, n_positions=1)
    assert across == [linear_separability(X, is_forget, groups, wordings)]
    assert across != separability_by_position(X, position, is_forget, groups, n_positions=1)
