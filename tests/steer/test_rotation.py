import math

import numpy as np
import pytest
import torch
from cases import WIDTH, build_model, build_tokenizer, state, two_classes
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from manifold_unlearn import bake, intervene
from manifold_unlearn.steer.rotation import PlaneRotation, RotationSteering

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(scope="module")
def data():
    return two_classes()


def in_plane(rotation, X):
    return np.asarray(X, dtype=np.float64) @ np.asarray(rotation.basis_)


def angles(at):
    return np.degrees(np.arctan2(at[:, 1], at[:, 0]))


@parametrize_with_checks([RotationSteering(), RotationSteering(rotate="by", angle=30)])
def test_scikit_learn_contract(estimator, check):
    check(estimator)


def test_a_row_is_rotated_by_a_known_angle_in_a_known_plane():
    """By the rotation matrix, (3, 4) becomes (3 cos 30 - 4 sin 30, 3 sin 30 + 4 cos 30)."""
    steer = RotationSteering.from_plane([1, 0, 0], [0, 0, 2], angle=30, rotate="by")
    c, s = math.sqrt(3) / 2, 0.5
    expected = [[3 * c - 4 * s, 5, 3 * s + 4 * c], [-c, 0, -s]]
    found = steer.transform(np.array([[3.0, 5, 4], [-1, 0, 0]]))
    np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_a_row_is_rotated_to_a_known_angle_in_a_known_plane():
    """(3, 5, 4) has length 5 in the plane, so that 60 degrees is (2.5, 5, 5 sin 60)."""
    steer = RotationSteering.from_plane([1, 0, 0], [0, 0, 2], angle=60)
    found = steer.transform(np.array([[3.0, 5, 4], [-1, 0, 0], [0, 7, 0]]))
    half = math.sqrt(3) / 2
    expected = [[2.5, 5, 5 * half], [0.5, 0, half], [0, 7, 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("start", "goal", "middle"), [(10, 70, 40), (170, -150, -170), (-100, 30, -35)]
)
def test_strength_is_the_share_of_the_shorter_arc(start, goal, middle):
    steer = RotationSteering.from_plane([1, 0], [0, 1], angle=goal, strength=0.5)
    at = np.radians([start])
    found = steer.transform(np.stack([2 * np.cos(at), 2 * np.sin(at)], axis=1))
    np.testing.assert_allclose(angles(found), middle, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 2, rtol=1e-14)


def test_any_plane_is_that_of_the_axes_seen_from_elsewhere():
    """Rotating the data and the plane together rotates the result."""
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(7, 7)))
    X, a, b = rng.normal(size=(9, 7)), rng.normal(size=7), rng.normal(size=7)
    here = RotationSteering.from_plane(a, b, angle=75).transform(X)
    there = RotationSteering.from_plane(turn @ a, turn @ b, angle=75).transform(X @ turn.T)
    np.testing.assert_allclose(there, here @ turn.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rotate", ["to", "by"])
@pytest.mark.parametrize("strength", [-0.5, 0.3, 1, 2])
def test_the_norm_and_what_is_orthogonal_to_the_plane_are_kept(data, rotate, strength):
    X, y = data
    steer = RotationSteering(rotate=rotate, angle=130, strength=strength).fit(X, y)
    rows = torch.tensor(X, dtype=torch.float32) * 100
    moved = steer(rows).double()
    norms, rows = moved.norm(dim=1), rows.double()
    torch.testing.assert_close(norms, rows.norm(dim=1), rtol=1e-6, atol=0)
    assert float((moved - rows).norm(dim=1).median()) > 10
    basis = torch.tensor(steer.basis_)
    rest = torch.eye(12, dtype=torch.float64) - basis @ basis.T
    torch.testing.assert_close(moved @ rest, rows @ rest, rtol=0, atol=1e-4)


def test_rotating_to_an_angle_twice_is_rotating_once(data):
    X, y = data
    steer = RotationSteering(angle=200).fit(X, y)
    once = steer.transform(X)
    np.testing.assert_allclose(angles(in_plane(steer, once)), -160, rtol=1e-10)
    np.testing.assert_allclose(steer.transform(once), once, rtol=0, atol=1e-13)
    assert np.abs(once - X).max() > 1


def test_no_strength_changes_nothing_and_it_may_change_after_the_fit(data):
    X, y = data
    steer = RotationSteering(angle=90).fit(X, y)
    full = steer.transform(X)
    steer.strength = 0
    np.testing.assert_allclose(steer.transform(X), X, rtol=0, atol=1e-14)
    steer.strength = 1
    np.testing.assert_array_equal(steer.transform(X), full)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_rows_that_lean_to_the_concept_move_and_the_others_stay_to_the_bit(data, dtype):
    X, y = data
    steer = RotationSteering(angle=180, adaptive=True).fit(X, y)
    rows = torch.tensor(X).to(dtype)
    along = rows.double() @ torch.tensor(steer.basis_[:, 0])
    leaning = along > 1e-3
    moved = steer(rows)
    assert moved.dtype == dtype
    assert torch.equal(moved[along < -1e-3], rows[along < -1e-3])
    assert bool((moved[leaning].double() @ torch.tensor(steer.basis_[:, 0]) < 0).all())
    assert 20 < int(leaning.sum()) < len(rows) - 20


def test_leaning_may_be_measured_from_the_middle_of_the_means(data):
    X, y = data[0] + 50 * np.ones(12), data[1]
    means = X[y == 1].mean(0), X[y == 0].mean(0)
    toward = (means[0] - means[1]) / np.linalg.norm(means[0] - means[1])
    steer = RotationSteering(angle=180, adaptive="midpoint").fit(X, y)
    assert steer.midpoint_ == pytest.approx((means[0] + means[1]) / 2 @ toward)
    np.testing.assert_allclose(steer.basis_[:, 0], toward, rtol=1e-10)
    kept = (steer.transform(X) == X).all(1)
    np.testing.assert_array_equal(kept, X @ toward <= steer.midpoint_)
    assert 20 < kept.sum() < len(y) - 20
    n_kept_at_zero = (RotationSteering(angle=180, adaptive=True).fit(X, y).transform(X) == X).all(1)
    assert n_kept_at_zero.sum() in (0, len(y))


def test_the_second_direction_is_that_of_largest_variance_beside_the_first(data):
    X, y = data
    steer = RotationSteering().fit(X, y)
    first = steer.basis_[:, 0]
    rows = X - np.where(y[:, None] == 1, X[y == 1].mean(0), X[y == 0].mean(0))
    rest = rows - np.outer(rows @ first, first)
    _, _, axes = np.linalg.svd(rest, full_matrices=False)
    assert abs(axes[0] @ steer.basis_[:, 1]) == pytest.approx(1, abs=1e-10)


def test_the_second_direction_points_where_its_largest_entry_is_positive():
    for seed in range(8):
        second = RotationSteering().fit(*two_classes(10, 10, 5, seed=seed)).basis_[:, 1]
        assert second[np.abs(second).argmax()] > 0


def test_fewer_rows_than_features_give_the_same_plane_as_a_decomposition():
    rng = np.random.default_rng(3)
    X, y = rng.normal(size=(10, 40)), np.repeat([0, 1], 5)
    steer = RotationSteering(plane="pairs").fit(X, y)
    differences, first = X[y == 1] - X[y == 0], steer.basis_[:, 0]
    rest = differences - differences.mean(0)
    rest = rest - np.outer(rest @ first, first)
    _, _, axes = np.linalg.svd(rest, full_matrices=False)
    assert abs(axes[0] @ steer.basis_[:, 1]) == pytest.approx(1, abs=1e-10)


def test_candidates_give_their_first_component_as_published(data):
    X, y = data
    candidates = np.random.default_rng(1).normal(size=(6, 12)) * np.linspace(1, 4, 12)
    _, _, axes = np.linalg.svd(candidates - candidates.mean(0))
    steer = RotationSteering(plane="candidates").fit(X, y, candidates=candidates)
    first = steer.basis_[:, 0]
    second = axes[0] - (axes[0] @ first) * first
    assert abs(second @ steer.basis_[:, 1]) == pytest.approx(np.linalg.norm(second), rel=1e-10)
    alone = RotationSteering.from_candidates(candidates, angle=45)
    unit = candidates / np.linalg.norm(candidates, axis=1, keepdims=True)
    chosen = unit[(unit @ unit.T).mean(1).argmax()]
    np.testing.assert_allclose(alone.basis_[:, 0], chosen, rtol=1e-12)
    assert (alone.plane, alone.angle, alone.n_features_in_) == ("candidates", 45, 12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_in_torch_out_and_half_precision_is_rotated_in_single(data, dtype):
    X, y = torch.tensor(data[0]).to(dtype), torch.tensor(data[1])
    steer = RotationSteering(angle=90).fit(X, y)
    out = steer.transform(X)
    assert isinstance(out, torch.Tensor)
    assert out.dtype == dtype
    assert steer.basis_.dtype == torch.float64
    wide = RotationSteering(angle=90).fit(X.double(), y).transform(X.double())
    torch.testing.assert_close(out.double(), wide, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    norms = out.double().norm(dim=1) / X.double().norm(dim=1)
    assert float((norms - 1).abs().max()) < max(1e-6, torch.finfo(dtype).eps)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("plane", ["pca", "candidates"])
def test_rows_on_a_gpu_stay_there_and_agree(data, plane):
    X, y = torch.tensor(data[0]), torch.tensor(data[1])
    given = {"candidates": X[:5]} if plane == "candidates" else {}
    expected = RotationSteering(plane=plane).fit(X, y, **given).transform(X)
    there = {name: value.cuda() for name, value in given.items()}
    steer = RotationSteering(plane=plane).fit(X.cuda(), y.cuda(), **there)
    out = steer.transform(X.cuda())
    assert out.is_cuda
    assert steer.basis_.is_cuda
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-7, atol=1e-7)


def test_large_and_empty_components_stay_numbers():
    steer = RotationSteering.from_plane([1.0, 0, 0], [0, 1, 0], angle=77, strength=0.4)
    rows = torch.tensor([[0, 0, 0], [0, 0, 1], [3e4, 0, 5e4], [1e-30, 1e-30, 0]])
    for dtype in DTYPES:
        assert bool(torch.isfinite(steer(rows.to(dtype))).all())
    torch.testing.assert_close(steer(rows)[:2], rows[:2], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_saved_then_loaded_is_equal(data, tmp_path, kind):
    X, y = kind(data[0]), data[1]
    steer = RotationSteering(angle=33, strength=0.7, adaptive="midpoint").fit(X, y)
    steer.save(tmp_path / "steer")
    again = RotationSteering.load(tmp_path / "steer")
    assert again.get_params() == steer.get_params()
    assert type(again.basis_) is type(steer.basis_)
    np.testing.assert_array_equal(again.transform(X), steer.transform(X))
    steer.map_.save(tmp_path / "map")
    rows = torch.tensor(data[0])
    assert torch.equal(PlaneRotation.load(tmp_path / "map")(rows), steer(rows))


def test_a_rotation_of_all_rows_by_an_angle_is_affine_and_bakes(llama):
    rng = np.random.default_rng(0)
    steer = RotationSteering.from_plane(*rng.normal(size=(2, 32)), angle=50, rotate="by")
    X = rng.normal(size=(20, 32))
    np.testing.assert_allclose(X @ steer.matrix_.T, steer.transform(X), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(steer.matrix_ @ steer.matrix_.T, np.eye(32), atol=1e-12)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad(), intervene(llama, {"layers.1.mlp": steer}):
        hooked = llama(ids).logits
    baked = bake(llama, {"layers.1.mlp": steer})
    with torch.no_grad():
        torch.testing.assert_close(baked(ids).logits, hooked, rtol=1e-4, atol=1e-4)
        assert float((llama(ids).logits - hooked).abs().max()) > 1e-2
    for other in (clone(steer).set_params(rotate="to"), clone(steer).set_params(adaptive=True)):
        other.basis_, other.midpoint_, other.n_features_in_ = steer.basis_, 0.0, 32
        assert not hasattr(other, "matrix_")
        assert not hasattr(other, "bias_")
        with pytest.raises(ValueError, match="only an affine map bakes exactly"):
            bake(llama, {"layers.1.mlp": other})


def test_a_model_is_steered_and_then_as_it_was(architecture):
    model, tokenizer = build_model(architecture), build_tokenizer()
    rng = np.random.default_rng(0)
    steer = RotationSteering.from_plane(*rng.normal(size=(2, 32)), angle=90)
    ids = tokenizer(["The capital of France is"], return_tensors="pt").input_ids
    before = state(model)
    with torch.no_grad():
        plain = model(ids).logits
        with intervene(model, {"layers.1": steer}):
            steered = model(ids).logits
        again = model(ids).logits
    assert torch.equal(again, plain)
    assert float((steered - plain).abs().max()) > 1e-2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_angle_that_is_no_number_does_not_bake(llama):
    steer = RotationSteering.from_plane(torch.eye(WIDTH)[0], torch.eye(WIDTH)[1], rotate="by")
    steer.angle = math.nan
    with pytest.raises(ValueError, match="angle=nan must be finite"):
        bake(llama, {"layers.1.mlp": steer})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"plane": "sphere"}, "plane='sphere' is not one of pca, pairs, candidates"),
        ({"rotate": "at"}, "rotate='at' is not one of to, by"),
        ({"adaptive": "often"}, "adaptive='often' is not False, True or 'midpoint'"),
        ({"angle": math.nan}, "angle=nan must be finite"),
        ({"strength": math.inf}, "strength=inf must be finite"),
        ({"plane": "pairs"}, "120 rows of the concept, 160 others"),
        ({"plane": "candidates"}, "candidates='?None'?.*go together"),
    ],
)
def test_a_wrong_parameter_is_named(data, change, words):
    with pytest.raises(ValueError, match=words):
        RotationSteering(**change).fit(*data)


def test_wrong_data_is_named(data):
    X, y = data
    with pytest.raises(ValueError, match="go together"):
        RotationSteering().fit(X, y, candidates=X)
    with pytest.raises(ValueError, match="candidates has 5 features; X has 12"):
        RotationSteering(plane="candidates").fit(X, y, candidates=X[:, :5])
    with pytest.raises(ValueError, match="class means are equal"):
        RotationSteering().fit(np.concatenate([X, X]), np.repeat([0, 1], len(X)))
    with pytest.raises(ValueError, match="nothing varies beside the concept direction"):
        RotationSteering().fit(np.repeat([[0.0, 1, 2], [3, 4, 6]], 5, axis=0), np.repeat([0, 1], 5))
    with pytest.raises(ValueError, match="contains NaN or infinity: 1 of 280 rows"):
        RotationSteering().fit(np.where(np.arange(280)[:, None] == 7, np.nan, X), y)
    with pytest.raises(ValueError, match="forget set is empty"):
        RotationSteering().fit(X, y * 0)
    with pytest.raises(ValueError, match="candidate 1 is zero"):
        RotationSteering.from_candidates(np.array([[1.0, 2], [0, 0]]))
    with pytest.raises(NotFittedError, match="not fitted yet"):
        RotationSteering()(torch.ones(3))


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (([1.0, 2], [2.0, 4]), "zero or parallel to the first"),
        (([1.0, 2], [0.0, 0]), "zero or parallel to the first"),
        (([0.0, 0], [1.0, 0]), "direction is zero"),
        (([1.0, 2], [1.0, 0, 0]), r"shape \(2,\), second \(3,\)"),
        (([1.0, math.nan], [1.0, 0]), "directions contains NaN"),
    ],
)
def test_directions_that_span_no_plane_are_named(pair, words):
    with pytest.raises(ValueError, match=words):
        RotationSteering.from_plane(*pair)
