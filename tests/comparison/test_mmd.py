import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_unlearn.comparison.mmd import median_squared_distance, mmd


def gaussian_kernel_mean(mean, covariance, bandwidth):
    """``E exp(-|x|**2 / (4 eps))`` of x normal with this mean and covariance."""
    wide = covariance + 2 * bandwidth * np.eye(len(mean))
    volume = np.sqrt(np.linalg.det(wide / (2 * bandwidth)))
    return np.exp(-0.5 * mean @ np.linalg.solve(wide, mean)) / volume


def exact_mmd(shift, first, second, bandwidth):
    zero = np.zeros(len(shift))
    return (
        gaussian_kernel_mean(zero, 2 * first, bandwidth)
        + gaussian_kernel_mean(zero, 2 * second, bandwidth)
        - 2 * gaussian_kernel_mean(shift, first + second, bandwidth)
    )


def direct(A, B, bandwidth, biased):
    def kernel(X, Y):
        return np.exp(-((X[:, None] - Y[None]) ** 2).sum(-1) / (4 * bandwidth))

    aa, bb, ab = kernel(A, A), kernel(B, B), kernel(A, B)
    if biased:
        return aa.mean() + bb.mean() - 2 * ab.mean()
    m, n = len(A), len(B)
    aa, bb = aa.sum() - m, bb.sum() - n
    return aa / (m * (m - 1)) + bb / (n * (n - 1)) - 2 * ab.mean()


@pytest.mark.parametrize("bandwidth", [0.5, 4.0])
def test_two_gaussians_have_the_mmd_of_the_formula(bandwidth):
    rng = np.random.default_rng(0)
    shift, first = np.array([0.5, 0, -0.3]), np.diag([1.0, 0.5, 2.0])
    second = np.array([[1.0, 0.4, 0], [0.4, 1.0, 0], [0, 0, 0.2]])
    truth = exact_mmd(shift, first, second, bandwidth)
    estimates = [
        mmd(
            rng.multivariate_normal(shift, first, 400),
            rng.multivariate_normal(np.zeros(3), second, 300),
            bandwidth=bandwidth,
            n_permutations=0,
        ).squared
        for _ in range(40)
    ]
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - truth) < 3 * error  # unbiased
    assert error < 0.1 * truth
    linear = mmd(
        rng.multivariate_normal(shift, first, 40_000),
        rng.multivariate_normal(np.zeros(3), second, 40_000),
        bandwidth=bandwidth,
        estimator="linear",
    )
    assert linear.squared == pytest.approx(truth, rel=0.15)


RNG = np.random.default_rng(7)
A, B = RNG.standard_normal((90, 5)), 0.3 + RNG.standard_normal((70, 5))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("block", [9, 32, 1000])
def test_blocks_give_the_direct_sum(biased, block):
    estimator = "biased" if biased else "unbiased"
    found = mmd(A, B, bandwidth=2.0, estimator=estimator, block=block, n_permutations=9)
    assert found.squared == pytest.approx(direct(A, B, 2.0, biased), abs=1e-12)
    assert found.floor == pytest.approx(
        mmd(A, B, bandwidth=2.0, estimator=estimator, n_permutations=9).floor, abs=1e-12
    )


def test_multiscale_is_the_mean_over_its_bandwidths():
    middle = median_squared_distance(torch.tensor(np.r_[A, B])) / 4
    found = mmd(A, B, bandwidth="multiscale", n_permutations=0)
    scales = [direct(A, B, middle * 2.0**power, False) for power in (-2, -1, 0, 1, 2)]
    assert found.bandwidth == pytest.approx(middle)
    assert found.squared == pytest.approx(np.mean(scales), abs=1e-12)


def test_median_bandwidth_is_the_median_of_the_pooled_pairs():
    pooled = np.r_[A, B]
    squared = ((pooled[:, None] - pooled[None]) ** 2).sum(-1)[np.triu_indices(160, 1)]
    assert mmd(A, B, n_permutations=0).bandwidth == pytest.approx(np.sort(squared)[6359] / 4)


@pytest.mark.parametrize("estimator", ["unbiased", "linear"])
def test_level_holds_under_the_null_and_a_shift_is_seen(estimator):
    rng = np.random.default_rng(1)
    size = 50 if estimator == "unbiased" else 400
    null, shifted = [], []
    for seed in range(150):
        X, Y = rng.standard_normal((size, 3)), rng.standard_normal((size, 3))
        options = {"estimator": estimator, "n_permutations": 60, "random_state": seed}
        null.append(mmd(X, Y, **options).p_value)
        if seed < 30:
            shifted.append(mmd(X, Y + 0.8, **options).p_value)
    assert 0.01 <= np.mean(np.array(null) <= 0.05) <= 0.10  # 0.05 and three deviations of 0.018
    assert 0.4 <= np.mean(null) <= 0.6
    assert np.mean(np.array(shifted) <= 0.05) > 0.9


def test_floor_is_what_chance_gives():
    rng = np.random.default_rng(2)
    pairs = [mmd(*rng.standard_normal((2, 80, 4)), n_permutations=80) for _ in range(60)]
    above = np.mean([found.squared > found.floor for found in pairs])
    assert 0 < above < 0.15
    far = mmd(A, B + 5)
    assert far.squared > 20 * far.floor
    assert far.distance == pytest.approx(far.squared**0.5)
    assert min(found.distance for found in pairs) == 0.0


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e6]), st.floats(-1e3, 1e3))
def test_rotation_translation_and_scale_change_nothing(seed, scale, shift):
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    moved = [scale * (X @ rotation + shift) for X in (A, B)]
    plain, after = mmd(A, B, n_permutations=20), mmd(*moved, n_permutations=20)
    assert after.squared == pytest.approx(plain.squared, abs=1e-8)
    assert after.p_value == plain.p_value
    assert after.bandwidth == pytest.approx(plain.bandwidth * scale**2, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors_of_any_float_dtype(dtype):
    found = mmd(torch.tensor(A, dtype=dtype), torch.tensor(B, dtype=dtype), n_permutations=0)
    assert found.squared == pytest.approx(mmd(A, B, n_permutations=0).squared, abs=2e-3)


def test_large_data_in_single_precision_agree_with_double():
    rng = np.random.default_rng(3)
    X, Y = rng.standard_normal((900, 3200)), 1.02 * rng.standard_normal((900, 3200))
    found = mmd(X, Y, bandwidth=1600.0, n_permutations=0)
    assert found.squared == pytest.approx(direct_by_gram(X, Y, 1600.0), abs=2e-7)


def direct_by_gram(X, Y, bandwidth):
    def total(P, Q):
        squared = (P**2).sum(1)[:, None] + (Q**2).sum(1) - 2 * P @ Q.T
        return np.exp(-squared / (4 * bandwidth)).sum()

    n = len(X)
    within = total(X, X) + total(Y, Y) - 2 * n
    return within / (n * (n - 1)) - 2 * total(X, Y) / n**2


@pytest.mark.parametrize(
    ("X", "Y"),
    [
        (np.repeat(A, 2, axis=0), B),
        (np.r_[A, np.full((1, 5), 1e6)], B),
        (np.c_[A, np.ones(90)], np.c_[B, np.ones(70)]),
        (np.zeros((40, 3)), np.ones((40, 3))),
        (np.r_[np.zeros((50, 2)), np.ones((5, 2))], np.zeros((50, 2))),
        (RNG.standard_normal((10, 300)), RNG.standard_normal((10, 300))),
    ],
    ids=["pairs", "outlier", "constant column", "two points", "mostly one point", "d > n"],
)
@pytest.mark.parametrize("estimator", ["unbiased", "biased", "linear"])
def test_degenerate_data_give_finite_answers(X, Y, estimator):
    found = mmd(X, Y, estimator=estimator, n_permutations=20)
    assert np.isfinite([found.squared, found.p_value, found.floor]).all()


def test_equal_points_apart_are_told_apart():
    assert mmd(np.zeros((40, 3)), np.ones((40, 3)), n_permutations=99).p_value == 0.01


@pytest.mark.parametrize(
    ("X", "Y", "options", "message"),
    [
        (np.ones((9, 2)), np.ones((9, 2)), {}, "all 18 samples are equal"),
        (A, B[:, :3], {}, "A has 5 features, B has 3: they lie in different spaces"),
        (A[:1], B, {}, "minimum of 2"),
        (A, B[:3], {"estimator": "linear"}, "minimum of 4"),
        (A, np.where(np.eye(70, 5) > 0, np.nan, B), {}, "B contains NaN or infinity: 5 of 70"),
        (A, B, {"bandwidth": 0.0}, "bandwidth=0.0 must be positive"),
        (A, B, {"bandwidth": "mean"}, "bandwidth='mean' is not known"),
        (A, B, {"estimator": "cubic"}, "estimator='cubic' is not known"),
        (A, B, {"n_permutations": -1}, "n_permutations=-1 must not be negative"),
    ],
)
def test_impossible_requests_are_refused(X, Y, options, message):
    with pytest.raises(ValueError, match=message):
        mmd(X, Y, **options)
