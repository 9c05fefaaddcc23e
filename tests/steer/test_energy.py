import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import jensenshannon
from scipy.stats import wilcoxon

from manifold_unlearn.steer.energy import (
    BehaviorCurve,
    bhattacharyya,
    bhattacharyya_angle,
    compare_paths,
    hellinger,
    path_energy,
)

RNG = np.random.default_rng(0)


def drawn(*shape, sharpness=1.0, seed=0):
    """Distributions over the last axis."""
    weights = np.random.default_rng(seed).gamma(1 / sharpness, size=shape) + 1e-9
    return weights / weights.sum(-1, keepdims=True)


def ring(n, n_outcomes=7, width=0.6):
    """Distributions that go once around a cycle of answers, a little of 'other' besides."""
    angle = 2 * np.pi * np.arange(n) / n
    centers = 2 * np.pi * np.arange(n_outcomes) / n_outcomes
    logits = np.cos(angle[:, None] - centers) / width
    p = np.exp(logits)
    return np.hstack([0.95 * p / p.sum(1, keepdims=True), np.full((n, 1), 0.05)])


# --- distances ------------------------------------------------------------------------------


def test_distances_are_those_of_their_formulas():
    p, q = drawn(20, 6), drawn(20, 6, seed=1)
    affinity = np.array([sum(math.sqrt(p[i, j] * q[i, j]) for j in range(6)) for i in range(20)])
    np.testing.assert_allclose(hellinger(p, q), np.sqrt(1 - affinity), rtol=1e-12)
    np.testing.assert_allclose(bhattacharyya(p, q), -np.log(affinity), rtol=1e-12)
    np.testing.assert_allclose(bhattacharyya_angle(p, q), np.arccos(affinity), rtol=1e-12)


def test_a_hand_computed_case():
    assert hellinger([1.0, 0.0], [0.5, 0.5]) == pytest.approx(math.sqrt(1 - math.sqrt(0.5)))
    assert bhattacharyya([1.0, 0.0], [0.25, 0.75]) == pytest.approx(math.log(2))
    assert bhattacharyya_angle([1.0, 0.0], [0.5, 0.5]) == pytest.approx(math.pi / 4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_distributions_are_at_zero_and_disjoint_ones_at_the_end_exactly(dtype):
    p = drawn(50, 9).astype(dtype)
    p[:, 4:] = 0
    p /= p.sum(1, keepdims=True)
    q = np.roll(p, 5, axis=1)
    for distance, end in (
        (hellinger, 1),
        (bhattacharyya, np.inf),
        (bhattacharyya_angle, np.pi / 2),
    ):
        same = distance(p, p)
        assert same.dtype == dtype
        assert (same == 0).all()
        assert (distance(p, q) == np.asarray(end, dtype)).all()


def test_near_distributions_keep_their_digits():
    p, step = drawn(8, 5), 1e-7
    way = np.roll(p, 1, axis=1) - p
    expected = step**2 * (way**2 / p).sum(1) / 8  # second order of -log sum sqrt(p (p + step way))
    np.testing.assert_allclose(bhattacharyya(p, p + step * way), expected, rtol=1e-3)  # 3rd order
    np.testing.assert_allclose(hellinger(p, p + step * way), np.sqrt(expected), rtol=1e-3)


def test_far_distributions_keep_their_digits():
    p, q = np.array([1 - 1e-14, 1e-14]), np.array([0.0, 1.0])
    assert bhattacharyya(p, q) == pytest.approx(-math.log(1e-7), rel=1e-9)


def test_they_broadcast_and_answer_in_the_kind_given():
    p, q = drawn(4, 3, 6), drawn(6, seed=2)
    assert hellinger(p, q).shape == (4, 3)
    found = hellinger(torch.tensor(p, dtype=torch.float32), q.astype(np.float32))
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), hellinger(p, q), rtol=2e-5)
    half = torch.tensor([0.25, 0.75], dtype=torch.bfloat16)
    assert hellinger(half, half).dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(arrays(np.float64, (3, 5), elements=st.floats(0, 1)))
def test_hellinger_and_the_angle_are_metrics_in_their_bounds(weights):
    weights = weights + 1e-3 * (weights.sum(1, keepdims=True) == 0)
    p, q, r = weights / weights.sum(1, keepdims=True)
    for distance, end in ((hellinger, 1), (bhattacharyya_angle, math.pi / 2)):
        pq, qr, pr = distance(p, q), distance(q, r), distance(p, r)
        assert 0 <= pq <= end
        assert pq == pytest.approx(distance(q, p))
        assert pr <= pq + qr + 1e-12


def test_hellinger_bounds_the_jensen_shannon_divergence():
    p, q = drawn(30, 8, sharpness=3), drawn(30, 8, sharpness=3, seed=1)
    squared = hellinger(p, q) ** 2
    divergence = jensenshannon(p, q, axis=1) ** 2
    assert (divergence >= squared * math.log(2) - 1e-12).all()  # Lin; Topsoe
    assert (divergence <= squared * 2 * math.log(2) + 1e-12).all()


@pytest.mark.parametrize(
    ("p", "words"),
    [
        ([0.5, 0.4], r"p sums to 0.9 at \[\]; distributions sum to 1. Add the probability of all"),
        ([1.5, -0.5], r"p holds -0.5 at \[1\]; probabilities are finite and not negative"),
        ([np.nan, 1.0], r"p holds nan at \[0\]"),
        (1.0, r"p has shape \(\); expected \(..., n_outcomes\)"),
        ([0.5, 0.25, 0.25], "p has 3 outcomes, q has 2; give the same"),
    ],
)
def test_what_is_no_distribution_is_refused(p, words):
    with pytest.raises(ValueError, match=words):
        hellinger(p, [0.5, 0.5])


def test_distributions_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match=r"p has shape \(2, 2\), q \(3, 2\); give as many"):
        bhattacharyya(np.full((2, 2), 0.5), np.full((3, 2), 0.5))


# --- the behavior manifold ------------------------------------------------------------------


def test_a_curve_passes_its_knots_and_stays_on_the_sphere():
    knots = ring(7)
    curve = BehaviorCurve.through(knots, periodic=True)
    np.testing.assert_allclose(np.linalg.norm(curve.points, axis=1), 1, atol=1e-12)
    assert (curve.points >= 0).all()
    parameter, distance = curve.nearest(np.sqrt(knots))
    assert distance.max() < 1e-15
    assert (np.diff(parameter) > 0).all()


def test_a_spline_through_few_knots_runs_where_the_ring_does():
    curve = BehaviorCurve.through(ring(14), periodic=True)
    off = curve.nearest(np.sqrt(ring(140)))[1]
    chords = curve.nearest(np.sqrt((ring(14) + np.roll(ring(14), 3, axis=0)) / 2))[1]
    assert off.max() < 2e-3
    assert chords.min() > 0.02


def test_the_parameters_are_those_given():
    knots = ring(8)[:5]
    curve = BehaviorCurve.through(knots, [0, 1, 2, 3, 4])
    parameter, _ = curve.nearest(np.sqrt(knots))
    np.testing.assert_allclose(parameter, [0, 1, 2, 3, 4], atol=1e-9)
    between = curve.nearest(curve.points[500:501])[0]
    np.testing.assert_allclose(between, curve.parameters[500], atol=1e-9)


def test_what_lies_between_two_points_of_a_polygon_counts():
    a, b = np.sqrt([0.6, 0.4, 0.0]), np.sqrt([0.4, 0.5, 0.1])
    curve = BehaviorCurve(np.stack([a, b]), np.array([0.0, 2.0]), joined=True)
    parameter, distance = curve.nearest((0.75 * a + 0.25 * b)[None])
    np.testing.assert_allclose([parameter[0], distance[0]], [0.5, 0], atol=1e-12)
    apart = BehaviorCurve(curve.points, curve.parameters, joined=False)
    assert apart.nearest((0.75 * a + 0.25 * b)[None])[1] > 0.02


def test_distributions_and_their_square_roots_are_the_same_references():
    p = ring(9)
    np.testing.assert_allclose(BehaviorCurve.of(p).points, BehaviorCurve.of(np.sqrt(p)).points)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BehaviorCurve.of(np.ones((3, 3))), "neither sum to 1.*row 0 sums to 3 and has"),
        (lambda: BehaviorCurve.of(np.ones(3) / 3), r"has shape \(3,\); expected \(n_points"),
        (lambda: BehaviorCurve.through(ring(2)), "2 knots and n_points=1000: a curve needs 3"),
        (lambda: BehaviorCurve.through(ring(5)[[0, 1, 1, 2]]), "knot 1 and the next are equal"),
        (lambda: BehaviorCurve.through(ring(4), [0, 1, 1, 2]), "give 4 that increase"),
        (lambda: BehaviorCurve.through(ring(4), [0, 1, 2, 3], periodic=True), "give 5 that"),
    ],
)
def test_what_is_no_behavior_manifold_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# --- the energy of a path -------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["hellinger", "bhattacharyya", "angle"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_path_on_the_manifold_has_no_energy(distance, dtype):
    points = ring(40).astype(dtype)
    energy = path_energy(points[5:20], points, distance=distance)
    assert (energy.distances == 0).all()
    assert energy.total == 0
    assert energy.nearest.tolist() == list(range(5, 20))


def test_the_energy_is_the_sum_of_the_distances_to_the_nearest_reference():
    outputs, references = drawn(12, 4, 6), drawn(25, 6, seed=3)
    energy = path_energy(torch.tensor(outputs), torch.tensor(references))
    expected = np.array(
        [[min(hellinger(p, q) for q in references) for p in row] for row in outputs]
    )
    np.testing.assert_allclose(energy.distances, expected, rtol=1e-9)
    np.testing.assert_allclose(energy.totals, expected.sum(0), rtol=1e-9)
    assert energy.total == pytest.approx(expected.sum(0).mean())
    assert energy.mean == pytest.approx(expected.mean())


def test_the_chord_through_the_middle_of_a_ring_costs_more_than_the_arc():
    manifold = BehaviorCurve.through(ring(7), periodic=True)
    arc = ring(700)[100:400]
    t = np.linspace(0, 1, 300)[:, None]
    chord = (1 - t) * arc[:1] + t * arc[-1:]
    on, off = path_energy(arc, manifold), path_energy(chord, manifold)
    assert on.total < 0.2 * off.total
    assert on.straightness < 0.9 < off.straightness


def test_any_object_with_nearest_is_a_manifold():
    class Corner:
        def nearest(self, X):
            return torch.zeros(len(X)), torch.linalg.norm(
                torch.tensor(X) - torch.tensor([1.0, 0.0]), dim=1
            )

    energy = path_energy([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], Corner())
    expected = [0, math.sqrt(1 - math.sqrt(0.5)), 1]
    np.testing.assert_allclose(energy.distances, expected, atol=1e-7)


def test_speed_and_straightness_of_the_output():
    angles = np.array([0.0, 0.1, 0.4, 0.5])
    energy = path_energy(np.stack([np.cos(angles) ** 2, np.sin(angles) ** 2], 1), np.eye(2))
    np.testing.assert_allclose(energy.steps, [0.1, 0.3, 0.1], atol=1e-12)
    assert energy.length == pytest.approx(0.5)
    assert energy.straightness == pytest.approx(1)
    assert energy.speed_variation == pytest.approx(np.std([1, 3, 1]) / np.mean([1, 3, 1]))
    there_and_back = np.array([0.0, 0.2, 0.1])
    energy = path_energy(
        np.stack([np.cos(there_and_back) ** 2, np.sin(there_and_back) ** 2], 1), np.eye(2)
    )
    assert energy.straightness == pytest.approx(1 / 3)


def test_an_output_that_does_not_move_has_numbers_too():
    energy = path_energy(np.tile(ring(5)[:1], (4, 1)), ring(5))
    assert (energy.length, energy.straightness, energy.speed_variation) == (0, 1, 0)


def test_the_mass_on_other_is_that_of_the_last_outcome():
    outputs = np.array([[[0.9, 0.1], [0.8, 0.2]], [[0.5, 0.5], [0.6, 0.4]]])
    energy = path_energy(outputs, np.eye(2))
    np.testing.assert_allclose(energy.other, outputs[..., 1])
    assert energy.peak_other == pytest.approx(0.45)


def test_energy_as_json_has_null_for_infinite_distances():
    energy = path_energy([[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0]], distance="bhattacharyya")
    said = json.loads(json.dumps(energy.to_json(), allow_nan=False))
    assert said["distances"][0] is None
    assert said["distances"][1] == pytest.approx(math.log(2) / 2)
    assert said["total"] is None


@pytest.mark.parametrize(
    ("distributions", "manifold", "options", "words"),
    [
        (ring(5)[0], ring(5), {}, r"has shape \(8,\); expected \(n_waypoints, n_outcomes\)"),
        (ring(5)[:1], ring(5), {}, "of 2 waypoints at least"),
        (ring(5), ring(5, 4), {}, "8 outcomes, the behavior manifold 5; give the same"),
        (2 * ring(5), ring(5), {}, "distributions sums to 2"),
        (ring(5), ring(5), {"distance": "kl"}, "distance='kl' is not one of 'hellinger'"),
    ],
)
def test_what_has_no_energy_is_refused(distributions, manifold, options, words):
    with pytest.raises(ValueError, match=words):
        path_energy(distributions, manifold, **options)


# --- comparison of paths --------------------------------------------------------------------


def test_the_sign_test_is_the_binomial_tail():
    a = np.arange(21.0)
    b = a + np.where(np.arange(21) < 19, 1, -1)
    found = compare_paths(a, b, alternative="less")
    tail = sum(math.comb(21, k) for k in range(3)) / 2**21
    assert (found.n_lower, found.n_higher, found.n_equal) == (19, 2, 0)
    assert found.p_value == pytest.approx(tail, rel=1e-12)
    assert compare_paths(a, b).p_value == pytest.approx(2 * tail, rel=1e-12)
    assert compare_paths(b, a, alternative="greater").p_value == pytest.approx(tail, rel=1e-12)
    assert wilcoxon(a, b, alternative="less").pvalue < 0.01  # another paired test agrees


def test_equal_pairs_are_left_out_of_the_test():
    found = compare_paths([1.0, 1, 1, 2], [1.0, 2, 2, 3])
    assert (found.n_pairs, found.n_equal) == (4, 1)
    assert found.p_value == pytest.approx(2 * 0.5**3)
    assert compare_paths([1.0, 2], [1.0, 2]).p_value == 1


def test_means_errors_and_ratio():
    a, b = RNG.gamma(2, size=30), 1 + RNG.gamma(2, size=30)
    found = compare_paths(torch.tensor(a), b)
    assert found.mean_a == pytest.approx(a.mean())
    assert found.error_b == pytest.approx(np.sqrt(np.var(b, ddof=1) / 30))
    assert found.ratio == pytest.approx(a.mean() / b.mean())
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["ratio"] == found.ratio
    assert compare_paths([1.0, 1], [0.0, 0]).to_json()["ratio"] is None


@pytest.mark.parametrize(
    ("a", "b", "options", "words"),
    [
        ([1.0, 2], [1.0, 2, 3], {}, r"shapes \(2,\) and \(3,\); give one a pair"),
        ([1.0], [1.0], {}, "of 2 pairs at least"),
        ([1.0, np.inf], [1.0, 2], {}, "of 1 pairs are not finite, the first is pair 1: inf"),
        ([1.0, 2], [2.0, 1], {"alternative": "lower"}, "alternative='lower' is not 'two-sided'"),
    ],
)
def test_energies_that_cannot_be_compared_are_refused(a, b, options, words):
    with pytest.raises(ValueError, match=words):
        compare_paths(a, b, **options)
