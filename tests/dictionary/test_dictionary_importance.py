import json

import numpy as np
import pytest
import torch

from manifold_unlearn.dictionary import SparseCode
from manifold_unlearn.dictionary.importance import (
    SCORES,
    latent_importance,
    latent_statistics,
)
from manifold_unlearn.dictionary.spanning import spanning_latents

S = 0.5


def activity(frequency, n, seed, strength=1.0):
    random = np.random.default_rng(seed)
    fires = random.uniform(size=(n, len(frequency))) < frequency
    return fires * random.uniform(0.5, 1.5, fires.shape) * strength


FORGET = np.array([0.30, 0.05, 0.20, 0.0, 0.02, 0.20])
RETAIN = np.array([0.01, 0.05, 0.30, 0.0, 0.20, 0.20])


@pytest.fixture(scope="module")
def sides():
    forget = activity(FORGET, 3000, 0)
    forget[:, 5] *= 4  # as often, but stronger
    return forget, activity(RETAIN, 5000, 1)


@pytest.fixture(scope="module")
def importance(sides):
    decoder = np.ones((6, 4)) / 2
    decoder[2] *= 10
    return latent_importance(*sides, decoder)


def test_figures_are_those_of_the_formulas(sides, importance):
    forget, retain = sides
    a, n = (forget != 0).sum(0), len(forget)
    b, m = (retain != 0).sum(0), len(retain)
    odds = np.log((a + S) / (n - a + S)) - np.log((b + S) / (m - b + S))
    error = np.sqrt(1 / (a + S) + 1 / (n - a + S) + 1 / (b + S) + 1 / (m - b + S))
    np.testing.assert_allclose(importance.log_odds, odds)
    np.testing.assert_allclose(importance.z, odds / error)
    np.testing.assert_allclose(
        importance.frequency_ratio, ((a + S) / (n + 1)) / ((b + S) / (m + 1))
    )
    np.testing.assert_allclose(importance.frequency_difference, a / n - b / m)
    live = a + b > 0
    strength = (forget.sum(0) + retain.sum(0))[live] / (a + b)[live]
    ratio = ((forget.sum(0)[live] + S * strength) / n) / ((retain.sum(0)[live] + S * strength) / m)
    np.testing.assert_allclose(importance.mean_ratio[live], ratio)
    norms = np.array([1, 1, 10, 1, 1, 1])
    np.testing.assert_allclose(
        importance.contribution, (forget.mean(0) - retain.mean(0)) * norms, atol=1e-12
    )
    json.dumps(importance.to_json(), allow_nan=False)


def test_what_fires_on_forget_rows_leads_and_what_never_fires_is_neutral(importance):
    assert importance.top(1).tolist() == [0]
    assert importance.top()[-1] == 4
    assert 3 not in importance.top()  # never fires
    assert 3 in importance.top(min_count=0)
    assert importance.mean_ratio[3] == importance.contribution_ratio[3] == 1
    assert abs(importance.z[1]) < 3
    assert importance.z[0] > 10
    assert importance.top(1, by="mean_ratio").tolist() == [0]
    assert importance.mean_ratio[5] > 3  # strength counts where frequency is blind
    assert abs(importance.log_odds[5]) < 0.2
    assert set(importance.top(max_retain_frequency=0.06)) == {0, 1}
    for by in SCORES:
        order = getattr(importance, by)[importance.top(by=by)]
        assert (np.diff(order) <= 0).all()


def test_decoder_lengths_weight_contributions(sides, importance):
    even = latent_importance(*sides)
    assert importance.contribution[2] == pytest.approx(10 * even.contribution[2])
    assert importance.log_odds == pytest.approx(even.log_odds)


def test_blocks_codes_and_signs_give_the_same_statistics(sides):
    forget, _ = sides
    whole = latent_statistics(forget)
    code = SparseCode.of(torch.from_numpy(-forget))
    parts = latent_statistics(SparseCode.of(torch.from_numpy(p)) for p in np.split(forget, 4))
    for other in (latent_statistics(code), parts):
        assert other.n_rows == whole.n_rows
        np.testing.assert_array_equal(other.count, whole.count)
        np.testing.assert_allclose(other.square, whole.square)
    np.testing.assert_allclose(whole.mean, forget.mean(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: latent_statistics([]), "codes has no rows"),
        (lambda: latent_statistics([np.ones((1, 2)), np.ones((1, 3))]), "a block has 3 latents"),
        (lambda: latent_importance(np.ones((2, 2)), np.ones((2, 3))), "retain 3, the decoder 2"),
        (lambda: latent_importance(np.ones((2, 2)), np.ones((2, 2)), np.ones((3, 2))), "decoder 3"),
        (lambda: latent_importance(np.ones((2, 2)), np.ones((2, 2)), smoothing=0), "smoothing=0"),
        (
            lambda: latent_importance(np.ones((2, 2)), np.ones((2, 2))).top(by="luck"),
            "by='luck' is not one of",
        ),
    ],
)
def test_importance_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Spanning a subspace

PLANTED = [7, 40, 133]


@pytest.fixture(scope="module")
def decoder():
    return np.random.default_rng(0).normal(size=(200, 64)) * 3


def mixed(decoder, latents, seed=1):
    """Directions that span what the latents span, none of them a decoder row."""
    return np.random.default_rng(seed).normal(size=(len(latents), len(latents))) @ decoder[latents]


def held(decoder, latents, basis):
    """Mean squared cosine of the principal angles, from projections in numpy."""
    Q = np.linalg.qr(basis.T)[0]
    S_ = np.linalg.qr(decoder[latents].T)[0]
    return np.linalg.norm(S_.T @ Q) ** 2 / Q.shape[1]


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_a_subspace_spanned_by_three_latents_gives_them_back(decoder, kind):
    found = spanning_latents(kind(decoder), kind(mixed(decoder, PLANTED)), 3)
    assert sorted(found.latents.tolist()) == PLANTED
    assert found.captured[-1] == pytest.approx(1)
    assert found.angles == pytest.approx(np.zeros(3), abs=1e-6)
    assert found.enough(0.99) == 3
    assert found.random_latents[:, -1].mean() < 0.15
    assert found.random_subspaces[:, -1].max() < 0.5
    json.dumps(found.to_json())


def test_the_curve_of_what_is_captured_is_that_of_projections(decoder):
    basis = np.random.default_rng(2).normal(size=(4, 64))
    found = spanning_latents(decoder, basis, 12)
    expected = [held(decoder, found.latents[: i + 1], basis) for i in range(12)]
    np.testing.assert_allclose(found.captured, expected, atol=1e-10)
    Q, S_ = (np.linalg.qr(rows.T)[0] for rows in (basis, decoder[found.latents]))
    cosines = np.linalg.svd(Q.T @ S_, compute_uv=False)
    np.testing.assert_allclose(found.angles, np.arccos(cosines), atol=1e-7)
    units = decoder[found.latents] / np.linalg.norm(decoder[found.latents], axis=1, keepdims=True)
    rebuilt = found.coefficients @ units
    assert np.linalg.norm(rebuilt) ** 2 / 4 == pytest.approx(found.captured[-1])
    first = held(decoder, [int(found.latents[0])], basis)
    assert first == pytest.approx(max(held(decoder, [i], basis) for i in range(200)))


def test_a_random_subspace_is_captured_no_better_than_its_controls(decoder):
    basis = np.random.default_rng(3).normal(size=(3, 64))
    found = spanning_latents(decoder, basis, 5, n_controls=40)
    low, high = np.quantile(found.random_subspaces[:, -1], [0.01, 0.99])
    assert low - 0.02 < found.captured[-1] < high + 0.02
    assert found.captured[-1] > found.random_latents[:, -1].max()


def test_candidates_bound_the_choice_and_dependent_rows_end_it(decoder):
    basis = mixed(decoder, PLANTED)
    found = spanning_latents(decoder, basis, 3, candidates=[7, 40, 1, 2])
    assert {7, 40} < set(found.latents.tolist()) <= {7, 40, 1, 2}
    assert found.captured[-1] < 0.9
    twice = np.concatenate([decoder[:3], 2 * decoder[:3], np.zeros((1, 64))])
    found = spanning_latents(twice, basis, 7)
    assert len(found.latents) == 3
    assert found.enough() is None
    assert found.angles.shape == (3,)
    few = spanning_latents(decoder, basis, 1)
    assert few.angles[1:] == pytest.approx(np.full(2, np.pi / 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"basis": np.ones((1, 5))}, "basis has 5 columns, the decoder 64"),
        ({"basis": np.zeros((2, 64))}, "all rows of basis are 0"),
        ({"n_latents": 0}, "n_latents=0"),
        ({"candidates": [500]}, "latent 500 is not among the 200"),
        ({"decoder": np.zeros((3, 64))}, "no candidate has a decoder direction"),
    ],
)
def test_spanning_latents_rejects(decoder, change, message):
    given = {"decoder": decoder, "basis": np.ones((1, 64)), "n_latents": 2} | change
    with pytest.raises(ValueError, match=message):
        spanning_latents(**given)
