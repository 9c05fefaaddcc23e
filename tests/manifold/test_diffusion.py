import inspect
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydiffmap.diffusion_map import DiffusionMap as PyDiffusionMap
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

from manifold_unlearn.manifold import DiffusionMap, samples


def explained(embedding, functions):
    """Part of the functions' variance that is linear in the embedding."""
    design = np.c_[np.ones(len(embedding)), embedding]
    rest = functions - design @ np.linalg.lstsq(design, functions, rcond=None)[0]
    return 1 - (rest**2).sum() / ((functions - functions.mean(0)) ** 2).sum()


def levels(sample):
    """Slices of equal exact eigenvalues."""
    starts = np.flatnonzero(np.r_[True, np.diff(sample.eigenvalues) > 1e-9])
    stops = [*starts[1:], len(sample.eigenvalues)]
    return [slice(a, b) for a, b in zip(starts, stops, strict=True)]


def crowded_circle(seed, noise=0.0):
    return samples.circle(
        2000, n_features=96, density_amplitude=0.8, noise=noise, random_state=seed
    )


CASES = {  # sample of a seed, and R^2 of the first two eigenspaces
    "circle": (lambda seed: samples.circle(2000, n_features=128, random_state=seed), 0.999, 0.998),
    "crowded circle": (crowded_circle, 0.999, 0.995),
    "noisy crowded circle": (lambda seed: crowded_circle(seed, 1e-3), 0.999, 0.995),
    "tilted sphere": (
        lambda seed: samples.sphere(5000, n_features=128, tilt=1.0, random_state=seed),
        0.998,
        0.99,
    ),
    "torus": (lambda s: samples.flat_torus(5000, n_features=64, random_state=s), 0.998, 0.99),
    "roll": (lambda s: samples.swiss_roll(2000, n_features=128, random_state=s), 0.999, 0.99),
    "noisy roll": (
        lambda s: samples.swiss_roll(2000, n_features=96, noise=0.1, random_state=s),
        0.999,
        0.99,
    ),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", CASES)
def test_eigenfunctions_and_eigenvalues_are_those_of_the_manifold(name, seed):
    make, *thresholds = CASES[name]
    sample = make(seed)
    first, second = levels(sample)[:2]
    fitted = DiffusionMap(max(second.stop, 2)).fit(sample.points)
    for level, threshold in zip((first, second), thresholds, strict=True):
        assert explained(fitted.embedding_[:, level], sample.eigenfunctions[:, level]) > threshold
    rates = fitted.generator_eigenvalues_
    ratio = rates[second].mean() / rates[first].mean()
    truth = sample.eigenvalues[second.start] / sample.eigenvalues[first.start]
    assert ratio == pytest.approx(truth, rel=0.04)
    assert fitted.intrinsic_dimension_ == pytest.approx(sample.intrinsic_dimension, abs=0.15)


@pytest.mark.parametrize("seed", [0, 1])
def test_strong_noise_changes_neither_spectrum_nor_density(seed):
    sample = samples.sphere(4000, n_features=128, tilt=1.0, noise=0.03, random_state=seed)
    fitted = DiffusionMap(8).fit(sample.points)
    assert fitted.offset_ == pytest.approx(2 * 128 * 0.03**2, rel=0.15)
    assert explained(fitted.embedding_[:, :3], sample.eigenfunctions[:, :3]) > 0.995
    np.testing.assert_allclose(fitted.generator_eigenvalues_[:3].mean(), 2, rtol=0.06)
    assert np.median(fitted.density_ / sample.density) == pytest.approx(1, abs=0.3)
    assert DiffusionMap(2).fit(samples.sphere(1000, random_state=0).points).offset_ == 0


def test_density_returns_when_alpha_is_zero():
    sample = crowded_circle(0)
    first = levels(sample)[0]
    plain = DiffusionMap(alpha=0.0).fit(sample.points)
    assert explained(plain.embedding_, sample.eigenfunctions[:, first]) < 0.95


def test_generator_is_the_laplacian_in_units_of_the_data():
    sample = samples.circle(2000, radius=3.0, random_state=0)
    fitted = DiffusionMap(4).fit(sample.points)
    np.testing.assert_allclose(fitted.generator_eigenvalues_, sample.eigenvalues[:4], rtol=0.08)
    np.testing.assert_allclose(
        fitted.generator_eigenvalues_, -np.log(fitted.eigenvalues_) / fitted.bandwidth_
    )


def test_density_estimate_is_the_sampling_density():
    sample = crowded_circle(0)
    fitted = DiffusionMap().fit(sample.points)
    assert np.median(fitted.density_ / sample.density) == pytest.approx(1, abs=0.1)
    assert np.corrcoef(fitted.density_, sample.density)[0, 1] > 0.98


@pytest.mark.parametrize("tilt", [1.0, 2.0])
def test_variable_bandwidth_reaches_the_sparse_parts(tilt):
    sample = samples.sphere(2000, n_features=32, tilt=tilt, random_state=0)
    fixed, variable = (
        DiffusionMap(3, variable_bandwidth=flag).fit(sample.points) for flag in (False, True)
    )
    first = sample.eigenfunctions[:, :3]
    assert explained(variable.embedding_, first) > 0.99
    if tilt == 2:
        assert explained(fixed.embedding_, first) < explained(variable.embedding_, first)
    np.testing.assert_allclose(variable.transform(sample.points), variable.embedding_, atol=1e-4)


def test_embedding_has_unit_variance_and_time_scales_it():
    X = samples.sphere(600, random_state=0).points
    plain = DiffusionMap(4).fit(X)
    later = DiffusionMap(4, diffusion_time=3).fit(X)
    np.testing.assert_allclose(plain.embedding_.std(0), 1)
    np.testing.assert_allclose(later.embedding_, plain.embedding_ * plain.eigenvalues_**3)
    np.testing.assert_allclose(later.transform(X), later.embedding_, atol=1e-8)
    assert (np.diff(plain.eigenvalues_) <= 0).all()
    largest = np.abs(plain.embedding_).argmax(0)
    assert (plain.embedding_[largest, np.arange(4)] > 0).all()


BASE = samples.swiss_roll(700, n_features=6, random_state=0).points


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from([1e-8, 1e-3, 1.0, 1e8]), st.floats(-1e3, 1e3))
def test_rotation_translation_scale_and_order_change_nothing(seed, scale, shift):
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    order = rng.permutation(len(BASE))
    fitted = DiffusionMap(3).fit(BASE)
    moved = DiffusionMap(3).fit(scale * (BASE @ rotation + shift)[order])
    np.testing.assert_allclose(moved.eigenvalues_, fitted.eigenvalues_, rtol=2e-3)
    signs = np.sign((moved.embedding_ * fitted.embedding_[order]).sum(0))
    np.testing.assert_allclose(moved.embedding_ * signs, fitted.embedding_[order], atol=0.02)
    assert moved.bandwidth_ == pytest.approx(fitted.bandwidth_ * scale**2, rel=0.02)


def test_given_bandwidth_makes_scale_exact():
    fitted = DiffusionMap(3, bandwidth=1.0).fit(BASE)
    scaled = DiffusionMap(3, bandwidth=1e16).fit(BASE * 1e8)
    np.testing.assert_allclose(scaled.embedding_, fitted.embedding_, atol=1e-6)
    np.testing.assert_allclose(
        scaled.generator_eigenvalues_ * 1e16, fitted.generator_eigenvalues_, rtol=1e-6
    )


def test_single_and_double_precision_agree():
    X = crowded_circle(0).points
    double, single = DiffusionMap(4).fit(X), DiffusionMap(4).fit(X.astype(np.float32))
    assert single.embedding_.dtype == np.float32
    np.testing.assert_allclose(single.eigenvalues_, double.eigenvalues_, atol=1e-3)
    np.testing.assert_allclose(single.embedding_, double.embedding_, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"variable_bandwidth": True}, {"backend": "pydiffmap"}])
def test_transform_of_the_training_rows_is_the_embedding(options):
    X = samples.sphere(900, n_features=12, tilt=1.0, random_state=0).points
    fitted = DiffusionMap(6, **options).fit(X)
    np.testing.assert_allclose(fitted.transform(X), fitted.embedding_, atol=1e-6)
    np.testing.assert_allclose(fitted.transform(X[::7]), fitted.embedding_[::7], atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"variable_bandwidth": True}])
def test_transform_of_new_rows_continues_the_eigenfunctions(options):
    sample = samples.circle(1500, n_features=8, density_amplitude=0.5, random_state=0)
    fitted = DiffusionMap(2, **options).fit(sample.points[:1000])
    new = fitted.transform(sample.points[1000:])
    assert explained(new, sample.eigenfunctions[1000:, :2]) > 0.998


def test_rows_beyond_reach_are_placed_with_a_warning():
    sample = samples.circle(300, random_state=0)
    fitted = DiffusionMap().fit(sample.points)
    with pytest.warns(UserWarning, match="1 of 1 rows lie beyond the kernel's reach"):
        far = fitted.transform(1e3 * sample.points[:1])
    assert np.isfinite(far).all()
    assert np.abs(far - fitted.embedding_[:1]).max() < 0.3


@pytest.mark.parametrize("random_state", [None, 0])
def test_landmarks_place_the_rest_where_the_whole_fit_does(random_state):
    sample = samples.sphere(3000, n_features=16, random_state=0)
    fitted = DiffusionMap(3, n_landmarks=800, random_state=random_state).fit(sample.points)
    assert fitted.embedding_.shape == (3000, 3)
    assert len(fitted.landmark_indices_) == len(fitted.density_) == 800
    assert explained(fitted.embedding_, sample.eigenfunctions[:, :3]) > 0.98
    again = clone(fitted).fit(sample.points)
    assert np.array_equal(again.embedding_, fitted.embedding_)
    np.testing.assert_allclose(fitted.transform(sample.points), fitted.embedding_, atol=1e-6)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("n_batches", [1, 4, 13])
def test_a_stream_is_fitted_as_all_of_it_at_once(kind, n_batches):
    sample = samples.sphere(2000, n_features=8, random_state=0)
    options = {"n_landmarks": 500, "random_state": 3}
    whole = DiffusionMap(3, **options).fit(kind(sample.points))
    batches = [kind(part) for part in np.array_split(sample.points, n_batches)]
    streamed = DiffusionMap(3, **options).fit(iter(batches))
    partial = DiffusionMap(3, **options)
    for batch in batches:
        partial.partial_fit(batch)
    for fitted in (streamed, partial):
        assert fitted.n_seen_ == 2000
        assert (fitted.landmark_indices_ == whole.landmark_indices_).all()
        assert type(fitted.embedding_) is type(batches[0])
        np.testing.assert_allclose(fitted.eigenvalues_, whole.eigenvalues_, rtol=1e-9)
        at = np.asarray(whole.landmark_indices_)
        np.testing.assert_allclose(fitted.embedding_, whole.embedding_[at], atol=1e-8)
        np.testing.assert_allclose(
            fitted.transform(kind(sample.points)), whole.embedding_, atol=1e-6
        )


def test_a_stream_without_a_seed_keeps_farthest_points():
    sample = samples.circle(3000, n_features=4, density_amplitude=0.8, random_state=0)
    fitted = DiffusionMap(2, n_landmarks=300).fit(iter(np.array_split(sample.points, 6)))
    angles = np.sort(sample.intrinsic_coordinates[fitted.landmark_indices_, 0])
    assert np.diff(angles).max() < 3 * 2 * np.pi / 300
    new = fitted.transform(sample.points)
    assert explained(new, sample.eigenfunctions[:, :2]) > 0.99


def test_a_stream_that_cannot_be_fitted_is_refused_and_leaves_the_fit():
    X = samples.circle(300, random_state=0).points
    fitted = DiffusionMap(2, random_state=0).partial_fit(X)
    before = fitted.embedding_.copy()
    with pytest.raises(ValueError, match="X has 3 features"):
        fitted.partial_fit(np.ones((20, 3)))
    with pytest.raises(ValueError, match="NaN or infinity"):
        fitted.partial_fit(np.full((20, 2), np.nan))
    assert np.array_equal(fitted.embedding_, before)
    assert fitted.n_seen_ == 300
    with pytest.raises(ValueError, match="the iterator gave no batch"):
        DiffusionMap().fit(iter([]))
    with pytest.raises(ValueError, match="target has no place beside an iterator"):
        DiffusionMap().fit(iter([X]), target=np.ones(300))


@pytest.mark.parametrize(
    "neighbors", ["half", "faiss", pytest.param("pynndescent", marks=pytest.mark.slow)]
)
def test_an_approximate_search_gives_the_same_map(neighbors):
    if neighbors != "half":
        pytest.importorskip(neighbors)
    sample = samples.sphere(3000, n_features=24, random_state=0)
    exact = DiffusionMap(3).fit(sample.points)
    fitted = DiffusionMap(3, neighbors=neighbors, random_state=0).fit(sample.points)
    assert exact.recall_ == 1
    assert 0.9 < fitted.recall_ <= 1
    assert explained(fitted.embedding_, sample.eigenfunctions[:, :3]) > 0.995
    np.testing.assert_allclose(fitted.transform(sample.points), fitted.embedding_, atol=0.05)
    np.testing.assert_allclose(
        fitted.generator_eigenvalues_, exact.generator_eigenvalues_, rtol=0.03
    )


def test_lists_too_short_for_the_kernel_are_told_of():
    X = samples.circle(2000, random_state=0).points
    with pytest.warns(UserWarning, match=r"lists of 40 neighbors truncate the kernel.*n_neighbors"):
        fitted = DiffusionMap(2, n_neighbors=10, bandwidth=0.05, neighbors="half").fit(X)
    assert np.isfinite(fitted.embedding_).all()
    with pytest.raises(ValueError, match="variable_bandwidth=True needs neighbors='exact'"):
        DiffusionMap(2, variable_bandwidth=True, neighbors="half").fit(X)


@pytest.mark.parametrize(
    ("sample", "n_components", "limit"),
    [
        (samples.circle(800, n_features=20, random_state=0), 2, 0.02),
        (samples.sphere(1500, n_features=20, random_state=0), 3, 0.05),
    ],
    ids=["circle", "sphere"],
)
def test_inverse_transform_returns_to_the_data(sample, n_components, limit):
    train, new = sample.points[::2], sample.points[1::2]
    fitted = DiffusionMap(n_components).fit(train)
    back = fitted.inverse_transform(fitted.transform(new))
    assert np.sqrt(((back - new) ** 2).sum(1)).mean() < limit
    mean = np.sqrt(((new - train.mean(0)) ** 2).sum(1)).mean()
    assert mean > 10 * limit


def test_inverse_transform_of_far_coordinates_warns_and_stays_near():
    sample = samples.circle(500, random_state=0)
    fitted = DiffusionMap().fit(sample.points)
    with pytest.warns(UserWarning, match="1 of 2 rows lie far"):
        back = fitted.inverse_transform(np.r_[fitted.embedding_[:1], 1.5 * fitted.embedding_[1:2]])
    np.testing.assert_allclose(back[0], sample.points[0], atol=0.02)
    assert np.isfinite(back).all()
    with pytest.raises(ValueError, match="X has 3 columns, the embedding has 2"):
        fitted.inverse_transform(np.zeros((2, 3)))


def test_diffusion_distances_are_those_of_the_markov_chain():
    X = samples.circle(60, density_amplitude=0.5, random_state=0).points
    bandwidth = 0.1
    squared = ((X[:, None] - X[None]) ** 2).sum(-1)
    kernel = np.exp(-squared / (4 * bandwidth))
    q = kernel.sum(1)
    kernel /= np.outer(q, q)
    degrees = kernel.sum(1)
    transition = kernel / degrees[:, None]
    stationary = degrees / degrees.sum()
    steps = np.linalg.matrix_power(transition, 2)
    exact = np.sqrt((((steps[:, None] - steps[None]) ** 2) / stationary).sum(-1))
    fitted = DiffusionMap(16, bandwidth=bandwidth, n_neighbors=59).fit(X)
    np.testing.assert_allclose(fitted.diffusion_distances(time=2), exact, atol=2e-3)
    np.testing.assert_allclose(
        fitted.diffusion_distances(X, X[:5], time=2), exact[:, :5], atol=2e-3
    )


def test_matches_pydiffmap_given_its_bandwidth_on_a_uniform_circle():
    X = samples.circle(600, n_features=5, random_state=1).points
    theirs = PyDiffusionMap.from_sklearn(alpha=1.0, k=200, epsilon=0.01, n_evecs=4).fit(X)
    for backend in ("torch", "pydiffmap"):
        ours = DiffusionMap(4, bandwidth=0.01, n_neighbors=200, backend=backend).fit(X)
        np.testing.assert_allclose(
            ours.eigenvalues_, 1 + theirs.epsilon_fitted * theirs.evals, atol=1e-4
        )
        assert explained(ours.embedding_, theirs.evecs) > 0.9999


def test_pydiffmap_backend_takes_its_bandwidth_and_is_repeatable():
    X = samples.sphere(500, n_features=5, random_state=1).points
    theirs = PyDiffusionMap.from_sklearn(alpha=1.0, k=64, epsilon="bgh", n_evecs=3).fit(X)
    first, second = (DiffusionMap(3, backend="pydiffmap").fit(X) for _ in range(2))
    assert first.bandwidth_ == pytest.approx(theirs.epsilon_fitted)
    assert first.intrinsic_dimension_ == pytest.approx(theirs.local_kernel.d)
    assert np.array_equal(first.embedding_, second.embedding_)
    with pytest.raises(ValueError, match="variable_bandwidth=True is not available"):
        DiffusionMap(3, backend="pydiffmap", variable_bandwidth=True).fit(X)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors_in_tensors_out(dtype):
    X = torch.from_numpy(samples.sphere(300, n_features=6, random_state=0).points).to(dtype)
    fitted = DiffusionMap(3, n_neighbors=32).fit(X)
    kinds = [fitted.embedding_, fitted.transform(X), fitted.inverse_transform(fitted.transform(X))]
    assert all(value.dtype == dtype and value.device == X.device for value in kinds)
    assert isinstance(fitted.eigenvalues_, torch.Tensor)
    assert isinstance(fitted.diffusion_distances(), torch.Tensor)
    same = DiffusionMap(3, n_neighbors=32).fit(X.double().numpy())
    assert isinstance(same.embedding_, np.ndarray)
    np.testing.assert_allclose(fitted.embedding_.double().numpy(), same.embedding_, atol=0.02)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("options", [{}, {"variable_bandwidth": True}, {"n_landmarks": 100}])
def test_saved_and_loaded_it_answers_the_same(tmp_path, kind, options):
    X = samples.circle(200, n_features=4, random_state=0).points
    X = torch.from_numpy(X) if kind == "torch" else X
    fitted = DiffusionMap(3, n_neighbors=20, **options).fit(X)
    fitted.save(tmp_path / "map")
    loaded = DiffusionMap.load(tmp_path / "map")
    assert loaded.get_params() == fitted.get_params()
    assert type(loaded.embedding_) is type(fitted.embedding_)
    assert (loaded.transform(X) == fitted.transform(X)).all()
    assert (loaded.inverse_transform(X[:, :3]) == fitted.inverse_transform(X[:, :3])).all()
    manifest = json.loads((tmp_path / "map" / "artifact.json").read_text())
    assert manifest["kind"] == "DiffusionMap"


def test_signature_is_the_contract():
    parameters = inspect.signature(DiffusionMap).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        "n_components": 2,
        "n_neighbors": 64,
        "bandwidth": "bgh",
        "alpha": 1.0,
        "variable_bandwidth": False,
        "diffusion_time": 0,
        "neighbors": "auto",
        "n_landmarks": None,
        "backend": "torch",
        "device": "auto",
        "random_state": None,
        "metric": "euclidean",
    }
    assert vars(DiffusionMap()) == {name: p.default for name, p in parameters.items()}


CIRCLE = samples.circle(200, n_features=6, random_state=0).points


def finite(fitted, X):
    arrays = [fitted.embedding_, fitted.eigenvalues_, fitted.density_, fitted.transform(X)]
    return all(np.isfinite(values).all() for values in arrays)


@pytest.mark.parametrize(
    "X",
    [
        np.concatenate([CIRCLE, CIRCLE]),
        np.concatenate([CIRCLE, np.repeat(CIRCLE[:1], 600, axis=0)]),
        np.c_[CIRCLE, np.full((200, 3), 7.0)],
        np.outer(np.random.default_rng(0).standard_normal(200), np.ones(9)),
        np.random.default_rng(0).standard_normal((70, 400)),
        np.random.default_rng(0).standard_normal((200, 40)),
        np.random.default_rng(0).integers(0, 3, (200, 4)),
        CIRCLE + 1e6,
    ],
    ids=[
        "pairs",
        "one row many times",
        "constant columns",
        "rank one",
        "d > n",
        "ball",
        "grid",
        "far",
    ],
)
@pytest.mark.parametrize("variable", [False, True])
def test_degenerate_data_give_finite_coordinates(X, variable):
    fitted = DiffusionMap(2, variable_bandwidth=variable).fit(X)
    assert finite(fitted, X)
    assert fitted.n_components_connected_ == 1
    np.testing.assert_allclose(fitted.transform(X), fitted.embedding_, atol=1e-4)


def test_duplicates_do_not_move_the_circle():
    fitted = DiffusionMap(2).fit(np.concatenate([CIRCLE, CIRCLE]))
    np.testing.assert_allclose(fitted.embedding_[:200], fitted.embedding_[200:], atol=1e-9)
    assert explained(fitted.embedding_[:200], CIRCLE) > 0.95


@pytest.mark.parametrize("variable", [False, True])
def test_far_outlier_is_a_part_of_its_own(variable):
    X = np.concatenate([CIRCLE, np.full((1, 6), 1e6)])
    with pytest.warns(UserWarning, match=r"falls into 2 parts \(the largest hold 200, 1 rows\)"):
        fitted = DiffusionMap(3, variable_bandwidth=variable).fit(X)
    assert finite(fitted, X)
    assert explained(fitted.embedding_[:200, 1:], CIRCLE) > 0.95


def test_disconnected_parts_are_counted_and_told_apart():
    X = np.concatenate([CIRCLE, CIRCLE[:150] + 50, CIRCLE[:100] - 50])
    with pytest.warns(UserWarning, match="falls into 3 parts"):
        fitted = DiffusionMap(4).fit(X)
    assert fitted.n_components_connected_ == 3
    assert (fitted.eigenvalues_[:2] == 1).all()
    assert (fitted.generator_eigenvalues_[:2] == 0).all()
    centers = np.array(
        [fitted.embedding_[fitted.component_ == part, :2].mean(0) for part in range(3)]
    )
    spread = [
        np.ptp(fitted.embedding_[fitted.component_ == part, :2], axis=0).max() for part in range(3)
    ]
    assert max(spread) < 1e-9
    assert np.linalg.matrix_rank(centers - centers.mean(0)) == 2
    assert finite(fitted, X)


def test_neighbors_are_clamped_with_a_warning():
    with pytest.warns(UserWarning, match="n_neighbors=64 is more than the 39 other samples"):
        fitted = DiffusionMap().fit(CIRCLE[:40])
    assert finite(fitted, CIRCLE[:40])


@pytest.mark.parametrize(
    ("X", "options", "message"),
    [
        (np.ones((50, 3)), {}, "all 50 samples are equal"),
        (CIRCLE[:3], {}, "n_components=2 needs at least 4 samples; got n_samples=3"),
        (CIRCLE[:0], {}, "0 sample"),
        (CIRCLE, {"n_components": 199}, "n_components=199 needs at least 201 samples"),
        (np.repeat(np.eye(3), 40, axis=0), {"n_components": 5}, "more than the data carry: 2"),
        (CIRCLE, {"neighbors": "annoy"}, "neighbors='annoy' is not known"),
        (CIRCLE, {"backend": "jax"}, "backend='jax' is not known"),
        (CIRCLE, {"bandwidth": "silverman"}, "bandwidth='silverman' is not known"),
        (CIRCLE, {"bandwidth": -1.0}, "bandwidth=-1.0 must be positive"),
        (CIRCLE, {"n_components": 0}, "n_components=0 must be at least 1"),
        (CIRCLE, {"n_landmarks": 1}, "n_landmarks=1 must be at least 3"),
        (CIRCLE, {"diffusion_time": -1}, "diffusion_time=-1 must not be negative"),
        (np.where(np.eye(200, 6) > 0, np.nan, CIRCLE), {}, "NaN or infinity: 6 of 200 rows"),
        (np.where(np.eye(200, 6) > 0, np.inf, CIRCLE), {}, "NaN or infinity: 6 of 200 rows"),
        (np.where(np.eye(200, 6, -9) > 0, np.nan, CIRCLE), {}, "the first is row 9"),
        (torch.full((9, 3), float("nan")), {}, "the first is row 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:n_neighbors=64")
def test_impossible_requests_are_refused(X, options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionMap(**options).fit(X)


@pytest.mark.filterwarnings("ignore::UserWarning")
@parametrize_with_checks([DiffusionMap(), DiffusionMap(variable_bandwidth=True)])
def test_scikit_learn_contract(estimator, check):
    check(estimator)
