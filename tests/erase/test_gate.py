from pathlib import Path

import numpy as np
import pytest
import torch
from cases import GATES
from sklearn.metrics import roc_auc_score

from manifold_unlearn.erase.gate import ForgetGate
from manifold_unlearn.sequences import padded

SHARED = Path(__file__).parents[3] / "shared"
N_TEXTS, LENGTH = 160, 6
N_FORGET = 40


def texts(seed=0, *, n_subjects=32, spread=0.1, n_features=8):
    """Rows, labels, text and subject of texts whose rows lie near places of their subject.

    Subjects of both classes are alike: each has places of its own, and there are shared ones.
    """
    rng = np.random.default_rng(seed)
    text = np.repeat(np.arange(N_TEXTS), LENGTH)
    subject = text % n_subjects
    own = rng.normal(size=(n_subjects, 3, n_features))
    shared = rng.normal(size=(3, n_features))
    place = np.tile(np.arange(LENGTH), N_TEXTS)
    X = np.where(place[:, None] < 3, shared[place % 3], own[subject, place % 3])
    X = X + spread * rng.normal(size=X.shape)
    y = (subject < n_subjects * N_FORGET // N_TEXTS).astype(int)
    return X, y, text, subject


@pytest.fixture(scope="module")
def data():
    return texts()


@pytest.fixture(scope="module")
def fitted(data):
    X, y, text, subject = data
    rate = {"false_positive_rate": 0.05}
    return {
        name: ForgetGate(**parameters, **rate, min_auc=0).fit(X, y, sequence=text, group=subject)
        for name, parameters in GATES.items()
    }


@pytest.mark.parametrize("name", ["diffusion", "token"])
def test_new_texts_of_known_subjects_open_it_and_unseen_subjects_do_not(fitted, name):
    X, y, text, _ = texts()
    rng = np.random.default_rng(5)
    gate = fitted[name]
    again = X + 0.1 * rng.normal(size=X.shape)
    opened = (gate.gate(again, text) > 0).reshape(N_TEXTS, LENGTH).any(1)
    to_forget = y.reshape(N_TEXTS, LENGTH)[:, 0] == 1
    assert opened[to_forget].mean() > 0.95
    assert opened[~to_forget].mean() <= 0.05
    strange, _, _, _ = texts(seed=9)
    assert (gate.gate(strange, text) > 0).mean() <= 0.05


def test_a_linear_density_sees_nothing_here_that_the_diffusion_does(fitted):
    assert fitted["diffusion"].auc_ > 0.99
    assert fitted["diffusion"].detection_rate_ > 0.95
    assert fitted["linear"].auc_ < 0.9


@pytest.mark.parametrize("name", GATES)
def test_the_gate_is_exactly_shut_below_the_threshold_and_the_posterior_above(fitted, data, name):
    X, _, text, _ = data
    gate = fitted[name]
    evidence, opening = gate.gathered_evidence(X, text), gate.gate(X, text)
    shut = evidence < gate.threshold_
    assert 0 < shut.sum() < len(X)
    assert (opening[shut] == 0).all()
    np.testing.assert_allclose(opening[~shut], 1 / (1 + np.exp(-evidence[~shut])))
    assert (opening[~shut] > 0.5).all()


@pytest.mark.parametrize("name", GATES)
def test_evidence_is_summed_along_a_text_or_a_rows_own(fitted, data, name):
    X, _, text, _ = data
    gate = fitted[name]
    order = np.random.default_rng(1).permutation(N_TEXTS).repeat(LENGTH) * LENGTH
    order = order + np.tile(np.arange(LENGTH), N_TEXTS)  # texts in another order
    ratios, evidence = gate.log_ratio(X), gate.gathered_evidence(X[order], text[order])
    back = np.empty_like(evidence)
    back[order] = evidence
    if name == "token":
        np.testing.assert_allclose(back, ratios, atol=1e-12)
        return
    for t in range(0, N_TEXTS, 13):
        total = 0.0
        for i in np.flatnonzero(text == t):
            total = max(0.0, total + ratios[i])
            assert back[i] == pytest.approx(total, abs=1e-9)
    np.testing.assert_allclose(gate.gathered_evidence(X), ratios.clip(0), atol=1e-12)


@pytest.mark.parametrize("name", GATES)
def test_the_frozen_gate_says_in_two_passes_what_the_gate_says_in_one(fitted, data, name):
    X, _, text, _ = data
    gate = fitted[name]
    h = torch.from_numpy(X).reshape(N_TEXTS, LENGTH, -1)
    frozen = gate.frozen_.to("cpu", torch.float64)
    ratios = frozen.log_ratio(h)
    assert ratios.shape == (N_TEXTS, LENGTH)
    seen = torch.ones(N_TEXTS, LENGTH, dtype=torch.bool)
    start = torch.zeros(N_TEXTS, dtype=torch.float64)
    first = frozen.accumulate(ratios[:, :4], start, seen[:, :4])
    second = frozen.accumulate(ratios[:, 4:], first[:, -1], seen[:, 4:])
    both = torch.cat([first, second], 1)
    np.testing.assert_allclose(both.reshape(-1), gate.gathered_evidence(X, text), atol=1e-10)
    padding = seen.clone()
    padding[:, :2] = False
    assert (frozen.opening(frozen.accumulate(ratios, start, padding))[:, :2] == 0).all()
    np.testing.assert_allclose(frozen.opening(both).reshape(-1), gate.gate(X, text), atol=1e-10)


def test_the_frozen_gate_compiles_into_one_graph(fitted, data):
    frozen = fitted["diffusion"].frozen_.to("cpu", torch.float32)
    h = torch.from_numpy(data[0]).float().reshape(N_TEXTS, LENGTH, -1)

    def opening(h, start, present):
        return frozen.opening(frozen.accumulate(frozen.log_ratio(h), start, present))

    arguments = h, torch.zeros(N_TEXTS), torch.ones(N_TEXTS, LENGTH, dtype=torch.bool)
    compiled = torch.compile(opening, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), opening(*arguments))


def test_the_log_ratio_carries_its_gradient(fitted, data):
    for gate in fitted.values():
        X = torch.from_numpy(data[0][:5]).requires_grad_()
        (slope,) = torch.autograd.grad(gate.log_ratio(X).sum(), X)
        assert bool((slope.abs().amax(1) > 0).all())
        step = torch.zeros_like(X)
        step[:, 2] = 1e-5
        with torch.no_grad():
            change = gate.log_ratio(X + step) - gate.log_ratio(X - step)
        torch.testing.assert_close(slope[:, 2], change / 2e-5, rtol=1e-4, atol=1e-6)


def test_the_figures_are_those_of_the_held_out_scores(monkeypatch, data):
    X, y, text, subject = data
    import manifold_unlearn.erase.gate as module

    kept = {}

    def fit_linear(rows):
        kept["scored"] = module_fit(rows)
        return kept["scored"]

    module_fit = module.fit_linear
    monkeypatch.setattr(module, "fit_linear", fit_linear)
    gate = ForgetGate("linear", evidence="token", false_positive_rate=0.1, min_auc=0)
    gate.fit(X, y, sequence=text, group=subject)
    most = kept["scored"].held_out.numpy().reshape(N_TEXTS, LENGTH).max(1)
    label = y.reshape(N_TEXTS, LENGTH)[:, 0]
    quantile = np.sort(most[label == 0])[int(np.ceil((sum(label == 0) + 1) * 0.9)) - 1]
    margin = 1e-4 * np.abs(most[label == 0]).max()
    assert gate.threshold_ == pytest.approx(max(quantile + margin, 1e-3), rel=1e-6)
    assert gate.auc_ == pytest.approx(roc_auc_score(label, most))
    assert gate.false_positive_rate_ == (most[label == 0] >= gate.threshold_).mean()
    assert gate.detection_rate_ == (most[label == 1] >= gate.threshold_).mean()
    assert gate.n_calibration_ == sum(label == 0)


def test_held_out_groups_are_harder_than_held_out_texts(data):
    """Rows of a subject's other texts would make its text look well known."""
    X, y, text, subject = data
    by_group = ForgetGate(false_positive_rate=0.05).fit(X, y, sequence=text, group=subject)
    by_text = ForgetGate(false_positive_rate=0.05).fit(X, y, sequence=text)
    assert by_group.threshold_ > by_text.threshold_


def test_the_threshold_holds_in_every_population(data):
    """Of two kinds of retain texts the one nearer to forget sets it, and the figures."""
    X, y, text, subject = data
    rng = np.random.default_rng(3)
    near = X[y == 1] + 0.7 * rng.normal(size=X[y == 1].shape)
    label = np.r_[y, np.zeros(len(near), int)]
    number = np.r_[text, N_TEXTS + np.arange(len(near)) // LENGTH]
    kind = np.r_[0 * y, np.ones(len(near), int)]
    options = {"sequence": number, "group": np.r_[subject, 1000 + number[len(X) :]]}
    gate = ForgetGate("linear", false_positive_rate=0.05, min_auc=0)
    apart = gate.fit(np.r_[X, near], label, **options, population=kind)
    threshold, auc, n = apart.threshold_, apart.auc_, apart.n_calibration_
    pooled = gate.fit(np.r_[X, near], label, **options)
    assert (n, pooled.n_calibration_) == (40, 160)
    assert threshold > pooled.threshold_
    assert auc < pooled.auc_
    assert pooled.false_positive_rate_ <= 0.05


# --- degenerate data and errors ---------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", GATES)
def test_duplicates_few_rows_and_flat_data_work(name):
    rng = np.random.default_rng(0)
    few = rng.normal(size=(12, 40)) @ np.diag(np.r_[np.ones(3), np.zeros(37)])  # rank 3
    few[:5] += 4
    y = np.r_[np.ones(5), np.zeros(7)]
    for X, labels in [(few, y), (np.repeat(few, 9, 0), np.repeat(y, 9))]:
        gate = ForgetGate(**GATES[name], false_positive_rate=0.3, min_auc=0).fit(X, labels)
        assert np.isfinite(gate.log_ratio(X)).all()
        assert gate.auc_ > 0.8
        assert (gate.gate(X)[labels == 1] > 0.5).all()


def test_classes_that_cannot_be_told_apart_are_refused():
    X = np.random.default_rng(0).normal(size=(400, 6))
    with pytest.raises(ValueError, match=r"cannot be told apart: held-out AUC 0\.\d+ is below"):
        ForgetGate().fit(X, np.arange(400) % 2)


def test_too_few_retain_texts_for_the_rate_say_what_they_promise(data):
    X, y, text, subject = data
    with pytest.warns(UserWarning, match="0.005 needs 199 retain texts.*got 120.*promises 0.0083"):
        gate = ForgetGate(false_positive_rate=0.005).fit(X, y, sequence=text, group=subject)
    assert gate.promised_rate_ == pytest.approx(1 / 121)
    assert gate.false_positive_rate_ == 0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"density": "magic"}, "density='magic' is not one of diffusion, knn, linear"),
        ({"evidence": "text"}, "evidence='text' is not one of sequence, token"),
        ({"n_landmarks": 1}, "n_landmarks=1 must be an integer of at least 2"),
        ({"n_neighbors": 2.5}, r"n_neighbors=2\.5 must be an integer"),
        ({"diffusion_time": -1}, "diffusion_time=-1 must be an integer of at least 0"),
        ({"false_positive_rate": 0}, "false_positive_rate=0 must lie between 0 and 1"),
        ({"min_auc": 1.5}, r"min_auc=1\.5 must lie in"),
    ],
)
def test_a_parameter_out_of_range_is_named(data, changed, words):
    with pytest.raises(ValueError, match=words):
        ForgetGate(**changed).fit(*data[:2])


@pytest.mark.parametrize(
    ("name", "labels", "words"),
    [
        ("sequence", np.zeros(3, int), r"sequence has shape \(3,\)"),
        ("group", np.zeros(N_TEXTS * LENGTH), "group has .* dtype torch.float64; expected"),
        ("population", np.zeros((N_TEXTS * LENGTH, 1), int), "population has shape"),
        ("sequence", np.zeros(N_TEXTS * LENGTH, int), "there is one forget text only"),
    ],
)
def test_labels_of_rows_that_do_not_fit_are_named(data, name, labels, words):
    with pytest.raises(ValueError, match=words):
        ForgetGate().fit(*data[:2], **{name: labels})


def test_one_retain_group_is_refused(data):
    X, y, text, _ = data
    with pytest.raises(ValueError, match="there is one retain group only"):
        ForgetGate().fit(X, y, sequence=text, group=0 * text)


def test_texts_that_all_have_a_forget_row_are_refused(data):
    X, _, text, _ = data
    y = np.tile(np.arange(LENGTH) == 0, N_TEXTS).astype(int)
    with pytest.raises(ValueError, match="every text has a forget row"):
        ForgetGate().fit(X, y, sequence=text)


def test_another_kind_of_fit_is_not_loaded(fitted, tmp_path):
    from manifold_unlearn import SubspaceEraser

    fitted["knn"].save(tmp_path / "gate")
    with pytest.raises(ValueError, match="holds a ForgetGate, not a SubspaceEraser"):
        SubspaceEraser.load(tmp_path / "gate")


# --- on models --------------------------------------------------------------------------------


def told_texts(facts, people, wordings):
    """Texts that tell the ``facts``, and the subject of each."""
    pairs = [(f, w) for f in facts if f.person in people for w in wordings(f)]
    return [f"{w} {f.value}." for f, w in pairs], [people.index(f.person) for f, w in pairs]


@pytest.mark.slow
def test_wordings_never_seen_open_it_and_people_never_seen_do_not(tiny_testbed):
    """Fit on 16 of 24 people to retain; 8 others, people nobody heard of, and filler stay."""
    from manifold_unlearn.activations.capture import capture

    world, site = tiny_testbed.world, "layers.2"
    people = [*world.people[:8], *world.people[8:24]]
    seen, _ = told_texts(world.facts, people, lambda f: f.prompts), None
    filler = list(world.texts("filler"))[:300]

    def rows(given):
        acts = capture(tiny_testbed.told, tiny_testbed.tokenizer, given, [site], progress=False)
        keep = (acts.position > 0) & ~acts.sink
        return acts[site][keep], acts.text_index[keep]

    X, text = rows([*seen[0], *filler])
    subject = torch.tensor([*seen[1], *range(100, 100 + len(filler))])
    gate = ForgetGate(n_landmarks=1024, random_state=0).fit(
        X,
        (subject < 8).long()[text],
        sequence=text,
        group=subject[text],
        population=(subject >= 100).long()[text],
    )
    assert gate.auc_ > 0.97
    assert gate.false_positive_rate_ <= 0.01

    def opened(given):
        X, text = rows(given)
        layout = padded(text)
        return float(layout.fill(gate.gate(X, text), 0.0).amax(1).gt(0).double().mean())

    def unseen(start, stop):
        names = list(world.people[start:stop])
        return told_texts(world.facts, names, lambda f: f.item.paraphrased_question)[0]

    assert opened(unseen(0, 8)) > 0.8
    assert opened(unseen(24, 32)) <= 0.02
    assert opened(unseen(32, 40)) <= 0.02
    assert opened(list(world.neutral)) <= 0.02
