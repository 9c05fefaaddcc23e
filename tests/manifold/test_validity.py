import numpy as np
import pytest
import torch

from manifold_unlearn.manifold import samples
from manifold_unlearn.manifold.validity import check_manifold

RANDOM = np.random.default_rng
CURVED = {
    "circle": lambda n: samples.circle(n, n_features=12, noise=0.03, random_state=0).points,
    "sphere": lambda n: samples.sphere(n, n_features=12, noise=0.02, random_state=0).points,
    "roll": lambda n: samples.swiss_roll(n, n_features=12, noise=0.1, random_state=0).points,
    "torus": lambda n: samples.flat_torus(n, n_features=12, noise=0.02, random_state=0).points,
}
PLAIN = {
    "gaussian": lambda seed: RANDOM(seed).standard_normal((150, 6)),
    "power law": lambda seed: RANDOM(seed).standard_normal((150, 30)) / np.arange(1, 31),
    "subspace": lambda seed: (
        samples.linear_subspace(
            150, dimension=3, n_features=10, noise=0.02, random_state=seed
        ).points
    ),
}


@pytest.mark.parametrize("name", CURVED)
def test_curved_manifolds_are_accepted(name):
    report = check_manifold(CURVED[name](600), n_null=19)
    assert report.is_manifold
    assert report.verdict == "manifold"
    assert max(report.p_gaussian, report.p_linear) <= 0.05
    assert report.misfit_ratio < 0.5


@pytest.mark.parametrize("name", PLAIN)
def test_gaussian_and_linear_data_are_rejected_at_the_level_stated(name):
    reports = [check_manifold(PLAIN[name](s), n_null=19, random_state=s) for s in range(12)]
    assert sum(report.is_manifold for report in reports) <= 1  # at level .05, of 12
    assert sum(report.p_gaussian <= 0.05 for report in reports) <= 3
    assert sum(report.p_linear <= 0.05 for report in reports) <= 3
    assert np.mean([report.p_gaussian for report in reports]) > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_the_level_holds_over_a_hundred_seeds(name):
    seeds = range(100, 200)
    reports = [check_manifold(PLAIN[name](s), n_null=19, random_state=s) for s in seeds]
    assert np.mean([report.is_manifold for report in reports]) <= 0.08
    assert np.mean([report.p_gaussian <= 0.05 for report in reports]) <= 0.12
    assert np.mean([report.p_linear <= 0.05 for report in reports]) <= 0.12


@pytest.mark.parametrize("spread", [4.0, 1.0])
def test_overlapping_clusters_are_no_manifold(spread):
    random = RANDOM(0)
    centers = spread * random.standard_normal((5, 6))
    X = centers[random.integers(5, size=400)] + random.standard_normal((400, 6))
    assert not check_manifold(X, n_null=19).is_manifold


def test_clusters_are_no_manifold():
    random = RANDOM(0)
    centers = 4 * random.standard_normal((4, 8))
    X = centers[random.integers(4, size=400)] + random.standard_normal((400, 8))
    report = check_manifold(X, n_null=19)
    assert not report.is_manifold
    assert report.verdict in ("clusters", "no structure")


def test_the_report_says_what_it_found_and_repeats():
    X = CURVED["circle"](300)
    report = check_manifold(X, n_null=19, random_state=3)
    assert report == check_manifold(X, n_null=19, random_state=3)
    assert report == check_manifold(torch.from_numpy(X), n_null=19, random_state=3)
    assert str(report).startswith("manifold: charts of dimension")
    assert report.chart_dimension == 1
    assert report.distortion > 1.2
    assert report.linear_dimension == pytest.approx(2, abs=0.3)


@pytest.mark.parametrize(
    "X",
    [
        np.outer(RANDOM(0).standard_normal(100), np.ones(5)),
        RANDOM(0).standard_normal((60, 200)),
        np.concatenate([RANDOM(0).standard_normal((100, 4)), np.full((1, 4), 1e6)]),
        np.repeat(RANDOM(0).standard_normal((60, 4)), 2, axis=0),
    ],
    ids=["rank one", "d > n", "outlier", "duplicates"],
)
def test_awkward_data_are_no_manifold(X):
    report = check_manifold(X, n_null=19)
    assert not report.is_manifold
    assert np.isfinite([report.dimension, report.distortion, report.misfit_ratio]).all()


@pytest.mark.parametrize(
    ("X", "options", "message"),
    [
        (np.ones((50, 3)), {}, "X has 1 distinct rows; at least 40"),
        (RANDOM(0).standard_normal((30, 3)), {}, "X has 30 distinct rows"),
        (np.full((50, 3), np.nan), {}, "NaN or infinity"),
        (RANDOM(0).standard_normal((60, 3)), {"n_null": 9}, "n_null=9 draws cannot reject"),
        (RANDOM(0).standard_normal((60, 3)), {"level": 0.0}, "level=0.0 must lie"),
        (RANDOM(0).standard_normal((60, 3)), {"max_samples": 5}, "max_samples=5"),
    ],
)
def test_impossible_requests_are_refused(X, options, message):
    with pytest.raises(ValueError, match=message):
        check_manifold(X, **options)
