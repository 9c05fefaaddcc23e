import copy
import warnings

import numpy as np
import pytest
import torch
from cases import TEXTS, WIDTH, build_model, hooks, logits, same_state, state, two_classes
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from manifold_unlearn import Edit, ForgetGate, ManifoldEraser, bake, capture, intervene
from manifold_unlearn.steer.conditional import ConditionalVector
from manifold_unlearn.steer.gated import GatedVector
from manifold_unlearn.steer.strengths import with_strength
from manifold_unlearn.steer.vectors import SteeringVector

CONDITIONS = {
    "cosine": {},
    "projection": {"similarity": "projection"},
    "pca": {"condition": "pca"},
    "probe": {"condition": "probe", "preserve_norm": True},
}


@pytest.fixture(params=CONDITIONS)
def parameters(request):
    return CONDITIONS[request.param]


def apart(n=1000, d=10, *, seed=0, shift=8.0):
    """Rows where to steer lie ``shift`` standard deviations from the others; all have a mean."""
    rng = np.random.default_rng(seed)
    X, y = rng.normal(size=(n, d)) + 3, np.arange(n) % 2
    X[:, 0] += shift * y
    return X, y


def fit(X, y, **parameters):
    arguments = {
        name: parameters.pop(name)
        for name in ("vector", "sequence", "calibration", "calibration_sequence")
        if name in parameters
    }
    return ConditionalVector(**({"random_state": 0} | parameters)).fit(X, y, **arguments)


# --- where it steers ------------------------------------------------------------------------


def test_rows_where_the_condition_holds_move_by_the_vector_and_others_stay_to_the_bit(parameters):
    X, y = apart()
    vector = np.linspace(-1, 1, 10)
    fitted = fit(X, y, vector=vector, strength=1.5, **parameters)
    after, opened = fitted.transform(X), fitted.gate(X) == 1
    expected = X + 1.5 * vector
    if fitted.preserve_norm:
        lengths = [np.linalg.norm(rows, axis=1, keepdims=True) for rows in (X, expected)]
        expected = expected * lengths[0] / lengths[1]
    np.testing.assert_allclose(after[opened], expected[opened], rtol=1e-12)
    np.testing.assert_array_equal(after[~opened], X[~opened])
    assert opened[y == 1].mean() > 0.95
    assert opened[y == 0].mean() < 0.03
    np.testing.assert_array_equal(opened, fitted.scores(X) > fitted.threshold_)
    assert fitted.detection_rate_ == opened[y == 1].mean()


def test_scores_are_cosines_about_the_middle_of_the_classes():
    X, y = apart(200)
    fitted = fit(X, y, calibration=X[y == 0][:50], false_positive_rate=0.1)
    center = (X[y == 1].mean(0) + X[y == 0].mean(0)) / 2
    axis = X[y == 1].mean(0) - X[y == 0].mean(0)
    rows = X - center
    expected = rows @ axis / np.linalg.norm(axis) / np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(fitted.scores(X), expected, rtol=1e-10)
    fitted.similarity = "projection"
    np.testing.assert_allclose(fitted.scores(X), rows @ axis / np.linalg.norm(axis), rtol=1e-10)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_the_stated_rate_holds_on_new_rows_of_overlapping_classes(rate):
    """Mean over fits of the rate measured on many new rows; its standard error is under 0.01."""
    found, detected = [], []
    for seed in range(12):
        X, y = apart(1200, seed=seed, shift=2.0)
        fitted = fit(X, y, similarity="projection", false_positive_rate=rate, random_state=seed)
        new, new_y = apart(4000, seed=1000 + seed, shift=2.0)
        found.append(fitted.gate(new)[new_y == 0].mean())
        detected.append(fitted.gate(new)[new_y == 1].mean())
        assert fitted.n_calibration_ == 300
        assert fitted.promised_rate_ <= rate
    assert np.mean(found) == pytest.approx(rate, abs=0.02)
    assert np.mean(found) <= rate + 0.01
    assert np.mean(detected) > np.mean(found) + 0.2


def test_the_threshold_is_the_conformal_one_of_the_rows_held_out():
    X, y = apart(60)
    held = np.random.default_rng(7).normal(size=(99, 10)) + 3
    fitted = fit(X, y, calibration=held, false_positive_rate=0.05)
    ordered = np.sort(fitted.scores(held))
    assert ordered[95 - 1] < fitted.threshold_ < ordered[95]  # ceil(100 * 0.95)
    assert fitted.threshold_ == pytest.approx(ordered[95 - 1], abs=2e-5)
    assert fitted.promised_rate_ == pytest.approx(0.05)
    assert fitted.n_calibration_ == 99


@pytest.mark.parametrize("similarity", ["cosine", "projection"])
def test_a_row_that_all_texts_share_does_not_open_by_rounding(similarity):
    """Texts that begin alike: of their scores the one of the beginning is the largest."""
    X, y = apart(60)
    X[:, 1] -= 4
    shared = X[y == 1][0] - 2 * (X[y == 1].mean(0) - X[y == 0].mean(0)) / 3
    held = np.concatenate([np.tile(shared, (40, 1)), X[y == 0] - 1])
    text = np.concatenate([np.arange(40), np.arange((y == 0).sum()) % 40])
    fitted = fit(
        X, y, calibration=held, calibration_sequence=text, similarity=similarity,
        evidence="sequence", false_positive_rate=0.1,
    )  # fmt: skip
    rounded = shared * (1 + 1e-6 * np.random.default_rng(3).standard_normal((200, 1)))
    assert fitted.scores(rounded).max() > fitted.scores(shared[None])[0]
    assert not fitted.gate(rounded).any()


def test_rows_held_out_have_no_part_in_the_direction():
    X, y = apart(400)
    fitted = fit(X, y, held_out=0.25, false_positive_rate=0.05)
    assert fitted.n_calibration_ == 50
    with_all = SteeringVector().fit(X, y).vector_
    assert np.abs(fitted.direction_ - with_all / np.linalg.norm(with_all)).max() > 1e-4
    calibrated = fit(X, y, calibration=X[y == 0], false_positive_rate=0.05)
    np.testing.assert_allclose(calibrated.direction_, with_all / np.linalg.norm(with_all))


def test_too_few_rows_held_out_are_said_with_the_rate_that_holds():
    X, y = apart(40)
    with pytest.warns(UserWarning, match="10 rows or texts set the threshold; .*=0.01 needs 99"):
        fitted = fit(X, y)
    assert fitted.promised_rate_ == pytest.approx(1 / 11)
    held = fitted.scores(X[y == 0])
    assert np.abs(held - fitted.threshold_).min() < 2e-5


def test_without_a_vector_the_difference_of_the_means_is_added():
    X, y = apart(400)
    expected = X[y == 1].mean(0) - X[y == 0].mean(0)
    np.testing.assert_allclose(fit(X, y, false_positive_rate=0.05).vector_, expected, rtol=1e-12)


def test_a_fitted_vector_counts_as_what_it_adds():
    X, y = apart(400)
    behavior = SteeringVector.given(np.arange(10.0), strength=0.5)
    fitted = fit(X, y, vector=behavior, strength=2.0, false_positive_rate=0.05)
    np.testing.assert_array_equal(fitted.vector_, np.arange(10.0) / 2)
    inside = X[fitted.gate(X) == 1]
    np.testing.assert_allclose(fitted.transform(inside), inside + np.arange(10.0))


def test_two_fits_are_equal_and_another_draw_is_another():
    X, y = apart(400, shift=2.0)
    one, same, other = (
        fit(X, y, false_positive_rate=0.05, random_state=seed).threshold_ for seed in (0, 0, 1)
    )
    assert one == same != other


@parametrize_with_checks([ConditionalVector(random_state=0, **p) for p in CONDITIONS.values()])
def test_scikit_learn_contract(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        check(estimator)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_of_any_precision_keep_it(parameters, dtype):
    X, y = apart(400)
    fitted = fit(torch.tensor(X), torch.tensor(y), false_positive_rate=0.05, **parameters)
    rows = torch.tensor(X).to(dtype).reshape(4, -1, 10)
    out = fitted(rows)
    assert (out.dtype, out.shape) == (dtype, rows.shape)
    opened = fitted.gate(rows.reshape(-1, 10)).reshape(4, -1) == 1
    assert 0.4 < opened.float().mean() < 0.6
    assert torch.equal(out[~opened], rows[~opened])
    exact = fitted.to("cpu", torch.float64).moved(rows.double(), opened.double())
    step = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 2**-20)
    torch.testing.assert_close(out.double(), exact, rtol=1.01 * step, atol=1e-6)


@pytest.mark.parametrize("evidence", ["token", "sequence"])
def test_saved_then_loaded_is_equal(evidence, tmp_path):
    X, y = apart(400)
    fitted = fit(torch.tensor(X), y, false_positive_rate=0.05, evidence=evidence)
    fitted.save(tmp_path / "vector")
    again = ConditionalVector.load(tmp_path / "vector")
    assert again.get_params() == fitted.get_params()
    assert again.threshold_ == fitted.threshold_
    assert torch.equal(again.transform(torch.tensor(X)), fitted.transform(torch.tensor(X)))


# --- along a text ---------------------------------------------------------------------------


def texts(n=200, length=6, *, seed=0):
    """Texts of one kind reach the condition at one row each, those of the other never."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, length, 10)) + 3
    y, at = np.arange(n) % 2, rng.integers(1, length, n)
    X[y == 1, at[y == 1], 0] += 14
    return X, y, at


def fit_texts(**parameters):
    X, y, at = texts()
    told = (y[:, None] == 1) & (np.arange(6) == at[:, None])
    rows, label = X.reshape(-1, 10), told.reshape(-1).astype(int)
    fitted = fit(
        rows,
        label,
        evidence="sequence",
        sequence=np.repeat(np.arange(len(X)), 6),
        false_positive_rate=0.05,
        vector=np.eye(10)[4],
        similarity="projection",
        **parameters,
    )
    return fitted, X, y, at


def test_from_the_first_row_that_opens_on_the_text_is_steered():
    fitted, X, y, at = fit_texts()
    text = np.repeat(np.arange(len(X)), 6)
    moved = (fitted.transform(X.reshape(-1, 10), text) != X.reshape(-1, 10)).any(1).reshape(-1, 6)
    first = np.argmax(fitted.scores(X.reshape(-1, 10)).reshape(-1, 6) > fitted.threshold_, axis=1)
    opened = (fitted.scores(X.reshape(-1, 10)).reshape(-1, 6) > fitted.threshold_).any(1)
    np.testing.assert_array_equal(moved, opened[:, None] & (np.arange(6) >= first[:, None]))
    assert moved[y == 1, -1].mean() > 0.95
    assert moved[y == 0].any(1).mean() < 0.1


def test_rows_of_texts_in_any_interleaving_open_alike():
    fitted, X, _, _ = fit_texts()
    text = np.tile(np.arange(len(X)), 6)
    rows = X.transpose(1, 0, 2).reshape(-1, 10)  # all first rows, then all second ones
    plain = fitted.gate(X.reshape(-1, 10), np.repeat(np.arange(len(X)), 6)).reshape(-1, 6)
    np.testing.assert_array_equal(fitted.gate(rows, text).reshape(6, -1).T, plain)


def test_steps_of_a_cached_text_are_those_of_the_whole():
    fitted, X, _, _ = fit_texts()
    rows = torch.tensor(X[:20])
    present = torch.ones(20, 6, dtype=torch.bool)
    whole, last = fitted.step(rows, torch.zeros(20), present)
    text = np.repeat(np.arange(20), 6)
    expected = fitted.transform(X[:20].reshape(-1, 10), text).reshape(20, 6, 10)
    np.testing.assert_allclose(whole, expected)
    one, middle = fitted.step(rows[:, :2], torch.zeros(20), present[:, :2])
    two, _ = fitted.step(rows[:, 2:], middle[:, -1], present[:, 2:])
    assert torch.equal(torch.cat([one, two], dim=1), whole)
    absent, evidence = fitted.step(rows, torch.zeros(20), torch.zeros_like(present))
    assert torch.equal(absent, rows)
    assert not evidence.any()
    assert last.any()
    absent, evidence = fitted.step(rows, torch.ones(20), torch.zeros_like(present))
    assert torch.equal(absent, rows)
    assert evidence.all()


def test_the_rate_is_a_texts_where_texts_are_told():
    """Six rows a text: a row's rate of 5 % would open a quarter of the texts."""
    fitted, *_ = fit_texts()
    new, y, _ = texts(3000, seed=5)
    opened = fitted.gate(new.reshape(-1, 10), np.repeat(np.arange(3000), 6)).reshape(-1, 6)
    assert opened[y == 0].any(1).mean() < 0.09
    assert fitted.n_calibration_ == 100  # half of the texts that have rows where not to steer


def test_rows_alone_do_not_say_where_a_text_begins():
    fitted, X, *_ = fit_texts()
    with pytest.raises(ValueError, match="evidence='sequence' needs the rows of a sequence"):
        fitted(torch.tensor(X))


# --- behind another gate --------------------------------------------------------------------


class HalfGate:
    """A gate of nobody's: half open where the first feature is positive."""

    def gate(self, X):
        return 0.5 * (torch.as_tensor(X)[:, 0] > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_vector_is_added_as_far_as_any_gate_is_open(dtype):
    gated = GatedVector(torch.arange(4.0), HalfGate(), strength=3.0)
    rows = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    out, opened = gated(rows), rows[..., 0] > 0
    assert torch.equal(out[~opened], rows[~opened])
    assert torch.equal(out[opened], (rows[opened].float() + 1.5 * torch.arange(4.0)).to(dtype))
    zeros = -torch.zeros(1, 4, dtype=dtype)
    assert torch.signbit(gated(zeros)).all(), "to the bit: a negative zero stays one"
    torch.testing.assert_close(gated.transform(rows[0]), out[0])


@pytest.fixture(scope="module")
def gates():
    """A forget gate and a manifold eraser of a row's and of a sequence's evidence, on one data."""
    X, y = two_classes(shift=8)
    text = np.empty(len(y), dtype=int)
    for label, first in ((0, 0), (1, 1000)):
        text[y == label] = first + np.arange((y == label).sum()) // 5
    made = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for evidence in ("token", "sequence"):
            options = {"n_landmarks": 64, "evidence": evidence, "false_positive_rate": 0.1}
            gate = ForgetGate(**options, min_auc=0).fit(X, y, sequence=text)
            eraser = ManifoldEraser(**options, random_state=0).fit(X, y, sequence=text)
            made[evidence] = {"ForgetGate": gate, "ManifoldEraser": eraser}
    return X, y, text, made


@pytest.mark.parametrize("kind", ["ForgetGate", "ManifoldEraser"])
def test_a_gate_of_this_package_opens_for_a_vector(gates, kind):
    X, y, _, made = gates
    gate, rows = made["token"][kind], torch.tensor(X)
    gated = GatedVector(torch.ones(12, dtype=torch.float64), gate, strength=2.0)
    opening = torch.as_tensor(gate.gate(X))
    expected = rows + 2 * opening[:, None]
    torch.testing.assert_close(gated(rows), expected)
    np.testing.assert_allclose(gated.transform(X), expected)
    shut = opening == 0
    assert torch.equal(gated(rows)[shut], rows[shut])
    assert shut[y == 0].double().mean() > 0.8
    assert not shut[y == 1].all()


@pytest.mark.parametrize("kind", ["ForgetGate", "ManifoldEraser"])
def test_evidence_of_a_sequence_is_followed_along_it(gates, kind):
    X, _, text, made = gates
    gate = made["sequence"][kind]
    gated = GatedVector(torch.ones(12, dtype=torch.float64), gate)
    assert gated.evidence == "sequence"
    order = np.argsort(text, kind="stable")
    rows, text = X[order], text[order]
    sizes = np.unique(text, return_counts=True)[1]
    assert (sizes == 5).all()
    opening = np.asarray(gate.gate(rows, text))
    np.testing.assert_allclose(gated.transform(rows, text), rows + opening[:, None])
    held = torch.tensor(rows).reshape(-1, 5, 12)
    stepped, _ = gated.step(held, torch.zeros(len(held)), torch.ones(len(held), 5).bool())
    np.testing.assert_allclose(stepped.reshape(-1, 12), rows + opening[:, None])
    assert (opening > 0).any()
    assert (opening == 0).any()


@pytest.mark.parametrize("evidence", ["token", "sequence"])
def test_a_gated_vector_is_saved_with_its_gate(gates, evidence, tmp_path):
    X, _, text, made = gates
    gated = GatedVector(torch.ones(12), made[evidence]["ForgetGate"], strength=2.0)
    Edit({"layers.1": gated}).save(tmp_path / "edit")
    again = Edit.load(tmp_path / "edit", kinds={"GatedVector": GatedVector})["layers.1"]
    assert (again.strength, again.evidence) == (2.0, evidence)
    np.testing.assert_array_equal(again.transform(X, text), gated.transform(X, text))


# --- in a model -----------------------------------------------------------------------------


@pytest.fixture
def conditional(llama, tokenizer):
    """Opens on about half of the rows of the tiny model at layers.1."""
    acts = capture(llama, tokenizer, TEXTS, "layers.1")["layers.1"]
    high = acts[:, 3] > acts[:, 3].median()
    return fit(acts, high.long(), false_positive_rate=0.2, vector=torch.ones(WIDTH))


def test_in_a_model_the_rows_where_it_holds_move_and_no_others(llama, tokenizer, conditional):
    before = capture(llama, tokenizer, TEXTS, "layers.1")["layers.1"]
    with intervene(llama, {"layers.1": conditional}):
        after = capture(llama, tokenizer, TEXTS, "layers.1")["layers.1"]
    opened = conditional.gate(before) == 1
    assert 0.1 < opened.float().mean() < 0.9
    assert torch.equal(after[opened], before[opened] + 1)
    assert torch.equal(after[~opened], before[~opened])


@pytest.mark.parametrize("evidence", ["token", "sequence"])
def test_cached_generation_is_steered_as_one_pass_and_leaves_no_trace(
    llama, tokenizer, conditional, evidence
):
    conditional.set_params(evidence=evidence, strength=3.0)
    before = state(llama)
    ids = torch.tensor([tokenizer(TEXTS[2]).input_ids])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2, "min_new_tokens": 8}
    plain = llama.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with intervene(llama, {"layers.1": conditional}):
        steered = llama.generate(ids, attention_mask=torch.ones_like(ids), **options)
        whole = logits(llama, steered)
    assert not torch.equal(steered, plain)
    start = ids.shape[1] - 1
    free = whole[0, start:-1].clone()
    free[:, 1] = -torch.inf  # min_new_tokens forbids the end
    assert torch.equal(free.argmax(-1), steered[0, start + 1 :])
    assert same_state(llama, before)
    assert hooks(llama) == 0
    with pytest.raises(KeyError), intervene(llama, {"layers.1": conditional}):
        raise KeyError
    assert hooks(llama) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision_are_steered(tokenizer, conditional, dtype):
    model = build_model("llama", dtype=dtype)
    before = capture(model, tokenizer, TEXTS, "layers.1")["layers.1"]
    with intervene(model, {"layers.1": conditional}):
        after = capture(model, tokenizer, TEXTS, "layers.1")["layers.1"]
    opened = conditional.gate(before) == 1
    assert after.dtype == dtype
    assert torch.equal(after[~opened], before[~opened])
    assert torch.equal(after[opened], (before[opened].float() + 1).to(dtype))
    assert opened.any()


def test_what_depends_on_the_row_does_not_bake(llama, conditional):
    with pytest.raises(ValueError, match="ConditionalVector without matrix_ and bias_"):
        bake(llama, {"layers.1.mlp": conditional})


def test_other_strengths_need_no_fit(conditional):
    edit = Edit({"a": conditional, "b": GatedVector(torch.ones(4), HalfGate())})
    other = with_strength(edit, -2)
    assert [m.strength for m in other.values()] == [-2.0, -2.0]
    assert [m.strength for m in edit.values()] == [1.0, 1.0]
    assert torch.equal(other["a"].vector_, conditional.vector_)


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"similarity": "euclid"}, "similarity='euclid' is not one of cosine, projection"),
        ({"evidence": "text"}, "evidence='text' is not one of"),
        ({"condition": "umap"}, "method='umap' is not one of"),
        ({"false_positive_rate": 0}, "false_positive_rate=0 must lie between 0 and 1"),
        ({"held_out": 1.0}, "held_out=1.0 must lie between 0 and 1"),
        ({"vector": np.ones(3)}, "vector has 3 entries; X has 10 features"),
        ({"vector": np.zeros(10)}, "the vector is zero"),
        ({"calibration": np.ones((4, 3))}, "calibration has 3 features; X has 10"),
        ({"calibration": np.full((4, 10), np.inf)}, "calibration contains NaN or infinity"),
        ({"sequence": np.zeros(3, int)}, r"sequence has shape \(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        fit(*apart(100), **change)


@pytest.mark.parametrize("label", [0, 1])
def test_one_kind_of_rows_alone_is_refused(label):
    with pytest.raises(ValueError, match="set is empty"):
        fit(np.eye(4), np.full(4, label))


def test_one_row_cannot_be_held_out():
    with pytest.raises(ValueError, match="1 row or text where not to steer cannot both"):
        fit(np.eye(4), [1, 1, 1, 0])


@pytest.mark.parametrize(
    ("vector", "gate", "words"),
    [
        (torch.ones(4), object(), r"object has no gate\(X\)"),
        (torch.zeros(4), HalfGate(), "the vector is zero"),
    ],
)
def test_a_gated_vector_needs_a_vector_and_a_gate(vector, gate, words):
    with pytest.raises(ValueError, match=words):
        GatedVector(vector, gate)


def test_a_strength_that_is_no_number_is_refused(conditional):
    again = copy.copy(conditional)
    again.strength = float("nan")
    with pytest.raises(ValueError, match="strength=nan must be finite"):
        again.transform(np.ones((1, again.n_features_in_)))
    with pytest.raises(ValueError, match="strength=inf must be finite"):
        GatedVector(torch.ones(4), HalfGate(), strength=float("inf"))(torch.ones(3, 4))


def test_a_gate_of_another_width_is_refused(gates):
    with pytest.raises(ValueError, match="fitted for width 12, the vector has 4"):
        GatedVector(torch.ones(4), gates[3]["token"]["ForgetGate"])


def test_a_gate_that_answers_another_shape_is_refused():
    class Wrong:
        def gate(self, X):
            return torch.ones(1)

    with pytest.raises(ValueError, match=r"gate\(X\) answered \(1,\) to 3 rows"):
        GatedVector(torch.ones(4), Wrong())(torch.ones(3, 4))


def test_a_gate_that_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(ValueError, match="HalfGate without save and load"):
        GatedVector(torch.ones(4), HalfGate()).save(tmp_path / "x")


@pytest.mark.parametrize("use", ["transform", "scores", "gate", "__call__", "step", "to", "save"])
def test_before_the_fit_there_is_nothing_to_use(use, tmp_path):
    arguments = {name: [np.ones((1, 2))] for name in ("transform", "scores", "gate")}
    arguments |= {"__call__": [torch.ones(2)], "to": ["cpu", torch.float32]}
    arguments["step"] = [torch.ones(1, 1, 2), torch.zeros(1), torch.ones(1, 1).bool()]
    with pytest.raises(NotFittedError, match="not fitted yet"):
        getattr(ConditionalVector(), use)(*arguments.get(use, [tmp_path / "x"]))
