import json
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_unlearn.comparison import compare
from manifold_unlearn.comparison.compare import ManifoldComparison, compare_manifolds
from manifold_unlearn.comparison.hausdorff import hausdorff_distance
from manifold_unlearn.comparison.mmd import mmd
from manifold_unlearn.comparison.similarity import (
    cka,
    mutual_knn,
    procrustes_distance,
    representational_similarity,
)
from manifold_unlearn.comparison.subspaces import grassmann_distance, principal_angles
from manifold_unlearn.manifold import samples

DISTANCES = ["principal_angles", "grassmann_distance", "hausdorff_distance", "hausdorff_quantile"]
PAIRED = ["cka", "cka_rbf", "mutual_knn", "rsa", "procrustes_distance"]
ALL = [*DISTANCES, "mmd", *PAIRED, "gromov_wasserstein"]

SPHERE = samples.sphere(240, n_features=12, random_state=0).points
RNG = np.random.default_rng(0)
FAR = 1.5 * SPHERE @ np.linalg.qr(RNG.standard_normal((12, 12)))[0] + 1
FAST = {"n_landmarks": 40, "n_permutations": 30}


def test_every_figure_is_that_of_its_own_function():
    found = compare_manifolds(SPHERE, FAR, **FAST)
    expected = {
        "grassmann_distance": grassmann_distance(SPHERE, FAR),
        "hausdorff_distance": hausdorff_distance(SPHERE, FAR),
        "hausdorff_quantile": hausdorff_distance(SPHERE, FAR, quantile=0.95),
        "mmd": mmd(SPHERE, FAR).distance,
        "cka": cka(SPHERE, FAR).value,
        "cka_rbf": cka(SPHERE, FAR, kernel="rbf").value,
        "mutual_knn": mutual_knn(SPHERE, FAR).value,
        "rsa": representational_similarity(SPHERE, FAR).value,
        "procrustes_distance": procrustes_distance(SPHERE, FAR),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-12), name
    np.testing.assert_allclose(found.principal_angles, principal_angles(SPHERE, FAR), atol=1e-12)
    assert found.gromov_wasserstein > 0.4  # half the size of the sphere
    assert found.subspace_dimensions == (3, 3)
    assert found.skipped == {}


def test_two_samples_of_one_manifold_are_at_the_floor():
    first, second = (
        samples.sphere(500, random_state=seed).points @ np.eye(3, 20) for seed in (0, 1)
    )
    found = compare_manifolds(first, second, paired=False, n_landmarks=80)
    for name in ("hausdorff_distance", "hausdorff_quantile", "gromov_wasserstein"):
        assert getattr(found, name) < 1.5 * found.floors[name], name
    assert found.p_values["mmd"] > 0.05
    assert set(found.skipped) == set(PAIRED)
    shifted = compare_manifolds(first, second + 0.5, paired=False, n_landmarks=80)
    for name in ("hausdorff_distance", "hausdorff_quantile", "mmd"):
        assert getattr(shifted, name) > 1.5 * shifted.floors[name], name
    assert shifted.p_values["mmd"] < 0.01
    assert shifted.gromov_wasserstein == pytest.approx(found.gromov_wasserstein)


def test_the_floor_of_an_angle_is_what_sampling_turns():
    def cloud(tilt):
        axes = np.eye(6)
        axes[:2, :2] = [[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]]
        return RNG.standard_normal((2000, 6)) * [3, 1, 1, 1, 1, 1] @ axes

    options = {"measures": ["principal_angles"], "dimension": 1, "paired": False}
    same, turned = (compare_manifolds(cloud(0), cloud(tilt), **options) for tilt in (0, 0.4))
    assert same.principal_angles[-1] < same.floors["principal_angles"] < 0.1
    assert turned.principal_angles[-1] == pytest.approx(0.4, abs=0.05)


def test_other_spaces_leave_what_needs_one_space_out():
    found = compare_manifolds(SPHERE, SPHERE[:, :7], **FAST)
    assert set(found.skipped) == {*DISTANCES, "mmd"}
    assert found.hausdorff_distance is None
    assert all(getattr(found, name) is not None for name in [*PAIRED, "gromov_wasserstein"])
    lone = compare_manifolds(SPHERE, SPHERE[:100, :7], **FAST)
    assert set(lone.skipped) == set(ALL) - {"gromov_wasserstein"}
    assert not lone.paired
    assert "A has 12 features and B 7: they share no space" in str(lone)
    assert "the rows are not paired" in str(lone)


def test_it_reads_as_a_table_and_as_json():
    found = compare_manifolds(SPHERE, FAR, **FAST)
    lines = str(found).splitlines()
    assert lines[0] == "A: 240 x 12, B: 240 x 12, rows paired, subspaces of 3 and 3 dimensions"
    assert lines[1].split() == ["measure", "value", "floor", "p", "reading"]
    assert [line for line in lines if line.startswith("CKA, linear")][0].endswith("related")
    assert [line for line in lines if line.startswith("MMD")][0].endswith("differ")
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert list(plain["measures"]) == ALL
    assert plain["measures"]["cka"] == {
        "value": found.cka,
        "floor": found.floors["cka"],
        "p_value": found.p_values["cka"],
    }
    assert plain["measures"]["principal_angles"]["value"] == list(found.principal_angles)
    assert plain["n_samples"] == [240, 240]


def test_only_what_is_wanted_is_measured():
    found = compare_manifolds(SPHERE, FAR, measures=["cka", "hausdorff_quantile"])
    assert list(found.as_dict()["measures"]) == ["hausdorff_quantile", "cka"]
    bare = compare_manifolds(SPHERE, FAR, floors=False, **FAST)
    assert set(bare.floors) == {"mmd", "cka", "cka_rbf", "mutual_knn", "rsa"}


def test_large_sides_are_sampled_alike_where_rows_are_paired():
    large = samples.sphere(900, n_features=12, random_state=1).points
    found = compare_manifolds(large, 3 * large, max_samples=200, **FAST)
    assert found.cka == pytest.approx(1)
    assert found.n_samples == (900, 900)
    assert "From 200 and 200 random rows of A and B (max_samples)." in found.notes
    assert "Gromov-Wasserstein from at most 40 random rows a side." in found.notes
    again = compare_manifolds(large, 3 * large, max_samples=200, **FAST)
    assert again.as_dict() == found.as_dict()
    other = compare_manifolds(large, large[:150], max_samples=200, measures=["mmd"])
    assert other.notes[0].startswith("From 200 and 150")


def test_shapes_too_large_to_decompose_are_sampled(monkeypatch):
    monkeypatch.setattr(compare, "_DECOMPOSED", 10)
    found = compare_manifolds(SPHERE, FAR, measures=["procrustes_distance"])
    assert found.procrustes_distance == pytest.approx(0, abs=1e-10)
    assert found.notes == ("Procrustes from 10 random rows.",)


@settings(max_examples=2, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e6]))
def test_a_common_motion_changes_lengths_by_its_scale_alone(seed, scale):
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.standard_normal((12, 12)))
    moved = [scale * (X @ rotation + 2) for X in (SPHERE, FAR)]
    plain, after = (compare_manifolds(*pair, **FAST) for pair in ((SPHERE, FAR), moved))
    for name in ALL[1:]:
        unit = scale if name.startswith(("hausdorff", "gromov")) else 1
        tolerance = {"rel": 0.05} if name == "gromov_wasserstein" else {"rel": 1e-5, "abs": 1e-9}
        expected = pytest.approx(unit * getattr(plain, name), **tolerance)
        assert getattr(after, name) == expected, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tensors_in_tensors_out(dtype):
    found = compare_manifolds(
        torch.tensor(SPHERE, dtype=dtype), torch.tensor(FAR, dtype=dtype), **FAST
    )
    assert found.principal_angles.dtype == dtype
    plain = compare_manifolds(SPHERE, FAR, **FAST)
    assert isinstance(plain.principal_angles, np.ndarray)
    for name in ALL[1:]:
        assert isinstance(getattr(found, name), float)
        assert getattr(found, name) == pytest.approx(getattr(plain, name), rel=1e-2, abs=1e-3)


@pytest.mark.parametrize(
    ("X", "Y"),
    [
        (np.repeat(SPHERE, 2, axis=0), np.repeat(FAR, 2, axis=0)),
        (np.c_[SPHERE, np.ones(240)], np.c_[FAR, np.zeros(240)]),
        (np.outer(np.arange(50.0), np.ones(3)), np.outer(np.ones(50) + np.arange(50), [1.0, 0, 2])),
        (RNG.standard_normal((30, 200)), RNG.standard_normal((30, 200))),
        (SPHERE[:5], FAR[:5]),
        (np.eye(12), FAR[:12]),
        (np.r_[np.zeros((30, 12)), SPHERE[:9]], FAR[:39]),
        (SPHERE + 1e6, FAR),
    ],
    ids=["pairs", "constant", "rank one", "d > n", "few", "equal distances", "mostly one", "far"],
)
@pytest.mark.filterwarnings("ignore:n_neighbors=10 is more than")
def test_degenerate_data_give_finite_figures(X, Y):
    found = compare_manifolds(X, Y, **FAST)
    for name, entry in found.as_dict()["measures"].items():
        assert np.isfinite(entry["value"]).all(), name
        assert entry["floor"] is None or math.isfinite(entry["floor"]), name
        assert entry["p_value"] is None or 0 <= entry["p_value"] <= 1, name
    assert str(found)


def test_rows_all_equally_far_apart_have_no_rank_correlation():
    found = compare_manifolds(np.eye(12), FAR[:12], **FAST)
    assert found.rsa is None
    assert "equally far apart" in found.skipped["rsa"]
    assert found.mutual_knn is not None


def test_a_row_that_holds_the_variance_is_named():
    with pytest.warns(UserWarning, match="row 240 of A holds 100% of its variance"):
        found = compare_manifolds(np.r_[SPHERE, np.full((1, 12), 1e6)], FAR, paired=False, **FAST)
    assert found.hausdorff_quantile < 10
    assert found.hausdorff_distance > 1e6


def test_neighbors_are_clamped_with_a_warning():
    with pytest.warns(UserWarning, match="n_neighbors=10 is more than the 5 other rows"):
        found = compare_manifolds(SPHERE[:6], FAR[:6])
    assert found.mutual_knn == 1
    assert "No floors from halves: fewer than 8 rows." in found.notes


@pytest.mark.parametrize(
    ("X", "Y", "options", "message"),
    [
        (SPHERE[:3], FAR, {}, "minimum of 4"),
        (SPHERE, FAR[:0], {}, "0 sample"),
        (np.ones((20, 12)), FAR, {}, "all 20 rows of A are equal: a point is no manifold"),
        (SPHERE, FAR[:100], {"paired": True}, "paired=True, but A has 240 rows and B 100"),
        (SPHERE, FAR, {"measures": ["ot"]}, r"measures \['ot'\] are not known"),
        (SPHERE, FAR, {"measures": "cka"}, "measures='cka' is not known"),
        (SPHERE, FAR, {"max_samples": 2}, "max_samples=2 must be at least 4"),
        (SPHERE, FAR, {"dimension": 9}, "dimension=9 must lie between 1 and 3"),
        (np.where(np.eye(240, 12) > 0, np.nan, SPHERE), FAR, {}, "NaN or infinity: 12 of 240"),
    ],
)
def test_impossible_requests_are_refused(X, Y, options, message):
    with pytest.raises(ValueError, match=message):
        compare_manifolds(X, Y, **options)


@pytest.mark.slow
def test_all_measures_of_5000_rows_of_768_take_well_under_a_minute():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((5000, 768), dtype=np.float32) / np.arange(1, 769, dtype=np.float32)
    Y = X + 0.01 * rng.standard_normal((5000, 768), dtype=np.float32)
    start = time.process_time()
    found = compare_manifolds(X, Y)
    assert time.process_time() - start < 45
    assert found.skipped == {}


def test_an_empty_comparison_prints():
    assert str(ManifoldComparison((4, 5), (2, 3), False)).startswith("A: 4 x 2, B: 5 x 3")
