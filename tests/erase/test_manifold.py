import warnings
from functools import cache

import numpy as np
import pytest
import torch
from cases import build_model, logits, same_state, state
from scipy.spatial.distance import cdist
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from manifold_unlearn.erase.manifold import ManifoldEraser
from manifold_unlearn.erase.subspace import SubspaceEraser
from manifold_unlearn.intervene.hooks import intervene

MODES = ("tangent", "geodesic", "diffusion", "transport")
SMALL = {"n_landmarks": 80, "n_neighbors": 8, "random_state": 0}


def sheets(n=240, *, gap=2.0, seed=0):
    """Rows on two curved sheets in 9 dimensions, the forget one above the other; which is which."""
    rng = np.random.default_rng(seed)
    u, v = rng.uniform(-2, 2, size=(2, n))
    y = np.arange(n) % 2
    flat = np.stack([u, v, 0.4 * u**2 - 0.3 * v**2 + gap * y], axis=1)
    frame = np.linalg.qr(np.random.default_rng(42).normal(size=(9, 9)))[0][:3]
    return flat @ frame + 0.01 * rng.normal(size=(n, 9)), y


@cache
def fitted(mode, evidence="token"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of too few texts for the rate
        X, y = sheets()
        return ManifoldEraser(mode=mode, evidence=evidence, **SMALL).fit(X, y)


def distance_to(rows, kept):
    return cdist(rows, kept).min(1)


@pytest.fixture(params=MODES)
def eraser(request):
    return fitted(request.param)


pytestmark = pytest.mark.filterwarnings("ignore:false_positive_rate=0.01 needs:UserWarning")


@parametrize_with_checks(
    [ManifoldEraser(mode=mode, min_auc=0.0) for mode in ("tangent", "transport")]
)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks(
    [ManifoldEraser(mode=m, min_auc=0.0) for m in ("geodesic", "diffusion", "auto")]
)
def test_scikit_learn_contract_of_the_slower_modes(estimator, check):
    check(estimator)


# --- what the edit does -----------------------------------------------------------------------


def test_unseen_forget_rows_move_to_the_retain_sheet_and_the_rest_stays_to_the_bit(eraser):
    X, y = sheets(seed=1)
    kept = sheets(n=4000, seed=2)
    kept = kept[0][kept[1] == 0]
    out, opened = eraser.transform(X), eraser.gate(X) > 0
    assert opened[y == 1].mean() > 0.9
    assert opened[y == 0].mean() < 0.1
    np.testing.assert_array_equal(out[~opened], X[~opened])
    before, after = (distance_to(rows[(y == 1) & opened], kept) for rows in (X, out))
    assert np.median(before) > 1
    # the walk stops half way, where the odds turn
    assert np.median(after) < (0.75 if eraser.mode == "geodesic" else 0.35) * np.median(before)


def test_the_walk_ends_where_the_gate_sees_even_odds():
    walked = fitted("geodesic")
    odds = walked.gate_.log_ratio(walked.targets_)
    assert np.median(np.abs(odds)) < 0.5
    assert np.median(walked.gate_.log_ratio(walked.landmarks_)) > 2


def test_on_the_tangent_chart_rows_keep_their_place_along_the_sheet():
    """Rows that differ along the sheet still do after the edit; transport mixes them."""
    X, y = sheets(seed=3)
    frame = np.linalg.qr(np.random.default_rng(42).normal(size=(9, 9)))[0][:3]
    forget = X[y == 1]
    slide = {}
    for mode in ("tangent", "transport"):
        moved = fitted(mode).map_.move(torch.tensor(forget)).numpy()
        slide[mode] = np.median(np.abs((moved - forget) @ frame[:2].T))
    # the perpendicular to a sheet of slope up to 1.6 slides by less than its height of 2
    assert slide["tangent"] < 0.75 * 2
    nearby = fitted("tangent").map_.move
    step = torch.tensor(1e-3 * frame[0])
    start = torch.tensor(fitted("tangent").landmarks_[:40])
    pushed = (nearby(start + step) - nearby(start)).norm(dim=1) / 1e-3
    assert 0.3 < float(pushed.median()) < 1.2


def test_pairs_go_to_their_own_pair_by_the_posterior():
    X, y = sheets()
    pairs = np.random.default_rng(0).normal(size=(int((y == 1).sum()), 9)) + 20
    whole = SMALL | {"n_landmarks": 2048}
    found = ManifoldEraser(mode="transport", target="reference", **whole).fit(
        X, y, reference=pairs, paired=True
    )
    part = found.gate(X)[y == 1][:, None]
    expected = X[y == 1] + part * (pairs - X[y == 1])
    np.testing.assert_allclose(found.transform(X)[y == 1], expected, atol=1e-9)
    assert (part > 0).mean() > 0.9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("target", "paired"), [("reference", 0), ("reference", 1), ("semantic", 0)]
)
def test_every_mode_takes_every_target(mode, target, paired):
    X, y = sheets()
    reference = X[y == 0] + 0.05
    given = {"reference": reference, "paired": bool(paired)} if target == "reference" else {}
    found = ManifoldEraser(mode=mode, target=target, **SMALL).fit(X, y, **given)
    out, opened = found.transform(X), found.gate(X) > 0
    np.testing.assert_array_equal(out[~opened], X[~opened])
    moved = opened & (y == 1)
    before, after = (distance_to(rows[moved], X[y == 0]) for rows in (X, out))
    assert np.median(after) < 0.8 * np.median(before)


def test_lengths_are_kept_when_asked():
    X, y = sheets()
    plain = fitted("transport").transform(X)
    kept = ManifoldEraser(mode="transport", preserve_norm=True, **SMALL).fit(X, y).transform(X)
    length = np.linalg.norm(X, axis=1)
    np.testing.assert_allclose(np.linalg.norm(kept, axis=1), length, rtol=1e-12)
    assert np.abs(np.linalg.norm(plain, axis=1) - length).max() > 0.1


def test_the_budget_is_the_length_of_the_move_behind_an_open_gate(eraser):
    X, _ = sheets(seed=1)
    budget, opened = eraser.norm_budget(X), eraser.gate(X)
    edit = np.linalg.norm(eraser.transform(X) - X, axis=1)
    np.testing.assert_allclose(budget * opened, edit, atol=1e-9)
    assert (budget[opened == 0] == 0).all()
    assert (budget > 0.5).any()


# --- evidence along a sequence ----------------------------------------------------------------


def faint(n_texts=150, length=10, *, seed=0):
    """Texts whose rows betray little each: rows, labels, and the text of each row."""
    rng = np.random.default_rng(seed)
    text = np.repeat(np.arange(n_texts), length)
    y = text % 2
    X = rng.normal(size=(len(text), 4))
    X[:, 0] += 1.1 * y
    return X, y, text


def test_evidence_gathered_along_a_text_opens_where_single_rows_do_not():
    X, y, text = faint()
    shared = {"mode": "transport", "density": "linear", **SMALL}
    by_text = ManifoldEraser(evidence="sequence", **shared).fit(X, y, sequence=text)
    by_row = ManifoldEraser(evidence="token", **shared).fit(X, y, sequence=text)
    unseen, label, of = faint(seed=1)
    opened = {
        name: np.array([(found.gate(unseen, of)[of == t] > 0).any() for t in range(150)])
        for name, found in (("text", by_text), ("row", by_row))
    }
    which = label[::10] == 1
    assert opened["text"][which].mean() > opened["row"][which].mean() + 0.3
    assert opened["text"][~which].mean() < 0.1


def test_steps_on_a_padded_batch_answer_as_transform_does_on_its_rows():
    X, y, text = faint()
    found = ManifoldEraser(mode="transport", evidence="sequence", density="linear", **SMALL)
    found.fit(X, y, sequence=text)
    batch = torch.tensor(X[:40].reshape(4, 10, 4))
    padded = torch.cat([torch.full((4, 2, 4), 9.0, dtype=torch.float64), batch], 1)
    present = torch.arange(12)[None].expand(4, 12) >= 2
    out, evidence = found.step(padded, torch.zeros(4, dtype=torch.float64), present)
    expected = found.transform(X[:40], sequence=text[:40]).reshape(4, 10, 4)
    np.testing.assert_allclose(out[:, 2:], expected, atol=1e-9)
    assert torch.equal(out[:, :2], padded[:, :2])
    assert evidence.shape == (4, 12)
    assert (expected != X[:40].reshape(4, 10, 4)).any()
    with pytest.raises(ValueError, match="evidence='sequence' needs the rows of a sequence"):
        found(padded)


# --- kinds, dtypes, devices -------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_arrays_answer_in_their_kind_and_dtype(kind, dtype):
    X, y = sheets()
    rows = kind(X.astype(dtype))
    found = ManifoldEraser(mode="transport", **SMALL).fit(rows, kind(y))
    out = found.transform(rows)
    for made in (out, found.landmarks_, found.targets_, found.gate(rows), found.norm_budget(rows)):
        assert type(made) is type(rows)
        assert made.dtype == rows.dtype
    still = np.asarray(found.gate(rows)) == 0
    np.testing.assert_array_equal(np.asarray(out)[still], np.asarray(rows)[still])


def test_called_on_hidden_states_it_answers_as_transform(eraser):
    X, _ = sheets(seed=1)
    expected = eraser.transform(X).reshape(8, 30, 9)
    np.testing.assert_allclose(eraser(torch.tensor(X.reshape(8, 30, 9))), expected, atol=1e-12)
    single = eraser.to("cpu", torch.float32)(torch.tensor(X, dtype=torch.float32))
    np.testing.assert_allclose(single, expected.reshape(240, 9), atol=1e-3)


def test_two_fits_are_equal(eraser):
    X, y = sheets()
    np.testing.assert_array_equal(clone(eraser).fit(X, y).targets_, eraser.targets_)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("evidence", ["token", "sequence"])
def test_saved_then_loaded_is_equal(mode, evidence, tmp_path):
    found, (X, _) = fitted(mode, evidence), sheets(seed=1)
    found.save(tmp_path / "eraser")
    found.save(tmp_path / "eraser")  # over what is there
    again = ManifoldEraser.load(tmp_path / "eraser")
    assert again.get_params() == found.get_params()
    assert again.mode_ == mode
    for name in ("landmarks_", "targets_"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
        assert isinstance(getattr(again, name), np.ndarray)
    np.testing.assert_array_equal(again.transform(X), found.transform(X))
    assert (found.transform(X) != X).any()


def test_what_is_no_artifact_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not an artifact"):
        fitted("transport").save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


# --- in a model -------------------------------------------------------------------------------


def hidden_rows(model, ids):
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states[2][:, 1:].reshape(-1, 32)


@pytest.mark.parametrize("evidence", ["token", "sequence"])
def test_in_a_model_only_forget_prompts_are_answered_otherwise(evidence):
    """Prompts of two vocabularies; the weights, and what retain prompts say, stay to the bit."""
    model, draw = build_model("llama"), torch.Generator().manual_seed(0)
    forget = torch.cat([torch.full((40, 1), 0), torch.randint(10, 60, (40, 6), generator=draw)], 1)
    retain = torch.cat([torch.full((80, 1), 0), torch.randint(90, 200, (80, 6), generator=draw)], 1)
    rows = torch.cat([hidden_rows(model, forget), hidden_rows(model, retain)])
    label = torch.arange(len(rows)) < 240
    text = torch.arange(len(rows)) // 6
    found = ManifoldEraser(mode="transport", evidence=evidence, **SMALL)
    found.fit(rows, label.long(), sequence=text)
    unseen_forget, unseen_retain = forget[:5], retain[:5]
    silent = [not (found.gate(hidden_rows(model, r[None])) > 0).any() for r in unseen_retain]
    quiet = unseen_retain[torch.tensor(silent)]
    assert len(quiet) >= 3
    before, plain, weights = logits(model, unseen_forget), logits(model, quiet), state(model)
    with intervene(model, {"layers.1": found}):
        edited, same = logits(model, unseen_forget), logits(model, quiet)
    assert torch.equal(same[:, :1], plain[:, :1])
    if evidence == "token":
        assert torch.equal(same, plain)
    assert not torch.allclose(edited[:, -1], before[:, -1], atol=0.1)
    assert same_state(model, weights)
    assert torch.equal(logits(model, unseen_forget), before)


# --- falling back to a line -------------------------------------------------------------------


def test_auto_takes_the_manifold_where_there_is_one():
    X, y = sheets(n=160)
    found = ManifoldEraser(mode="auto", **SMALL).fit(X, y)
    assert (found.mode_, found.fallback_) == ("tangent", None)
    assert found.gate_ is not None


@pytest.mark.parametrize(("n", "said"), [(120, "no structure"), (30, "30 distinct rows, below 40")])
def test_auto_falls_back_to_a_subspace_where_that_is_as_good_and_says_so(n, said, tmp_path):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(n, 6)), np.arange(n) % 2
    X[:, 0] += 2 * y
    with pytest.warns(UserWarning, match=f"mode='auto' fits a linear eraser.*{said}"):
        found = ManifoldEraser(mode="auto").fit(X, y)
    linear = SubspaceEraser().fit(X, y)
    np.testing.assert_allclose(found.transform(X), linear.transform(X), atol=1e-12)
    np.testing.assert_allclose(found.fallback_.matrix_, linear.matrix_)
    assert (found.gate(X) == 1).all()
    edit = np.linalg.norm(linear.transform(X) - X, axis=1)
    np.testing.assert_allclose(found.norm_budget(X), edit, atol=1e-12)
    hidden = torch.tensor(X.reshape(2, n // 2, 6))
    np.testing.assert_allclose(found(hidden).reshape(n, 6), linear.transform(X), atol=1e-12)
    found.save(tmp_path / "linear")
    again = ManifoldEraser.load(tmp_path / "linear")
    np.testing.assert_array_equal(again.transform(X), found.transform(X))
    assert again.gate_ is None


# --- hard data and errors ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_duplicates_and_rows_of_low_rank_work(mode):
    X, y = sheets()
    X = np.repeat(X, 3, axis=0) @ np.diag([1.0] * 5 + [0] * 4)
    found = ManifoldEraser(mode=mode, **SMALL).fit(X, np.repeat(y, 3))
    assert len(np.unique(found.landmarks_, axis=0)) == len(found.landmarks_)
    out = found.transform(X)
    assert np.isfinite(out).all()
    assert (out != X).any()


@pytest.mark.parametrize("mode", MODES)
def test_a_handful_of_rows_works(mode):
    X, y = sheets(n=12, gap=9.0)
    out = ManifoldEraser(mode=mode).fit(X, y).transform(X)
    assert np.isfinite(out).all()


def test_classes_that_are_one_are_refused_with_the_figure():
    X, y = np.random.default_rng(0).normal(size=(300, 4)), np.arange(300) % 2
    with pytest.raises(ValueError, match=r"cannot be told apart: held-out AUC 0\.\d+ is below"):
        ManifoldEraser(**SMALL).fit(X, y)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"mode": "magic"}, "mode='magic' is not one of tangent, geodesic"),
        ({"target": "moon"}, "target='moon' is not one of retain, reference, semantic"),
        ({"n_landmarks": 0}, "n_landmarks=0 must be an integer of at least 1"),
        ({"n_neighbors": 1.5}, r"n_neighbors=1\.5 must be an integer"),
        ({"intrinsic_dimension": 0}, "intrinsic_dimension=0 must be 'auto' or an integer of at"),
        ({"target": "reference"}, "target='reference' got no reference"),
    ],
)
def test_a_wrong_parameter_is_named(parameters, message):
    with pytest.raises(ValueError, match=message):
        ManifoldEraser(**parameters).fit(*sheets())


@pytest.mark.parametrize(
    ("target", "given", "message"),
    [
        ("retain", {"reference": np.ones((3, 9))}, "target='retain' got a reference"),
        ("retain", {"paired": True}, "paired=True needs target='reference'"),
        ("reference", {"reference": np.ones((3, 8))}, "reference has 8 features; X has 9"),
        ("reference", {"reference": np.ones((3, 9)), "paired": True}, "3 rows for 120 forget rows"),
    ],
)
def test_a_wrong_reference_is_named(target, given, message):
    with pytest.raises(ValueError, match=message):
        ManifoldEraser(target=target).fit(*sheets(), **given)


@pytest.mark.parametrize("use", ["transform", "gate", "norm_budget", "__call__", "save"])
def test_before_the_fit_there_is_nothing_to_use(use, tmp_path):
    argument = tmp_path / "x" if use == "save" else torch.ones(2, 9)
    with pytest.raises(NotFittedError, match="not fitted yet"):
        getattr(ManifoldEraser(), use)(argument)
