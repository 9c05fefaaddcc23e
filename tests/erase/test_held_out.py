import numpy as np
import pytest
import torch

from manifold_unlearn.erase.folds import N_FOLDS, Rows, deal
from manifold_unlearn.erase.held_out import fit_kernel, fit_linear
from manifold_unlearn.erase.landmark_labels import SHARED, choose

FORGET_LINES, LINES = 3, 7


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(140, 3))
    line = np.arange(140) % LINES
    X[line < FORGET_LINES, 0] += 1.5
    return Rows(torch.from_numpy(X), torch.from_numpy(line), FORGET_LINES, LINES)


def fit(rows, *, time=1, nearest=False, n_neighbors=10, n_landmarks=10**6, at=None):
    """The fit, and the scores of its candidates in the order in which they were asked about."""
    seen = []

    def quality(scores):
        seen.append(scores)
        return -len(seen) if at is None else len(seen) == at + 1

    scored = fit_kernel(
        rows,
        n_landmarks=n_landmarks,
        n_neighbors=n_neighbors,
        diffusion_time=time,
        nearest=nearest,
        quality=quality,
        random_state=0,
    )
    return scored, seen


def kernel(A, B, bandwidth):
    return np.exp(-((A[:, None] - B) ** 2).sum(-1) / (4 * bandwidth))


def ratio_by_hand(known, forget, asked, ratio, time):
    """Log ratio at ``asked`` of a fit on ``known`` alone, with all rows as landmarks.

    Without diffusion a landmark counts what it does among all rows: 60 are forget and 80 retain.
    """
    bandwidth, background = ratio.bandwidth, ratio.background
    K = kernel(known, known, bandwidth)
    if time == 0:
        to_forget, to_retain = forget * 1.0, ~forget * 60 / 80
    else:
        f, r = K[:, forget].mean(1), K[:, ~forget].mean(1)
        share = f / (f + r)
        for _ in range(time - 1):
            share = K @ share / K.sum(1)
        to_forget, to_retain = share, 1 - share
    reach = kernel(asked, known, bandwidth)
    return np.log((reach @ to_forget + background) / (reach @ to_retain + background))


@pytest.mark.parametrize("time", [0, 1, 2, 3])
def test_a_row_is_scored_as_by_a_fit_without_its_line(rows, time):
    scored, _ = fit(rows, time=time, at=6)
    ratio, X, line = scored.ratio, rows.values.numpy(), rows.line.numpy()
    for k in range(LINES):
        kept = line != k
        expected = ratio_by_hand(X[kept], line[kept] < FORGET_LINES, X[~kept], ratio, time)
        found = scored.held_out.numpy()[~kept]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("time", [0, 1, 2])
def test_new_rows_are_scored_by_the_fit_on_all(rows, time):
    scored, _ = fit(rows, time=time, at=5)
    asked = np.random.default_rng(1).normal(size=(20, 3))
    expected = ratio_by_hand(rows.values.numpy(), rows.forget.numpy(), asked, scored.ratio, time)
    np.testing.assert_allclose(scored.ratio(torch.from_numpy(asked)), expected, atol=1e-8)


def test_the_best_candidate_is_taken(rows):
    first, seen = fit(rows)
    assert torch.equal(first.held_out, seen[0])
    for at in (3, len(seen) - 1):
        taken, again = fit(rows, at=at)
        assert torch.equal(taken.held_out, again[at])
    assert len({(s[0].item(), s[1].item()) for s in seen}) == len(seen)


def test_nearest_landmarks_vote_by_inverse_squared_distance(rows):
    scored, _ = fit(rows, nearest=True, n_neighbors=6, at=2)
    ratio, X, line = scored.ratio, rows.values.numpy(), rows.line.numpy()
    assert ratio.n_neighbors == 6
    forget = line < FORGET_LINES
    least = min(forget.sum(), (~forget).sum())
    count = np.where(forget, least / forget.sum(), least / (~forget).sum())
    for i in range(0, 140, 9):
        squared = ((X - X[i]) ** 2).sum(1)
        squared[line == line[i]] = np.inf
        near = squared.argsort()[:6]
        vote = count[near] * ratio.bandwidth / (ratio.bandwidth + squared[near])
        f, r = vote[forget[near]].sum(), vote[~forget[near]].sum()
        expected = np.log((f + ratio.background) / (r + ratio.background))
        assert scored.held_out[i] == pytest.approx(expected)


def test_linear_scores_are_those_of_fits_without_the_line(rows):
    scored = fit_linear(rows)
    for k in (0, 5):
        kept = rows.line != k
        line = torch.unique(rows.line[kept], return_inverse=True)[1]
        n_forget = FORGET_LINES - (k < FORGET_LINES)
        alone = fit_linear(Rows(rows.values[kept], line, n_forget, LINES - 1)).ratio
        torch.testing.assert_close(alone(rows.values[~kept]), scored.held_out[~kept])
        assert not torch.allclose(scored.ratio(rows.values[~kept]), scored.held_out[~kept])


def test_rows_of_one_unit_share_a_fold_and_folds_are_even():
    unit = torch.arange(1000) // 5 * 3 - 40
    fold = deal(unit, 0)
    assert all(len(fold[unit == u].unique()) == 1 for u in unit.unique())
    counts = torch.bincount(fold)
    assert len(counts) == N_FOLDS
    assert counts.max() - counts.min() <= 5
    assert deal(torch.tensor([9, 4, 9])).sort().values.unique().tolist() == [0, 1]


def test_landmarks_are_distinct_rows_half_of_each_class(rows):
    doubled = rows._replace(values=rows.values.repeat(2, 1), line=rows.line.repeat(2))
    marks = choose(doubled, 40, 0)
    assert len(torch.unique(marks.values, dim=0)) == 40
    assert int(marks.forget.sum()) == 20
    few = choose(rows, 138, 0)  # there are 60 forget rows
    assert (int(few.forget.sum()), len(few.forget)) == (60, 138)
    torch.testing.assert_close(few.scale[few.forget].sum(), few.scale[~few.forget].sum())


def test_a_landmark_of_several_lines_is_left_out_with_none(rows):
    values = rows.values.clone()
    values[7:14] = values[0]  # one row of every line
    marks = choose(rows._replace(values=values), 200, 0)
    twin = (marks.values == values[0]).all(1)
    assert marks.line[twin].tolist() == [SHARED, SHARED]  # one a class
    assert (marks.line[~twin] >= 0).all()


def test_more_neighbors_than_landmarks_are_clamped(rows):
    with pytest.warns(UserWarning, match="n_neighbors=500 is above the other landmarks, 139"):
        fit(rows, n_neighbors=500)


def test_rows_that_all_coincide_are_refused(rows):
    same = rows._replace(values=torch.ones_like(rows.values))
    with pytest.raises(ValueError, match="rows of both classes coincide"):
        fit(same, n_neighbors=1)
