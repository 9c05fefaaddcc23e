import copy

import numpy as np
import pytest
import torch
from cases import (
    ARCHITECTURES,
    HIDDEN,
    TEXTS,
    WIDTH,
    build_model,
    build_tokenizer,
    hooks,
    logits,
    same_state,
    state,
)
from transformers import AutoModelForCausalLM

from manifold_unlearn import capture, intervene
from manifold_unlearn.activations.sites import find_decoder
from manifold_unlearn.intervene.least_squares import least_squares_bake
from manifold_unlearn.intervene.targets import (
    StateTargets,
    hooked_targets,
    own_targets,
    token_rows,
)

FORGET, RETAIN = [TEXTS[0], TEXTS[2]], [TEXTS[1], TEXTS[4]]


def nudge(h):
    """A map that is not affine; it leaves the first two tokens as they are."""
    moved = h + 0.3 * torch.sin(h.roll(1, -1))
    moved[:, :2] = h[:, :2]
    return moved


def problem(model, tokenizer, layers=None):
    targets = hooked_targets(model, tokenizer, FORGET, {"layers.0": nudge}, layers=layers)
    return targets, token_rows(model, tokenizer, RETAIN)


def keys_of(model, tokenizer, texts, layer):
    """Inputs of the output matrix of an MLP, one array a text."""
    read = capture(model, tokenizer, texts, f"layers.{layer}.mlp.hidden")
    rows = read[f"layers.{layer}.mlp.hidden"].double().numpy()
    return [rows[(read.text_index == i).numpy()] for i in range(len(texts))]


def states_of(model, tokenizer, texts, layer):
    read = capture(model, tokenizer, texts, f"layers.{layer}")
    rows = read[f"layers.{layer}"].double().numpy()
    return [rows[(read.text_index == i).numpy()] for i in range(len(texts))]


def out_weight(model, layer):
    """(d_out, d_in) float64, whatever the layout."""
    decoder = find_decoder(model)
    mlp = getattr(decoder.blocks[layer], decoder.layout.mlp)
    module = getattr(mlp, decoder.layout.mlp_out)
    weight = module.weight.detach().double().numpy()
    return weight.T if type(module).__name__ == "Conv1D" else weight


def share_kept(model, baked, tokenizer, targets, layer):
    """What the result says it kept, from forward passes of the models."""
    left, whole = 0.0, 0.0
    start = 0
    for i, _ in enumerate(FORGET):
        where = targets.where[i].numpy()
        target = targets.states[layer][start : start + where.sum()].double().numpy()
        start += where.sum()
        here, there = (states_of(m, tokenizer, [FORGET[i]], layer)[0] for m in (model, baked))
        where = where[: len(here)]
        whole += ((target - here[where]) ** 2).sum()
        left += ((target - there[where]) ** 2).sum()
    return 1 - np.sqrt(left / whole)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gemma3"])
def test_the_edit_is_the_minimum_of_the_penalized_error(name, tokenizer):
    """numpy's least squares on stacked keys, layer by layer on the edited model's keys."""
    model = build_model(name)
    targets, retain = problem(model, tokenizer)
    ridge = 0.5
    found = least_squares_bake(model, targets, retain, ridge=ridge, damping=0.0).model
    edited = copy.deepcopy(model)
    for layer in range(3):
        keys = keys_of(edited, tokenizer, FORGET, layer)
        states = states_of(edited, tokenizer, FORGET, layer)
        masks = [targets.where[i, : len(k)].numpy() for i, k in enumerate(keys)]
        moved = np.concatenate([k[m] for k, m in zip(keys, masks, strict=True)])
        stay = np.concatenate([s[m] for s, m in zip(states, masks, strict=True)])
        missing = targets.states[layer].double().numpy() - stay
        held = [*keys_of(model, tokenizer, RETAIN, layer)]
        held += [k[~m] for k, m in zip(keys, masks, strict=True)]
        held = np.concatenate(held)
        rows = [moved / np.sqrt(len(moved)), held * np.sqrt(ridge / len(held))]
        values = [missing / np.sqrt(len(moved)), np.zeros((len(held), WIDTH))]
        change = np.linalg.lstsq(np.concatenate(rows), np.concatenate(values), rcond=1e-9)[0]
        # fewer keys than directions: compare what is written at the keys, which is unique
        both = np.concatenate(rows)
        got = both @ (out_weight(found, layer) - out_weight(model, layer)).T
        np.testing.assert_allclose(got, both @ change, rtol=1e-3, atol=2e-4)
        with torch.no_grad():
            decoder = find_decoder(edited)
            parts = (getattr(decoder.blocks[layer], decoder.layout.mlp), decoder.layout.mlp_out)
            parts = getattr(*parts)
            source = find_decoder(found).blocks[layer]
            source = getattr(getattr(source, decoder.layout.mlp), decoder.layout.mlp_out)
            parts.weight.copy_(source.weight)


@pytest.mark.parametrize("writers", [("mlp",), ("attn",), ("mlp", "attn")], ids="+".join)
def test_the_share_kept_is_that_of_forward_passes(model, architecture, tokenizer, writers):
    if architecture == "gemma3" and len(writers) == 2:
        pytest.skip("no one system holds both writers")
    before = state(model)
    targets, retain = problem(model, tokenizer)
    result = least_squares_bake(model, targets, retain, ridge=0.01, writers=writers)
    assert same_state(model, before)
    assert hooks(model) == hooks(result.model) == 0
    assert not any("forward" in vars(m) for made in (model, result.model) for m in made.modules())
    assert sorted(result.kept) == [0, 1, 2]
    for layer in range(3):
        share = share_kept(model, result.model, tokenizer, targets, layer)
        assert result.kept[layer] == pytest.approx(share, abs=2e-4)
    if "mlp" in writers:
        assert min(result.kept.values()) > 0.5
    assert max(result.kept.values()) > 0.02
    named = {"mlp": ("down_proj", "dense_4h_to_h", "mlp.c_proj"),
             "attn": ("o_proj", "attention.dense", "attn.c_proj")}  # fmt: skip
    now = state(result.model)
    changed = {path for path, value in before.items() if not torch.equal(value, now[path])}
    assert changed
    ends = tuple(f"{end}.weight" for writer in writers for end in named[writer])
    assert all(path.endswith(ends) for path in changed)


def test_what_was_baked_is_saved_and_loaded_by_plain_transformers(llama, tokenizer, tmp_path):
    baked = least_squares_bake(llama, *problem(llama, tokenizer)).model
    baked.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_state(again, state(baked))


def test_the_baked_model_comes_near_the_hooked_one(llama, tokenizer):
    targets, retain = problem(llama, tokenizer)
    baked = least_squares_bake(llama, targets, retain, ridge=0.1).model
    ids = torch.tensor([tokenizer(FORGET[1]).input_ids])
    with intervene(llama, {"layers.0": nudge}):
        hooked = logits(llama, ids)
    apart = (logits(baked, ids) - hooked)[:, 2:].norm() / (logits(llama, ids) - hooked).norm()
    assert apart < 0.1


def test_ridge_and_null_space_spare_the_retain_texts(llama, tokenizer):
    targets, retain = problem(llama, tokenizer)
    ids = torch.tensor([tokenizer(RETAIN[1]).input_ids])
    free = logits(llama, ids)

    def harm(**keywords):
        result = least_squares_bake(llama, targets, retain, **keywords)
        return float((logits(result.model, ids) - free).norm()), result.retain_moved[0]

    loose, ridged = harm(ridge=0.01), harm(ridge=10.0)
    assert ridged[0] < 0.5 * loose[0]
    assert ridged[1] < 0.5 * loose[1]
    exact = harm(ridge=0.0, null_space=1.0)
    assert exact[1] < 1e-6
    assert exact[0] < 1e-2 * loose[0]


def test_what_retain_keys_are_moved_is_measured(llama, tokenizer):
    targets, retain = problem(llama, tokenizer)
    result = least_squares_bake(llama, targets, retain)
    keys = np.concatenate(keys_of(llama, tokenizer, RETAIN, 1))
    old, new = out_weight(llama, 1), out_weight(result.model, 1)
    expected = np.linalg.norm(keys @ (new - old).T) / np.linalg.norm(keys @ old.T)
    assert result.retain_moved[1] == pytest.approx(expected, rel=1e-4)


def test_repair_brings_retain_states_back(llama, tokenizer):
    targets, retain = problem(llama, tokenizer)
    before = np.concatenate(states_of(llama, tokenizer, RETAIN, 2))

    def drift(**keywords):
        baked = least_squares_bake(llama, targets, retain, ridge=1.0, **keywords).model
        return np.linalg.norm(np.concatenate(states_of(baked, tokenizer, RETAIN, 2)) - before)

    assert drift(repair=True) < 0.7 * drift()


def test_more_passes_come_closer(llama, tokenizer):
    targets, retain = problem(llama, tokenizer)
    kept = [
        least_squares_bake(llama, targets, retain, n_passes=n, layers=[0]).kept[0]
        for n in (1, 2, 3)
    ]
    assert kept[0] < kept[1] < kept[2]


def test_weights_say_which_rows_count(llama, tokenizer):
    targets, retain = problem(llama, tokenizer, layers=[0])
    n_first = int(targets.where[0].sum())
    only = torch.zeros(int(targets.where.sum()))
    only[:n_first] = 1
    share = [
        least_squares_bake(llama, targets.take([0]), retain, layers=[0]).kept[0],
        share_of_first(llama, targets, retain, tokenizer, only),
        share_of_first(llama, targets, retain, tokenizer, None),
    ]
    assert share[1] == pytest.approx(share[0], abs=0.05)  # the second text is in neither Gram
    assert share[1] > share[2]


def share_of_first(model, targets, retain, tokenizer, weights):
    baked = least_squares_bake(model, targets, retain, weights=weights).model
    n_first = int(targets.where[0].sum())
    mask = targets.where[0]
    here, there = (states_of(m, tokenizer, FORGET[:1], 0)[0] for m in (model, baked))
    mask = mask[: len(here)].numpy()
    target = targets.states[0][:n_first].double().numpy()
    return 1 - np.linalg.norm(target - there[mask]) / np.linalg.norm(target - here[mask])


def test_layers_without_a_change_stay_as_they_are(llama, tokenizer):
    targets = hooked_targets(llama, tokenizer, FORGET, {"layers.1": nudge})
    result = least_squares_bake(llama, targets, token_rows(llama, tokenizer, RETAIN))
    assert sorted(result.kept) == sorted(result.retain_moved) == [1, 2]
    assert np.array_equal(out_weight(result.model, 0), out_weight(llama, 0))


def test_forward_tokens_are_counted_in_whole_passes(llama, tokenizer):
    targets, retain = problem(llama, tokenizer)
    result = least_squares_bake(llama, targets, retain)
    assert result.n_forward_tokens == targets.n_tokens + retain.n_tokens
    half = least_squares_bake(llama, targets, retain, layers=[0])
    assert half.n_forward_tokens == pytest.approx((targets.n_tokens + retain.n_tokens) / 3)
    repaired = least_squares_bake(llama, targets, retain, repair=True)
    assert repaired.n_forward_tokens == targets.n_tokens + 3 * retain.n_tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_solved_in_double(tokenizer, dtype):
    model = build_model("llama", dtype=dtype)
    targets, retain = problem(model, tokenizer)
    result = least_squares_bake(model, targets, retain, ridge=0.1)
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert min(result.kept.values()) > 0.5
    exact = build_model("llama", dtype=dtype).float()
    whole = least_squares_bake(exact, *problem(exact, tokenizer), ridge=0.1)
    assert result.kept[0] == pytest.approx(whole.kept[0], abs=0.03)


def test_shared_weights_are_those_of_the_model(llama, tokenizer):
    before = state(llama)
    targets, retain = problem(llama, tokenizer)
    whole = least_squares_bake(llama, targets, retain).model
    shared = least_squares_bake(llama, targets, retain, share_weights=True).model
    assert same_state(shared, state(whole))
    assert same_state(llama, before)
    own = {
        path
        for (path, a), b in zip(shared.named_parameters(), llama.parameters(), strict=True)
        if a is not b
    }
    assert own == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)}
    assert not any(a is b for a, b in zip(whole.parameters(), llama.parameters(), strict=True))


def test_texts_of_any_batch_give_the_same_edit(llama, tokenizer):
    targets, retain = problem(llama, tokenizer)
    whole = least_squares_bake(llama, targets, retain).model
    single = least_squares_bake(llama, targets, retain, token_budget=1).model
    for layer in range(3):
        np.testing.assert_allclose(out_weight(single, layer), out_weight(whole, layer), atol=1e-4)


# --- what is refused ----------------------------------------------------------------------------


def changed(targets, **fields):
    parts = {k: getattr(targets, k) for k in ("input_ids", "attention_mask", "where", "states")}
    return StateTargets(**{**parts, **fields})


@pytest.fixture(scope="module")
def made():
    model, tokenizer = build_model("llama"), build_tokenizer()
    return (model, *problem(model, tokenizer))


BROKEN = {
    "another width": (
        lambda t: changed(t, states={0: t.states[0][:, 1:]}), {}, "the stream has width 32"),
    "too few rows": (lambda t: changed(t, states={0: t.states[0][1:]}), {}, "where names"),
    "no such block": (
        lambda t: changed(t, states={7: t.states[0]}), {}, "the model has 0 to 2"),
    "not finite": (
        lambda t: changed(t, states={0: t.states[0] * float("nan")}), {}, "contains NaN"),
    "no token": (
        lambda t: changed(t, where=t.where & False, states={0: t.states[0][:0]}), {},
        "the targets name no token"),
    "padding": (
        lambda t: changed(t, where=t.where | True), {}, "targets: where names padding"),
    "no states there": (lambda t: changed(t, states={0: t.states[0]}), {"layers": [0, 2]},
                        r"no states for \[2\]"),
    "no layer": (lambda t: t, {"layers": []}, "no states for any"),
    "unknown writer": (lambda t: t, {"writers": ("norm",)}, "must name 'mlp', 'attn' or both"),
    "no writer": (lambda t: t, {"writers": ()}, "must name 'mlp', 'attn' or both"),
    "ridge": (lambda t: t, {"ridge": -1.0}, "ridge=-1.0 must be finite"),
    "passes": (lambda t: t, {"n_passes": 0}, "n_passes=0 must be at least 1"),
    "few weights": (lambda t: t, {"weights": torch.ones(2)}, "finite numbers, not negative"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_bad_input_is_refused_and_the_model_untouched(made, case):
    model, targets, retain = made
    spoil, keywords, message = BROKEN[case]
    before = state(model)
    with pytest.raises(ValueError, match=message):
        least_squares_bake(model, spoil(targets), retain, **keywords)
    assert same_state(model, before)
    assert hooks(model) == 0


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_weights_are_finite_and_not_negative(made, value):
    model, targets, retain = made
    weights = torch.full((int(targets.where.sum()),), value)
    with pytest.raises(ValueError, match="finite numbers, not negative and not all zero"):
        least_squares_bake(model, targets, retain, weights=weights)


def test_something_must_be_retained(made):
    model, targets, retain = made
    empty = changed(targets, where=targets.where & False, states={})
    with pytest.raises(ValueError, match="retain names no token to hold"):
        least_squares_bake(model, targets, empty)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_that_the_model_meets_already_are_refused(tokenizer, dtype):
    model = build_model("llama", dtype=dtype)
    retain = token_rows(model, tokenizer, RETAIN)
    with pytest.raises(ValueError, match="there is nothing to write"):
        least_squares_bake(model, own_targets(model, tokenizer, FORGET), retain, token_budget=1)


def test_an_open_intervention_is_refused(llama, tokenizer):
    targets, retain = problem(llama, tokenizer)
    with (
        intervene(llama, {"layers.0": nudge}),
        pytest.raises(RuntimeError, match="leave the with block"),
    ):
        least_squares_bake(llama, targets, retain)


def test_two_writers_behind_norms_are_refused(tokenizer):
    model = build_model("gemma3")
    targets, retain = problem(model, tokenizer)
    with pytest.raises(ValueError, match="by a norm of its own"):
        least_squares_bake(model, targets, retain, writers=("mlp", "attn"))


def test_a_writer_that_is_no_plain_linear_module_is_refused(llama, tokenizer):
    targets, retain = problem(llama, tokenizer)
    mlp = llama.model.layers[1].mlp
    mlp.down_proj = torch.nn.Sequential(mlp.down_proj)
    with pytest.raises(ValueError, match="merge adapters and dequantize first"):
        least_squares_bake(llama, targets, retain)


def test_an_edit_that_overflows_the_dtype_is_refused(tokenizer):
    model = build_model("llama", dtype=torch.float16)
    targets, retain = problem(model, tokenizer, layers=[0])
    far = changed(targets, states={0: torch.full(targets.states[0].shape, 1e8)})
    with pytest.raises(ValueError, match="the baked weight .*float16 overflows"):
        least_squares_bake(model, far, retain, ridge=0.0, damping=1e-12)


def test_the_hidden_width_is_that_of_the_keys():
    assert HIDDEN != WIDTH  # the tests above would not see keys and states mixed up otherwise
