import warnings
from functools import cache

import numpy as np
import pytest
import torch
from cases import build_model, logits, same_state, state

from manifold_unlearn.erase.compose import ComposedEraser
from manifold_unlearn.erase.manifold import ManifoldEraser
from manifold_unlearn.intervene.hooks import intervene
from manifold_unlearn.intervene.maps import is_sequential

pytestmark = pytest.mark.filterwarnings("ignore:false_positive_rate=0.01 needs:UserWarning")

CORNERS = {"north": [6.0, 0, 0, 0], "east": [0, 6.0, 0, 0], "up": [0, 0, 6.0, 0]}


def around(corner, n, seed):
    return np.random.default_rng(seed).normal(size=(n, 4)) + corner


@cache
def fitted(name, evidence="token", density="linear"):
    """Eraser of one corner; the middle is retained."""
    X = np.concatenate([around(CORNERS[name], 120, 1), around([0.0] * 4, 240, 2)])
    y, text = np.arange(360) < 120, np.arange(360) // 6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of too few texts for the rate
        return ManifoldEraser(
            mode="transport", density=density, evidence=evidence, n_neighbors=4, random_state=0
        ).fit(X, y.astype(int), sequence=text)


def composed(*names, evidence="token"):
    return ComposedEraser({name: fitted(name, evidence) for name in names})


def everything(seed=7):
    corners = [around(c, 40, seed + i) for i, c in enumerate(CORNERS.values())]
    between = around([5.0, 5.0, 0, 0], 40, seed + 9)
    return np.concatenate([*corners, between, around([0.0] * 4, 80, seed + 10)])


def test_every_concept_is_erased_and_the_rest_stays_to_the_bit():
    X, both = everything(), composed("north", "east")
    out, opened = both.transform(X), both.gate(X)
    assert opened.shape == (240, 2)
    assert (opened[:40, 0] > 0).mean() > 0.9
    assert (opened[40:80, 1] > 0).mean() > 0.9
    assert np.median(np.abs(out[:40, 0])) < 2 < np.median(np.abs(X[:40, 0]))
    assert np.median(np.abs(out[40:80, 1])) < 2 < np.median(np.abs(X[40:80, 1]))
    shut = (opened == 0).all(1)
    assert 0 < shut.sum() < 240
    np.testing.assert_array_equal(out[shut], X[shut])


def test_where_gates_overlap_the_larger_evidence_edits():
    X, both = everything(), composed("north", "east")
    alone = {name: fitted(name) for name in ("north", "east")}
    evidence = np.stack([e.gate_.gathered_evidence(X) for e in alone.values()], 1)
    contested = np.stack([e.gate(X) > 0 for e in alone.values()], 1).all(1)
    assert contested.sum() > 10
    larger = evidence.argmax(1)
    assert len(set(larger[contested])) == 2
    out = both.transform(X)
    for number, eraser in enumerate(alone.values()):
        won = contested & (larger == number)
        np.testing.assert_allclose(out[won], eraser.transform(X)[won], atol=1e-12)
        assert (both.gate(X)[won, 1 - number] == 0).all()


def test_a_closed_gate_of_larger_evidence_does_not_keep_an_open_one_from_editing():
    strict, lax = fitted("north"), fitted("east")
    X = everything()
    both = ComposedEraser({"north": strict, "east": lax})
    evidence = np.stack([e.gate_.gathered_evidence(X) for e in (strict, lax)], 1)
    thresholds = np.array([strict.gate_.threshold_, lax.gate_.threshold_])
    opened = evidence >= thresholds
    np.testing.assert_array_equal((both.gate(X) > 0).any(1), opened.any(1))


def test_one_concept_is_that_eraser():
    X = everything()
    np.testing.assert_array_equal(composed("up").transform(X), fitted("up").transform(X))


def test_a_concept_that_is_withdrawn_leaves_no_trace_to_the_bit():
    X, before = everything(), composed("north", "up")
    with_it = before.including("east", fitted("east"))
    assert (with_it.transform(X) != before.transform(X)).any()
    assert list(before.concepts) == ["north", "up"]
    after = with_it.without("east")
    np.testing.assert_array_equal(after.transform(X), before.transform(X))
    np.testing.assert_array_equal(after.gate(X), before.gate(X))


@pytest.mark.parametrize("evidence", ["token", "sequence"])
def test_without_any_concept_it_is_the_identity(evidence):
    X = torch.tensor(everything())
    empty = composed("north", evidence=evidence).without("north")
    assert torch.equal(empty.transform(X), X)
    assert empty(X) is X
    assert empty.gate(X).shape == (240, 0)
    present = torch.ones(2, 120, dtype=torch.bool)
    out, trace = empty.step(X.reshape(2, 120, 4), torch.zeros(2, 0), present)
    assert torch.equal(out.reshape(240, 4), X)
    assert trace.shape == (2, 120, 0)


def test_steps_gather_the_evidence_of_every_concept_apart():
    X = everything()
    both = composed("north", "east", evidence="sequence")
    assert both.evidence == "sequence"
    assert both.evidence_shape == (2,)
    text = np.arange(240) // 6
    batch = torch.tensor(X.reshape(40, 6, 4))
    start, present = torch.zeros(40, 2, dtype=torch.float64), torch.ones(40, 6, dtype=torch.bool)
    out, evidence = both.step(batch, start, present)
    assert evidence.shape == (40, 6, 2)
    np.testing.assert_allclose(out.reshape(240, 4), both.transform(X, text), atol=1e-12)
    for number, name in enumerate(("north", "east")):
        alone = fitted(name, "sequence").gate_.gathered_evidence(X, text).reshape(40, 6)
        np.testing.assert_allclose(evidence[..., number], alone, atol=1e-9)
    first, trace = both.step(batch[:, :2], start, present[:, :2])
    second, _ = both.step(batch[:, 2:], trace[:, -1], present[:, 2:])
    np.testing.assert_allclose(torch.cat([first, second], 1), out, atol=1e-12)
    with pytest.raises(ValueError, match="evidence='sequence' needs the rows of a sequence"):
        both(batch)


def test_concepts_of_both_kinds_of_evidence_mix():
    X, text = everything(), np.arange(240) // 6
    mixed = ComposedEraser({"north": fitted("north"), "east": fitted("east", "sequence")})
    assert mixed.evidence == "sequence"
    out = mixed.transform(X, text)
    expected = fitted("north").transform(X)
    np.testing.assert_allclose(out[:36], expected[:36], atol=1e-12)


def test_called_on_hidden_states_it_answers_as_transform():
    X, both = everything(), composed("north", "east")
    assert not is_sequential(both)
    hidden = both(torch.tensor(X.reshape(4, 60, 4)))
    np.testing.assert_allclose(hidden.reshape(240, 4), both.transform(X), atol=1e-12)
    single = both.to("cpu", torch.float32)(torch.tensor(X, dtype=torch.float32))
    np.testing.assert_allclose(single, both.transform(X), atol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
def test_arrays_answer_in_their_kind_and_dtype(kind, dtype):
    rows, both = kind(everything().astype(dtype)), composed("north", "east")
    for made in (both.transform(rows), both.gate(rows)):
        assert type(made) is type(rows)
        assert made.dtype == rows.dtype


def test_saved_then_loaded_is_equal_whatever_the_names(tmp_path):
    X = everything()
    both = ComposedEraser({"a/../b": fitted("north"), "München 1": fitted("east", "sequence")})
    both.save(tmp_path / "both")
    again = ComposedEraser.load(tmp_path / "both")
    assert list(again.concepts) == ["a/../b", "München 1"]
    text = np.arange(240) // 6
    np.testing.assert_array_equal(again.transform(X, text), both.transform(X, text))
    assert (again.transform(X, text) != X).any()
    both.without("a/../b").save(tmp_path / "both")
    assert list(ComposedEraser.load(tmp_path / "both").concepts) == ["München 1"]


def test_in_a_model_the_gates_of_two_concepts_gather_evidence():
    """Two vocabularies are forgotten; a prompt of a third is answered as before."""
    model, draw = build_model("llama"), torch.Generator().manual_seed(0)

    def prompts(low, high, n):
        ids = torch.randint(low, high, (n, 6), generator=draw)
        return torch.cat([torch.zeros(n, 1, dtype=torch.int64), ids], 1)

    def rows(ids):
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[2]
        return hidden[:, 1:].reshape(-1, 32)

    sets = {"low": prompts(10, 50, 40), "high": prompts(200, 240, 40)}
    retain = prompts(90, 160, 120)
    erasers = {}
    for name, ids in sets.items():
        both = torch.cat([rows(ids), rows(retain)])
        label, text = torch.arange(len(both)) < 240, torch.arange(len(both)) // 6
        eraser = ManifoldEraser(mode="transport", evidence="sequence", random_state=0)
        erasers[name] = eraser.fit(both, label.long(), sequence=text)
    weights = state(model)
    for name, other in (("low", "high"), ("high", "low")):
        alone = ComposedEraser({name: erasers[name]})
        plain = logits(model, sets[name])
        with intervene(model, {"layers.1": alone}):
            one = logits(model, sets[name])
        with intervene(model, {"layers.1": alone.including(other, erasers[other])}):
            two = logits(model, sets[name])
        assert not torch.allclose(one, plain, atol=0.1)
        assert ((one - two).abs().amax((1, 2)) < 1e-4).float().mean() > 0.8
    assert same_state(model, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda both: both.including("north", fitted("north")), "'north' is composed already"),
        (lambda both: both.without("west"), r"'west' is not among the concepts \['east', 'north'"),
        (lambda both: both.including("new", ManifoldEraser()), "eraser of 'new' is not fitted"),
    ],
)
def test_a_wrong_concept_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        change(composed("north", "east"))


def test_an_eraser_of_another_site_or_without_a_gate_is_refused():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(30, 4)), np.arange(30) % 2
    with pytest.warns(UserWarning, match="fits a linear eraser"):
        linear = ManifoldEraser(mode="auto").fit(X, y)
    with pytest.raises(ValueError, match=r"of 'line' is linear \(fallback_\), without a gate"):
        ComposedEraser({"line": linear})
    X[y == 1] += 9
    wide = ManifoldEraser(mode="transport").fit(np.hstack([X, X]), y)
    with pytest.raises(ValueError, match="of 'wide' is of width 8, the first of width 4"):
        composed("north").including("wide", wide)
