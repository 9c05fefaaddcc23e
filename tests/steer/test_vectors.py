import warnings

import numpy as np
import pytest
import torch
from cases import (
    TEXTS,
    WIDTH,
    build_model,
    hooks,
    logits,
    same_state,
    state,
    two_classes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from manifold_unlearn import Edit, SubspaceEraser, bake, capture, intervene
from manifold_unlearn.intervene.maps import AffineMap
from manifold_unlearn.steer.contrast import fit_vectors
from manifold_unlearn.steer.strengths import (
    relative_strengths,
    sweep_rows,
    sweep_strengths,
    with_strength,
)
from manifold_unlearn.steer.vectors import SteeringVector, checked_vector

VECTORS = {
    "mean_difference": {},
    "pca": {"method": "pca"},
    "probe": {"method": "probe"},
    "ablate": {"mode": "ablate"},
    "preserve_norm": {"preserve_norm": True},
    "normalize": {"normalize": True, "method": "probe"},
}
METHODS = ("mean_difference", "pca", "probe")


@pytest.fixture(params=VECTORS)
def parameters(request):
    return VECTORS[request.param]


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def gaussian_classes(n=4000, d=12, *, shift=3.0, seed=0, covariance=None):
    """Two Gaussian classes of one covariance, and the difference of their true means."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=d)
    direction *= shift / np.linalg.norm(direction)
    root = np.eye(d) if covariance is None else np.linalg.cholesky(covariance)
    y = np.arange(n) % 2
    return rng.normal(size=(n, d)) @ root.T + 5 + y[:, None] * direction, y, direction


def ids_of(tokenizer, text=TEXTS[0]):
    return torch.tensor([tokenizer(text).input_ids])


# --- the direction --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_known_direction_of_gaussian_classes_is_recovered(method):
    X, y, direction = gaussian_classes()
    fitted = SteeringVector(method).fit(X, y)
    assert cosine(fitted.vector_, direction) > 0.995
    assert np.linalg.norm(fitted.vector_) == pytest.approx(3, rel=0.03)


def test_mean_difference_is_the_difference_of_the_means():
    X, y = two_classes()
    fitted = SteeringVector().fit(X, y)
    np.testing.assert_allclose(fitted.vector_, X[y == 1].mean(0) - X[y != 1].mean(0), rtol=1e-12)
    middle = (X[y == 1].mean(0) + X[y != 1].mean(0)) / 2
    np.testing.assert_allclose(fitted.center_, middle, rtol=1e-12)


def test_the_probe_finds_what_tells_apart_best_and_the_means_do_not():
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(6, 6))
    covariance = mixing @ mixing.T + 0.2 * np.eye(6)
    X, y, direction = gaussian_classes(20000, 6, shift=2, covariance=covariance)
    best = np.linalg.solve(covariance, direction)
    probe, mean = (SteeringVector(m).fit(X, y).vector_ for m in ("probe", "mean_difference"))
    assert cosine(probe, best) > 0.99
    assert cosine(mean, best) < 0.9


def test_a_stronger_penalty_turns_the_probe_to_the_means():
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(6, 6))
    X, y, direction = gaussian_classes(400, 6, shift=2, covariance=mixing @ mixing.T + np.eye(6))
    turned = [
        cosine(SteeringVector("probe", regularization=r).fit(X, y).vector_, direction)
        for r in (1e-3, 1e2, 1e5)
    ]
    assert turned == sorted(turned)
    assert turned[-1] > turned[0] + 0.05


def pairs(n=600, d=10, *, seed=0, shift=2.0, nuisance=5.0):
    """Rows that differ from their partners by one vector, and in little else."""
    rng = np.random.default_rng(seed)
    negative = nuisance * rng.normal(size=(n, d))
    direction = rng.normal(size=d)
    direction *= shift / np.linalg.norm(direction)
    return negative + direction + 0.5 * rng.normal(size=(n, d)), negative, direction


def test_pca_of_pairs_recovers_the_direction_where_the_rows_vary_much_more():
    positive, negative, direction = pairs()
    fitted = SteeringVector("pca").fit_pairs(positive, negative)
    assert cosine(fitted.vector_, direction) > 0.995
    X = np.concatenate([positive, negative])
    unpaired = SteeringVector("pca").fit(X, np.repeat([1, 0], len(positive)))
    assert abs(cosine(unpaired.vector_, direction)) < 0.9, "the control: pairing is what tells"


@pytest.mark.parametrize("n", [6, 40])
def test_pca_is_the_axis_that_repeng_finds(n):
    """Its pca_center: PCA of both rows of a pair about their middle; its pca_diff: of differences.

    Fewer pairs than features, and more.
    """
    positive, negative, _ = pairs(n, d=20, seed=3)
    middle = (positive + negative) / 2
    both = np.concatenate([positive - middle, negative - middle])
    plain = SteeringVector("pca").fit_pairs(positive, negative).vector_
    assert abs(cosine(plain, PCA(1).fit(both).components_[0])) == pytest.approx(1, abs=1e-9)
    centered = SteeringVector("pca", centered=True).fit_pairs(positive, negative).vector_
    expected = PCA(1).fit(positive - negative).components_[0]
    assert abs(cosine(centered, expected)) == pytest.approx(1, abs=1e-9)
    assert abs(cosine(centered, plain)) < 0.99


@pytest.mark.parametrize("centered", [False, True])
def test_pca_of_unpaired_rows_is_that_of_all_pairs(centered):
    X, y = two_classes(7, 9, 5)
    every = (X[y == 1][:, None] - X[y != 1][None]).reshape(-1, 5)
    every = every - every.mean(0) if centered else every
    expected = np.linalg.svd(every)[2][0]
    found = SteeringVector("pca", centered=centered).fit(X, y).vector_
    assert abs(cosine(found, expected)) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_the_positive_rows_lie_higher_and_swapping_the_classes_turns_the_vector(method):
    X, y = two_classes(shift=3)
    fitted = SteeringVector(method).fit(X, y)
    assert fitted.scores(X)[y == 1].mean() > 0 > fitted.scores(X)[y != 1].mean()
    other = SteeringVector(method).fit(X, 1 - y)
    np.testing.assert_allclose(other.vector_, -fitted.vector_, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_every_vector_is_as_long_as_the_means_lie_apart_or_one(method):
    X, y = two_classes()
    distance = np.linalg.norm(X[y == 1].mean(0) - X[y != 1].mean(0))
    plain, unit = (SteeringVector(method, normalize=n).fit(X, y).vector_ for n in (False, True))
    assert np.linalg.norm(plain) == pytest.approx(distance)
    assert np.linalg.norm(unit) == pytest.approx(1)
    assert cosine(plain, unit) == pytest.approx(1)


@pytest.mark.parametrize("method", METHODS)
@given(st.integers(0, 2**16), st.floats(0.01, 100))
@settings(max_examples=5, deadline=None)
def test_turning_and_scaling_the_space_turns_and_scales_the_vector(method, seed, scale):
    X, y = two_classes(30, 30, 4, seed=1, shift=4)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4)))[0]
    plain = SteeringVector(method).fit(X, y).vector_
    moved = SteeringVector(method).fit(scale * X @ turn, y).vector_
    np.testing.assert_allclose(moved, scale * plain @ turn, rtol=1e-3, atol=1e-3 * scale)


def test_scores_detect_the_concept_as_well_as_gaussian_theory_says():
    X, y, _ = gaussian_classes(shift=2.0)
    held, held_y, _ = gaussian_classes(shift=2.0)
    scores = SteeringVector().fit(X[:2000], y[:2000]).scores(held[2000:])
    of_concept = held_y[2000:] == 1
    found = mannwhitneyu(scores[of_concept], scores[~of_concept]).statistic / 1000**2
    assert found == pytest.approx(0.9214, abs=0.02)  # Phi(2 / sqrt 2)
    assert np.mean(scores[of_concept]) == pytest.approx(1, abs=0.1)


# --- scikit-learn, kinds and dtypes ---------------------------------------------------------


@parametrize_with_checks([SteeringVector(**p) for p in VECTORS.values()])
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_in_numpy_out_at_its_dtype(parameters, dtype):
    X, y = two_classes()
    X = X.astype(dtype)
    fitted = SteeringVector(**parameters).fit(X, y)
    for out in (fitted.transform(X), fitted.scores(X)):
        assert isinstance(out, np.ndarray)
        assert out.dtype == dtype
    assert isinstance(fitted.vector_, np.ndarray)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torch_in_torch_out_and_half_precision_is_rounded_once(parameters, dtype):
    X, y = two_classes()
    fitted = SteeringVector(strength=0.7, **parameters).fit(torch.tensor(X), torch.tensor(y))
    rows = torch.tensor(X).to(dtype).reshape(7, -1, 12)
    out = fitted(rows)
    assert (out.dtype, out.device, out.shape) == (dtype, rows.device, rows.shape)
    assert fitted.transform(rows[0]).dtype == dtype
    exact = fitted(rows.double())
    step = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(dtype, 2**-20)
    torch.testing.assert_close(out.double(), exact, rtol=1.01 * step, atol=1e-6)


def test_half_precision_rows_are_accumulated_wider(parameters):
    X, y = two_classes()
    narrow = torch.tensor(X).bfloat16()
    one, other = (SteeringVector(**parameters).fit(rows, y) for rows in (narrow, narrow.double()))
    assert one.vector_.dtype == torch.float32
    torch.testing.assert_close(one.vector_.double(), other.vector_, rtol=1e-4, atol=1e-5)


def test_torch_and_numpy_agree(parameters):
    X, y = two_classes()
    by_numpy, by_torch = (
        SteeringVector(**parameters).fit(*data) for data in ((X, y), map(torch.tensor, (X, y)))
    )
    np.testing.assert_allclose(by_torch.vector_, by_numpy.vector_, rtol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_rows_on_a_gpu_stay_there_and_agree(parameters):
    X, y = map(torch.tensor, two_classes())
    expected = SteeringVector(**parameters).fit(X, y).transform(X)
    out = SteeringVector(**parameters).fit(X.cuda(), y.cuda()).transform(X.cuda())
    assert out.is_cuda
    torch.testing.assert_close(out.cpu(), expected)


def test_saved_then_loaded_is_equal(parameters, tmp_path):
    X, y = two_classes()
    fitted = SteeringVector(strength=-1.5, **parameters).fit(torch.tensor(X), y)
    fitted.save(tmp_path / "vector")
    again = SteeringVector.load(tmp_path / "vector")
    assert again.get_params() == fitted.get_params()
    assert torch.equal(again.vector_, fitted.vector_)
    assert torch.equal(again.transform(torch.tensor(X)), fitted.transform(torch.tensor(X)))


# --- the map --------------------------------------------------------------------------------


def test_adding_moves_every_row_by_the_vector_times_the_strength():
    X, y = two_classes()
    fitted = SteeringVector().fit(X, y)
    expected = X + 2.5 * fitted.vector_
    fitted.strength = 2.5  # without a fit
    np.testing.assert_array_equal(fitted.transform(X), expected)
    np.testing.assert_array_equal(fitted.matrix_, np.eye(12))
    np.testing.assert_array_equal(fitted.bias_, 2.5 * fitted.vector_)


def test_ablation_leaves_nothing_along_the_direction_and_all_else():
    X, y = two_classes()
    fitted = SteeringVector(mode="ablate").fit(X, y)
    unit = fitted.vector_ / np.linalg.norm(fitted.vector_)
    after = fitted.transform(X)
    np.testing.assert_allclose(after @ unit, 0, atol=1e-10)
    np.testing.assert_allclose(after, X - np.outer(X @ unit, unit), atol=1e-10)
    np.testing.assert_allclose(fitted.transform(after), after, atol=1e-10)
    np.testing.assert_allclose(X @ fitted.matrix_.T + fitted.bias_, after, atol=1e-10)
    fitted.strength = 2.0  # a reflection
    np.testing.assert_allclose(fitted.transform(X) @ unit, -(X @ unit), atol=1e-10)


@pytest.mark.parametrize("mode", ["add", "ablate"])
def test_norms_are_preserved_and_the_rows_still_turn(mode):
    X, y = two_classes()
    fitted = SteeringVector(mode=mode, preserve_norm=True, strength=0.8).fit(X, y)
    plain = clone(fitted).set_params(preserve_norm=False).fit(X, y).transform(X)
    after = fitted.transform(X)
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), np.linalg.norm(X, axis=1))
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (after, plain)]
    np.testing.assert_allclose(unit[0], unit[1], atol=1e-12)
    assert np.abs(after - X).max() > 0.1


def test_a_row_that_is_moved_to_zero_stays_there():
    fitted = SteeringVector.given(torch.ones(3), preserve_norm=True)
    assert torch.equal(fitted(-torch.ones(2, 3)), torch.zeros(2, 3))


def test_a_given_vector_steers_as_it_is():
    fitted = SteeringVector.given(torch.arange(4.0), strength=-2.0)
    assert torch.equal(fitted(torch.ones(2, 4)), 1 - 2 * torch.arange(4.0).expand(2, 4))
    with pytest.raises(ValueError, match="method='given' is not one of"):
        fitted.fit(*two_classes(n_features=4))


# --- in a model -----------------------------------------------------------------------------


@pytest.fixture
def fitted():
    X, y = two_classes(n_features=WIDTH, shift=4, dtype=np.float32)
    return SteeringVector(strength=1.5).fit(torch.tensor(X), torch.tensor(y))


@pytest.mark.parametrize("site", ["embed", "layers.1", "layers.1.mlp"])
def test_the_rows_of_the_site_move_by_exactly_the_vector(llama, tokenizer, fitted, site):
    before = capture(llama, tokenizer, TEXTS, site)[site]
    with intervene(llama, {site: fitted}):
        after = capture(llama, tokenizer, TEXTS, site)[site]
    assert torch.equal(after, before + 1.5 * fitted.vector_)
    assert (after - before).norm(dim=1).min() > 1


def test_nothing_is_left_after_the_block_nor_after_an_exception(llama, tokenizer, fitted):
    ids, before = ids_of(tokenizer), state(llama)
    expected = logits(llama, ids)
    with intervene(llama, {"layers.1": fitted}):
        assert (logits(llama, ids) - expected).abs().max() > 1e-3
    with pytest.raises(KeyError), intervene(llama, {"layers.1": fitted}):
        raise KeyError
    assert torch.equal(logits(llama, ids), expected)
    assert same_state(llama, before)
    assert hooks(llama) == 0


@pytest.mark.parametrize("site", ["embed", "layers.1.mlp", "layers.0.attn", "stream"])
@pytest.mark.parametrize("mode", ["add", "ablate"])
def test_baked_answers_as_hooked(llama, tokenizer, fitted, site, mode):
    fitted.set_params(mode=mode, strength=0.5)
    ids = ids_of(tokenizer)
    with intervene(llama, {site: fitted}):
        hooked = logits(llama, ids)
    baked = logits(bake(llama, {site: fitted}), ids)
    torch.testing.assert_close(baked, hooked, rtol=1e-5, atol=1e-5)
    assert (hooked - logits(llama, ids)).abs().max() > 1e-2


def test_what_preserves_norms_does_not_bake(llama, fitted):
    fitted.preserve_norm = True
    assert not hasattr(fitted, "matrix_")
    assert not hasattr(fitted, "bias_")
    with pytest.raises(ValueError, match="without matrix_ and bias_"):
        bake(llama, {"layers.1.mlp": fitted})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision_are_steered(tokenizer, fitted, parameters, dtype):
    model = build_model("llama", dtype=dtype)
    fitted.set_params(**({"mode": "add", "preserve_norm": False} | parameters))
    before = capture(model, tokenizer, TEXTS, "layers.1")["layers.1"]
    with intervene(model, {"layers.1": fitted}):
        after = capture(model, tokenizer, TEXTS, "layers.1")["layers.1"]
    assert after.dtype == dtype
    assert torch.equal(after, fitted(before.float()).to(dtype))


# --- many sites -----------------------------------------------------------------------------

ABOVE = ["It was a good day", "She is kind to me", "We all love it here"]
BELOW = ["It was a bad day", "She is mean to me", "We all hate it here now"]
SITES = ["layers.0", "layers.2", "layers.1.mlp"]


@pytest.mark.parametrize("method", METHODS)
def test_vectors_of_many_sites_come_from_the_last_tokens_of_the_texts(llama, tokenizer, method):
    edit = fit_vectors(llama, tokenizer, ABOVE, BELOW, SITES, method=method, strength=2.0)
    assert list(edit) == SITES
    rows = {}
    for site in SITES:
        each = [capture(llama, tokenizer, [t], site, tokens="last")[site] for t in ABOVE + BELOW]
        rows[site] = torch.cat(each)
        expected = SteeringVector(method).fit_pairs(rows[site][:3], rows[site][3:])
        torch.testing.assert_close(edit[site].vector_, expected.vector_, rtol=1e-3, atol=1e-4)
        assert edit[site].strength == 2.0
    with intervene(llama, edit):
        after = capture(llama, tokenizer, ABOVE, "layers.0", tokens="last")["layers.0"]
    torch.testing.assert_close(after, rows["layers.0"][:3] + edit["layers.0"].bias_)


def test_with_all_tokens_a_text_counts_as_one_however_long(llama, tokenizer):
    acts = capture(llama, tokenizer, ABOVE + BELOW, "layers.1")
    means = [
        acts["layers.1"][(acts.text_index == i) & ~acts.special & ~acts.sink].double().mean(0)
        for i in range(6)
    ]
    expected = torch.stack(means[:3]).mean(0) - torch.stack(means[3:]).mean(0)
    edit = fit_vectors(llama, tokenizer, ABOVE, BELOW, "layers.1", tokens="all")
    torch.testing.assert_close(edit["layers.1"].vector_.double(), expected, rtol=1e-4, atol=1e-5)


def test_texts_that_are_not_pairs_are_fitted_as_classes(llama, tokenizer):
    edit = fit_vectors(llama, tokenizer, ABOVE, BELOW[:2], "layers.1", paired=False)
    acts = capture(llama, tokenizer, ABOVE + BELOW[:2], "layers.1", tokens="last")["layers.1"]
    expected = acts[:3].mean(0) - acts[3:].mean(0)
    torch.testing.assert_close(edit["layers.1"].vector_, expected, rtol=1e-4, atol=1e-4)


def test_a_pair_with_an_attention_sink_is_left_out_and_counted(llama, tokenizer):
    """The token table is edited so that one text's last token is hundreds of times as long."""
    unusual = tokenizer("\x07", add_special_tokens=False).input_ids[0]
    with torch.no_grad():
        llama.get_input_embeddings().weight[unusual] *= 1000
    above, below = [*ABOVE, "It ends oddly\x07"], [*BELOW, "It ends well"]
    with pytest.warns(UserWarning, match="2 of 8 texts were left out"):
        edit = fit_vectors(llama, tokenizer, above, below, "embed")
    plain = fit_vectors(llama, tokenizer, ABOVE, BELOW, "embed")
    torch.testing.assert_close(edit["embed"].vector_, plain["embed"].vector_)


def test_an_edit_of_vectors_is_saved_and_loaded(llama, tokenizer, tmp_path):
    edit = fit_vectors(llama, tokenizer, ABOVE, BELOW, SITES, strength=3.0)
    edit.save(tmp_path / "edit")
    again = Edit.load(tmp_path / "edit", kinds={"SteeringVector": SteeringVector})
    assert list(again) == SITES
    assert all(torch.equal(again[s].bias_, edit[s].bias_) for s in SITES)


# --- strengths ------------------------------------------------------------------------------


def test_another_strength_needs_no_fit_and_leaves_the_first(fitted):
    edit = Edit({"layers.0": fitted, "layers.1": fitted})
    other = with_strength(edit, -4)
    assert torch.equal(other["layers.0"].bias_, -4 * fitted.vector_)
    assert edit["layers.0"].strength == 1.5
    one = with_strength(edit, {"layers.1": 0.5})
    assert [one[s].strength for s in one] == [1.5, 0.5]


def test_strength_zero_changes_nothing_and_the_sweep_is_straight(llama, tokenizer, fitted):
    ids = ids_of(tokenizer)
    plain, edit = logits(llama, ids), Edit({"layers.1": fitted})
    found = {}
    for strength, steered in sweep_strengths(edit, [-1, 0, 2]):
        with intervene(llama, steered):
            found[strength] = logits(llama, ids)
    assert list(found) == [-1.0, 0.0, 2.0]
    assert torch.equal(found[0.0], plain)
    X = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    swept = sweep_rows(fitted, X, [0, 1, 3])
    expected = torch.stack([X, X + fitted.vector_, X + 3 * fitted.vector_])
    torch.testing.assert_close(swept, expected)


def test_a_relative_sweep_keeps_the_proportions_of_the_sites(fitted):
    edit = with_strength(Edit({"a": fitted, "b": fitted}), {"a": 0.5, "b": -2.0})
    found = {
        f: [m.strength for m in e.values()] for f, e in sweep_strengths(edit, [0, 3], relative=True)
    }
    assert found == {0.0: [0.0, 0.0], 3.0: [1.5, -6.0]}


def test_relative_strengths_move_a_typical_row_by_a_part_of_its_length(llama, tokenizer):
    edit = fit_vectors(llama, tokenizer, ABOVE, BELOW, SITES)
    acts = capture(llama, tokenizer, TEXTS, SITES)
    strengths = relative_strengths(edit, acts, 0.5)
    for site, steered in with_strength(edit, strengths).items():
        typical = acts[site][~acts.sink].norm(dim=1).median()
        assert float(steered.bias_.norm()) == pytest.approx(0.5 * float(typical), rel=1e-4)


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_alone_is_refused(label):
    with pytest.raises(ValueError, match="set is empty"):
        SteeringVector().fit(np.eye(4), np.full(4, label))


def test_pairs_need_as_many_of_each():
    with pytest.raises(ValueError, match=r"positive has shape \(3, 2\) and negative \(2, 2\)"):
        SteeringVector().fit_pairs(np.eye(3)[:, :2], np.eye(2))


def test_rows_that_are_not_finite_are_named():
    bad = np.eye(4)
    bad[2, 1] = np.nan
    with pytest.raises(ValueError, match="negative contains NaN or infinity: 1 of 4 rows.* row 2"):
        SteeringVector().fit_pairs(np.eye(4), bad)
    with pytest.raises(ValueError, match="X contains NaN or infinity"):
        SteeringVector().fit(bad, [0, 1, 0, 1])


@pytest.mark.parametrize("method", METHODS)
def test_equal_means_have_no_direction(method):
    X = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    with pytest.raises(ValueError, match="difference of the class means is zero"):
        SteeringVector(method).fit(X, [1, 1, 0, 0])


def test_centered_differences_that_are_alike_leave_nothing():
    X = np.random.default_rng(0).normal(size=(5, 3))
    with pytest.raises(ValueError, match="centered=True .* nothing is left"):
        SteeringVector("pca", centered=True).fit_pairs(X + [1, 0, 0], X)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "umap"}, "method='umap' is not one of"),
        ({"mode": "replace"}, "mode='replace' is not one of"),
        ({"regularization": 0}, "regularization=0 must be above 0"),
    ],
)
def test_options_that_do_not_exist_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        SteeringVector(**change).fit(*two_classes())


@pytest.mark.parametrize(
    ("vector", "words"),
    [
        (torch.ones(2, 2), "expected"),
        (torch.zeros(3), "the vector is zero"),
        (torch.tensor([1.0, torch.inf]), "the vector contains NaN or infinity"),
        (SteeringVector.given(torch.ones(2), mode="ablate"), "adds no constant vector"),
        (SteeringVector.given(torch.ones(2), preserve_norm=True), "adds no constant vector"),
    ],
)
def test_what_is_no_vector_is_refused(vector, words):
    with pytest.raises(ValueError, match=words):
        checked_vector(vector)


def test_a_vector_of_another_width_than_the_site_is_refused(llama, tokenizer):
    narrow = SteeringVector.given(torch.ones(5))
    with (
        pytest.raises(ValueError, match="fitted for width 5; the site has width 32"),
        intervene(llama, {"layers.1": narrow}),
    ):
        logits(llama, ids_of(tokenizer))
    assert hooks(llama) == 0


@pytest.mark.parametrize("use", ["transform", "scores", "__call__", "to", "linear", "save"])
def test_before_the_fit_there_is_nothing_to_use(use, tmp_path):
    arguments = {"transform": [np.ones((1, 2))], "scores": [np.ones((1, 2))], "linear": []}
    arguments |= {"__call__": [torch.ones(2)], "to": ["cpu", torch.float32]}
    with pytest.raises(NotFittedError, match="not fitted yet"):
        getattr(SteeringVector(), use)(*arguments.get(use, [tmp_path / "x"]))


@pytest.mark.parametrize(
    ("above", "below", "words"),
    [
        ([], BELOW, "0 positive and 3 negative texts; both are needed"),
        (ABOVE, BELOW[:2], "3 positive and 2 negative texts are not pairs"),
    ],
)
def test_texts_that_do_not_contrast_are_refused(llama, tokenizer, above, below, words):
    with pytest.raises(ValueError, match=words):
        fit_vectors(llama, tokenizer, above, below, "layers.0")


def test_texts_without_a_token_that_counts_are_refused(llama, tokenizer):
    with pytest.raises(ValueError, match="no text of one side has a token that counts"):
        fit_vectors(llama, tokenizer, [""], ["ab"], "layers.0", tokens="all")


def test_strengths_that_fit_nothing_are_refused(fitted):
    edit = Edit({"layers.0": fitted})
    with pytest.raises(ValueError, match=r"strengths for \['layers.7'\]"):
        with_strength(edit, {"layers.7": 1.0})
    with pytest.raises(ValueError, match="strength=nan at 'layers.0' is not finite"):
        with_strength(edit, float("nan"))
    shift = AffineMap(torch.ones(2, 1), torch.ones(2, 1), torch.ones(1))
    with pytest.raises(ValueError, match="AffineMap, which has no strength"):
        with_strength({"layers.0": shift}, 1.0)
    with pytest.raises(ValueError, match="strengths is empty"):
        sweep_rows(fitted, torch.ones(1, WIDTH), [])


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["add", "ablate"])
def test_a_strength_that_is_no_number_never_reaches_a_model(llama, tokenizer, mode, strength):
    vector = SteeringVector.given(torch.ones(WIDTH), strength=strength, mode=mode)
    before = logits(llama, ids_of(tokenizer))
    with (
        pytest.raises(ValueError, match=f"strength={strength} must be finite"),
        intervene(llama, {"layers.1": vector}),
    ):
        logits(llama, ids_of(tokenizer))
    assert hooks(llama) == 0 and torch.equal(logits(llama, ids_of(tokenizer)), before)
    with pytest.raises(ValueError, match=f"strength={strength} must be finite"):
        bake(llama, {"layers.1.mlp": vector})


def test_relative_strengths_need_activations_and_a_vector(llama, tokenizer, fitted):
    acts = capture(llama, tokenizer, TEXTS, "layers.1")
    with pytest.raises(ValueError, match="no activations at 'layers.0'"):
        relative_strengths({"layers.0": fitted}, acts, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eraser = SubspaceEraser("leace").fit(*two_classes(n_features=WIDTH))
    with pytest.raises(ValueError, match="the map at 'layers.1' has no vector_"):
        relative_strengths({"layers.1": eraser}, acts, 0.1)
