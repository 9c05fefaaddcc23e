import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from manifold_unlearn.manifold import samples
from manifold_unlearn.manifold.tangent import TangentBundle


def isometry(n_features, dimension, seed=0):
    rng = np.random.default_rng(seed)
    return np.linalg.qr(rng.standard_normal((n_features, dimension)))[0].T


def high_sphere(k, n_samples, n_features=64, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    unit = rng.standard_normal((n_samples, k + 1))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return unit @ isometry(n_features, k + 1) + noise * rng.standard_normal((n_samples, n_features))


def cylinder(n_samples, radius=1.0, n_features=16):
    rng = np.random.default_rng(0)
    angle, z = rng.uniform(0, 2 * np.pi, n_samples), rng.uniform(-2, 2, n_samples)
    flat = np.stack([radius * np.cos(angle), radius * np.sin(angle), z], 1)
    return flat @ isometry(n_features, 3), np.abs(z) < 1.5


def round_torus(n_samples, R=3.0, r=1.0, n_features=16):
    rng = np.random.default_rng(0)
    u = rng.uniform(0, 2 * np.pi, n_samples)
    many = rng.uniform(0, 2 * np.pi, 4 * n_samples)
    v = many[rng.uniform(0, R + r, len(many)) < R + r * np.cos(many)][:n_samples]
    ring = R + r * np.cos(v)
    flat = np.stack([ring * np.cos(u), ring * np.sin(u), r * np.sin(v)], 1)
    return flat @ isometry(n_features, 3), np.cos(v) / (r * (R + r * np.cos(v)))


def off_sphere(points, sample, radius=1.0):
    """Distances to the sphere or circle that the sample was drawn from."""
    flat = points @ sample.isometry.T
    beside = np.linalg.norm(points - flat @ sample.isometry, axis=1)
    return np.hypot(np.linalg.norm(flat, axis=1) - radius, beside)


def off_roll(points, sample):
    flat = points @ sample.isometry.T
    beside = np.linalg.norm(points - flat @ sample.isometry, axis=1)
    t = np.linspace(1.4 * np.pi, 4.6 * np.pi, 4001)
    curve = np.stack([t * np.cos(t), t * np.sin(t)], 1)
    to_curve = torch.cdist(torch.tensor(flat[:, [0, 2]]), torch.tensor(curve)).amin(1).numpy()
    return np.hypot(to_curve, beside)


def rms(values):
    return float(np.sqrt(np.mean(np.square(values))))


SPHERE = samples.sphere(2000, n_features=32, random_state=0)
BUNDLE = TangentBundle().fit(SPHERE.points)


# projection


def test_a_sphere_is_recovered_far_inside_the_sagitta_of_a_flat_patch():
    new = samples.sphere(500, n_features=32, random_state=1).points @ samples_change(1)
    feet = BUNDLE.project(1.05 * new)
    reach = np.sqrt(4 * BUNDLE.n_neighbors_ / len(SPHERE.points))  # of a patch of that many rows
    assert off_sphere(feet, SPHERE).max() < 2e-4 < 0.01 * reach**2 / 2
    assert off_sphere(1.05 * new, SPHERE).min() > 0.049


def samples_change(seed):
    """Isometry between the embeddings of two samples of spheres."""
    other = samples.sphere(500, n_features=32, random_state=seed)
    return other.isometry.T @ SPHERE.isometry


def test_feet_are_the_nearest_points_and_their_own_feet():
    off = SPHERE.points[:300] * np.linspace(0.7, 1.3, 300)[:, None]
    feet = BUNDLE.project(off)
    nearest = off / np.linalg.norm(off, axis=1, keepdims=True)
    np.testing.assert_allclose(feet, nearest, atol=1e-3)
    np.testing.assert_allclose(BUNDLE.project(feet), feet, atol=1e-8)
    np.testing.assert_allclose(
        BUNDLE.normal_distance(off), np.abs(np.linalg.norm(off, axis=1) - 1), atol=2e-4
    )
    bases = BUNDLE.tangent_bases(off)
    along = np.einsum("ndk,nd->nk", bases, off - feet)
    assert np.abs(along).max() < 1e-7


NOISY = {  # sample of a noise, its distance, the noise, and the factor that the distance falls by
    "circle": (samples.circle, off_sphere, 0.05, 7.0),
    "sphere": (samples.sphere, off_sphere, 0.05, 5.0),
    "roll": (samples.swiss_roll, off_roll, 0.1, 2.5),
}


@pytest.mark.parametrize("name", NOISY)
def test_projection_takes_noise_off(name):
    make, distance, noise, factor = NOISY[name]
    sample = make(1500, n_features=64, noise=noise, random_state=0)
    bundle = TangentBundle().fit(sample.points)
    assert bundle.dimension_ == sample.intrinsic_dimension
    assert bundle.noise_ == pytest.approx(noise, rel=0.15)
    assert bundle.n_neighbors_ > 32
    rows = sample.points[::15]
    with np.testing.suppress_warnings() as quiet:
        quiet.filter(UserWarning)
        feet = bundle.project(rows)
    assert rms(distance(rows, sample)) > factor * rms(distance(feet, sample))


def test_beyond_its_ends_the_manifold_is_not_continued_far():
    rng = np.random.default_rng(0)
    sheet = rng.uniform(size=(1000, 2)) @ isometry(8, 2)
    bundle = TangentBundle().fit(sheet)
    out = (np.array([[2.0, 0.5], [-3.0, -3.0], [0.5, 0.5]]) @ isometry(8, 2)) + 0.0
    feet = bundle.project(out) @ isometry(8, 2).T
    assert (feet > -0.2).all()
    assert (feet < 1.2).all()
    np.testing.assert_allclose(feet[2], [0.5, 0.5], atol=1e-9)
    again = bundle.project(feet @ isometry(8, 2)) @ isometry(8, 2).T
    np.testing.assert_allclose(again, feet, atol=1e-8)


# dimension


SLOW = pytest.mark.slow


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("k", [1, 2, *(pytest.param(k, marks=SLOW) for k in (3, 5, 10))])
def test_dimension_of_spheres_is_found_through_noise(k, noise):
    X = high_sphere(k, 1500 if k > 2 else 700, noise=noise)
    assert TangentBundle().fit(X).dimension_ == k


@pytest.mark.parametrize("noise", [0.0, pytest.param(0.1, marks=SLOW), 0.3])
def test_dimension_of_a_roll_is_two(noise):
    X = samples.swiss_roll(1000, n_features=64, noise=noise, random_state=0).points
    assert TangentBundle().fit(X).dimension_ == 2


def test_local_dimension_tells_a_curve_from_a_sheet():
    rng = np.random.default_rng(0)
    sheet = np.c_[rng.uniform(-1, 1, (800, 2)), np.zeros(800)]
    needle = np.c_[np.zeros((400, 2)), rng.uniform(2, 4, 400)]
    bundle = TangentBundle().fit(np.concatenate([sheet, needle]) @ isometry(10, 3))
    assert np.median(bundle.local_dimension_[:800]) == 2
    assert np.mean(bundle.local_dimension_[:800] == 2) > 0.95
    assert np.mean(bundle.local_dimension_[800:] == 1) > 0.95


def test_noise_without_a_manifold_is_doubted():
    X = np.random.default_rng(0).standard_normal((200, 64))
    with pytest.warns(UserWarning, match="no dimension stands out"):
        TangentBundle().fit(X)


# tangents and curvature


def test_tangents_are_orthonormal_and_tangent():
    bases = BUNDLE.tangent_bases(SPHERE.points[:200])
    np.testing.assert_allclose(
        np.einsum("ndk,ndl->nkl", bases, bases), np.tile(np.eye(2), (200, 1, 1)), atol=1e-9
    )
    assert np.abs(np.einsum("ndk,nd->nk", bases, SPHERE.points[:200])).max() < 5e-3


@pytest.mark.parametrize(("k", "radius"), [(2, 1.0), (2, 5.0), (3, 2.0)])
def test_spheres_bend_equally_in_all_directions(k, radius):
    bundle = TangentBundle(k).fit(radius * high_sphere(k, 2500, n_features=16))
    rows = bundle.landmarks_[:400]
    bent = bundle.curvature(rows)
    np.testing.assert_allclose(np.median(bent.principal, 0), 1 / radius, rtol=0.04 * k)
    assert np.median(bent.gauss) == pytest.approx(1 / radius**2, rel=0.06 * k)
    assert np.median(bent.scalar) == pytest.approx(k * (k - 1) / radius**2, rel=0.06 * k)
    np.testing.assert_allclose(bent.mean, -rows / radius**2, atol=0.12 * k / radius)
    form = bundle.second_fundamental_form(rows)
    assert form.shape == (400, k, k, 16)
    np.testing.assert_allclose(form, form.swapaxes(1, 2))
    assert np.abs(np.einsum("nabd,ndc->nabc", form, bundle.tangent_bases(rows))).max() < 1e-6


def test_a_cylinder_bends_one_way():
    X, inside = cylinder(2500, radius=0.8)
    bundle = TangentBundle().fit(X)
    bent = bundle.curvature(X[inside][:400])
    assert np.median(bent.principal[:, 0]) == pytest.approx(1.25, rel=0.02)
    assert np.median(bent.principal[:, 1]) < 0.03
    assert np.abs(np.median(bent.gauss)) < 0.02
    axis = np.array([0, 0, 1.0]) @ isometry(16, 3)
    assert np.median(np.abs(bent.directions[:, :, 1] @ axis)) > 0.999


def test_gauss_curvature_of_a_round_torus_changes_sign():
    X, truth = round_torus(4000)
    bundle = TangentBundle().fit(X)
    found = bundle.curvature(X[:300]).gauss
    assert np.median(np.abs(found - truth[:300])) < 0.02
    assert np.corrcoef(found, truth[:300])[0, 1] > 0.97


def test_a_flat_torus_is_bent_but_intrinsically_flat():
    sample = samples.flat_torus(3000, n_features=16, radii=(1.0, 2.0), random_state=0)
    bent = TangentBundle().fit(sample.points).curvature(sample.points[:400])
    np.testing.assert_allclose(np.median(bent.principal, 0), [1.0, 0.5], rtol=0.06)
    assert np.abs(np.median(bent.gauss)) < 0.02


def test_a_roll_bends_one_way_and_a_plane_not_at_all():
    sample = samples.swiss_roll(2500, n_features=16, random_state=0)
    bent = TangentBundle().fit(sample.points).curvature(sample.points[:400])
    assert np.median(bent.principal[:, 1] / bent.principal[:, 0]) < 0.1
    assert np.abs(np.median(bent.gauss)) < 1e-3
    plane = np.random.default_rng(0).uniform(size=(500, 2)) @ isometry(16, 2)
    assert np.abs(TangentBundle().fit(plane).curvature(plane).principal).max() < 1e-5


def test_noise_does_not_pass_for_curvature():
    X = samples.circle(2000, n_features=64, noise=0.02, random_state=0).points
    bundle = TangentBundle().fit(X)
    bent = bundle.curvature(X[::20]).principal[:, 0]
    raw = np.linalg.norm(bundle.second_fundamental_form(X[::20])[:, 0, 0], axis=1)
    assert np.median(bent) == pytest.approx(1, abs=0.15)
    assert np.median(raw) > 1.2


def test_metric_is_that_of_the_chart():
    np.testing.assert_allclose(
        BUNDLE.metric(SPHERE.points[:50]), np.tile(np.eye(2), (50, 1, 1)), atol=1e-6
    )
    between = SPHERE.points[:200] + 0.02 * np.random.default_rng(0).standard_normal((200, 32))
    forms = BUNDLE.metric(between)
    values = np.linalg.eigvalsh(forms)
    assert (values >= 1 - 1e-9).all()
    assert 1e-5 < (values - 1).max() < 0.05


# laws


BASE = samples.sphere(400, n_features=6, random_state=0).points
PLAIN = TangentBundle(2).fit(BASE)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from([1e-8, 1e-3, 1.0, 1e8]), st.floats(-1e2, 1e2))
def test_rotation_translation_scale_and_order_carry_over(seed, scale, shift):
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    order = rng.permutation(len(BASE))
    queries = BASE[:40] * 1.1
    moved = TangentBundle().fit(scale * (BASE @ rotation + shift)[order])
    assert moved.dimension_ == 2
    feet = moved.project(scale * (queries @ rotation + shift))
    np.testing.assert_allclose(feet / scale - shift, PLAIN.project(queries) @ rotation, atol=1e-6)


def test_rows_are_projected_alike_alone_and_together():
    off = 1.1 * SPHERE.points[:60]
    split = np.concatenate([BUNDLE.project(part) for part in np.array_split(off, 7)])
    np.testing.assert_allclose(split, BUNDLE.project(off), atol=1e-9)


def test_single_and_double_precision_agree():
    single = TangentBundle().fit(SPHERE.points.astype(np.float32))
    feet = single.project(SPHERE.points[:100].astype(np.float32))
    assert feet.dtype == np.float32
    np.testing.assert_allclose(feet, BUNDLE.project(SPHERE.points[:100]), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors_in_tensors_out(dtype):
    X = torch.from_numpy(BASE).to(dtype)
    fitted = TangentBundle(2).fit(X)
    bent = fitted.curvature(X)
    answers = [fitted.project(X), fitted.transform(X), fitted.tangent_bases(X), fitted.metric(X)]
    answers += [fitted.normal_distance(X), fitted.second_fundamental_form(X), *bent]
    assert all(a.dtype == dtype and a.device == X.device for a in answers)
    assert isinstance(fitted.local_dimension_, torch.Tensor)
    assert isinstance(fitted.project(BASE), np.ndarray)
    np.testing.assert_allclose(answers[0].double(), PLAIN.project(BASE), atol=0.02)


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_saved_and_loaded_it_answers_the_same(tmp_path, kind):
    X = kind(BASE)
    fitted = TangentBundle(n_landmarks=300).fit(X)
    fitted.save(tmp_path / "bundle")
    loaded = TangentBundle.load(tmp_path / "bundle")
    assert loaded.get_params() == fitted.get_params()
    assert type(loaded.landmarks_) is type(fitted.landmarks_)
    assert (loaded.project(X) == fitted.project(X)).all()
    assert (loaded.curvature(X).gauss == fitted.curvature(X).gauss).all()


@pytest.mark.parametrize("random_state", [None, 0])
def test_landmarks_stand_for_all_rows(random_state):
    fitted = TangentBundle(n_landmarks=900, random_state=random_state).fit(SPHERE.points)
    assert len(fitted.landmark_indices_) == 900
    assert len(fitted.local_dimension_) == 2000
    assert fitted.dimension_ == 2
    assert off_sphere(fitted.project(SPHERE.points[:200]), SPHERE).max() < 2e-3
    again = clone(fitted).fit(SPHERE.points)
    assert np.array_equal(again.landmarks_, fitted.landmarks_)


def test_signature_is_the_contract():
    parameters = inspect.signature(TangentBundle).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    assert defaults == {
        "intrinsic_dimension": "auto",
        "n_neighbors": 32,
        "n_landmarks": None,
        "device": "auto",
        "random_state": None,
    }
    assert vars(TangentBundle()) == defaults
    with pytest.raises(NotFittedError, match="not fitted yet"):
        TangentBundle().curvature(BASE)


# bad input


def finite(fitted, X):
    answers = [fitted.project(X), fitted.tangent_bases(X), fitted.normal_distance(X)]
    answers.append(fitted.metric(X))
    return all(np.isfinite(np.asarray(a)).all() for a in answers)


def test_duplicates_change_nothing():
    twice = TangentBundle().fit(np.concatenate([BASE, BASE[:200], BASE[:200]]))
    np.testing.assert_array_equal(twice.landmark_indices_, np.arange(400))
    np.testing.assert_allclose(twice.project(BASE[:50]), PLAIN.project(BASE[:50]), atol=1e-9)
    assert len(twice.local_dimension_) == 800


def test_a_far_outlier_is_left_out_and_projected():
    X = np.concatenate([BASE, np.full((1, 6), 1e6)])
    with pytest.warns(UserWarning, match="1 of 401 samples lie more than 30 times"):
        fitted = TangentBundle().fit(X)
    assert 400 not in fitted.landmark_indices_
    assert finite(fitted, X)
    assert np.linalg.norm(fitted.project(X[-1:])) < 1.3
    np.testing.assert_allclose(fitted.project(BASE), PLAIN.project(BASE), atol=1e-9)


def test_parts_keep_to_themselves():
    X = np.concatenate([BASE, BASE + 100])
    fitted = TangentBundle().fit(X)
    np.testing.assert_allclose(fitted.project(1.1 * BASE[:50]), PLAIN.project(1.1 * BASE[:50]))


ODD = {
    "constant columns": np.c_[BASE, np.ones((400, 3))][:150],
    "rank one": np.linspace(0, 1, 200)[:, None] * np.arange(1.0, 5.0),
    "one column": np.random.default_rng(0).uniform(size=(100, 1)),
    "wide": high_sphere(2, 40, n_features=200),
    "few": BASE[:12],
    "grid": np.stack(np.meshgrid(*[np.arange(12.0)] * 2), -1).reshape(-1, 2),
    "three": BASE[:3],
    "integers": np.random.default_rng(0).integers(0, 5, (100, 3)),
    "equally far": np.eye(40),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_odd_data_give_finite_answers(name):
    fitted = TangentBundle().fit(ODD[name])
    assert finite(fitted, ODD[name].astype(float))
    assert finite(fitted, ODD[name].astype(float) * 1e3)


def test_rank_one_is_a_line():
    X = ODD["rank one"]
    fitted = TangentBundle().fit(X)
    assert fitted.dimension_ == 1
    np.testing.assert_allclose(fitted.project(X), X, atol=1e-9)


def test_neighbors_are_clamped_with_a_warning():
    with pytest.warns(UserWarning, match="n_neighbors=32 is more than the 19 other distinct"):
        fitted = TangentBundle().fit(BASE[:20])
    assert finite(fitted, BASE[:20])


def test_linear_charts_have_no_curvature():
    fitted = TangentBundle(5, n_neighbors=2).fit(BASE)
    assert fitted.order_ == 1
    with pytest.raises(ValueError, match="Fit with n_neighbors=32 or more"):
        fitted.curvature(BASE)


def test_rows_without_a_foot_are_reported():
    X = samples.circle(200, n_features=64, noise=0.3, random_state=0).points
    fitted = TangentBundle(1, n_neighbors=6).fit(X)
    with pytest.warns(UserWarning, match="rows reach no fixed point"):
        feet = fitted.project(X)
    assert np.isfinite(feet).all()


@pytest.mark.parametrize(
    ("X", "options", "message"),
    [
        (np.ones((50, 3)), {}, "only 1 of 50 samples are distinct"),
        (BASE[:2], {}, "at least 3 samples; got n_samples=2"),
        (BASE[:0], {}, "0 sample"),
        (BASE[:5], {"intrinsic_dimension": 4}, "needs at least 6 distinct samples; got 5"),
        (BASE, {"intrinsic_dimension": 7}, "intrinsic_dimension=7 is more than the 6 features"),
        (BASE, {"intrinsic_dimension": 0}, "intrinsic_dimension=0 must be at least 1"),
        (BASE, {"intrinsic_dimension": "two"}, "intrinsic_dimension='two' is not known"),
        (BASE, {"n_neighbors": 1}, "n_neighbors=1 must be at least 2"),
        (BASE, {"n_landmarks": 2}, "n_landmarks=2 must be at least 3"),
        (np.where(np.eye(400, 6) > 0, np.nan, BASE), {}, "NaN or infinity: 6 of 400 rows"),
        (np.where(np.eye(400, 6) > 0, np.inf, BASE), {}, "NaN or infinity: 6 of 400 rows"),
    ],
)
@pytest.mark.filterwarnings("ignore:n_neighbors=32")
def test_impossible_requests_are_refused(X, options, message):
    with pytest.raises(ValueError, match=message):
        TangentBundle(**options).fit(X)


@pytest.mark.filterwarnings("ignore::UserWarning")
@parametrize_with_checks([TangentBundle(), TangentBundle(1)])
def test_scikit_learn_contract(estimator, check):
    check(estimator)
