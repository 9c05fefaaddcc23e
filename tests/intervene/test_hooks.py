from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import (
    ARCHITECTURES,
    HIDDEN,
    TEXTS,
    WIDTH,
    build_model,
    hooks,
    logits,
    same_state,
    state,
    two_classes,
)
from torch import nn

from manifold_unlearn import intervene
from manifold_unlearn.activations.capture import capture
from manifold_unlearn.activations.sites import resolve_site, site_names
from manifold_unlearn.erase.subspace import SubspaceEraser
from manifold_unlearn.intervene.hooks import is_intervened
from manifold_unlearn.intervene.maps import AffineMap, DenseAffineMap


def low_rank(width=WIDTH, seed=0, size=1.0):
    """A map that visibly changes every row."""
    draw = torch.Generator().manual_seed(seed)
    read, write = (torch.randn(width, 2, generator=draw) for _ in range(2))
    return AffineMap(size * read / width**0.5, write / width**0.5, torch.ones(2))


def ids_of(tokenizer, text=TEXTS[0]):
    return torch.tensor([tokenizer(text).input_ids])


def padded(tokenizer, texts, side):
    """Ids and mask of texts in one rectangle."""
    tokens = [tokenizer(text).input_ids for text in texts]
    width = max(map(len, tokens))
    ids = torch.full((len(texts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for r, row in enumerate(tokens):
        span = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[r, span], mask[r, span] = torch.tensor(row), 1
    return ids, mask


def generated(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2} | options
    options["min_new_tokens"] = options["max_new_tokens"]
    new = model.generate(input_ids=ids, attention_mask=mask, **options)
    return new[:, ids.shape[1] :]


# --- what an edit does ----------------------------------------------------------------------


@pytest.mark.parametrize("site", ["embed", "layers.1", "layers.1.attn", "layers.1.mlp"])
def test_the_rows_of_a_site_are_the_mapped_ones(model, tokenizer, site):
    before = capture(model, tokenizer, TEXTS, site)[site]
    fitted = low_rank()
    with intervene(model, {site: fitted}):
        after = capture(model, tokenizer, TEXTS, site)[site]
    torch.testing.assert_close(after, fitted(before))
    assert (after - before).abs().max() > 0.1


def test_the_input_of_a_matrix_is_edited_before_it(model, tokenizer):
    site, fitted = "layers.1.mlp.hidden", low_rank(HIDDEN)
    before = capture(model, tokenizer, TEXTS, site)[site]
    with intervene(model, {site: fitted}):
        acts = capture(model, tokenizer, TEXTS, [site, "layers.1.mlp"])
    torch.testing.assert_close(acts[site], fitted(before))
    matrix = resolve_site(model, site).module
    with torch.no_grad():
        torch.testing.assert_close(matrix(fitted(before)), acts["layers.1.mlp"])


def test_the_edit_reaches_the_logits(model, tokenizer):
    ids = ids_of(tokenizer)
    before = logits(model, ids)
    for site in site_names(model):
        width = HIDDEN if site.endswith("hidden") else WIDTH
        with intervene(model, {site: low_rank(width)}):
            assert (logits(model, ids) - before).abs().max() > 1e-3, site


def test_the_identity_changes_nothing_to_the_bit(model, tokenizer):
    ids = ids_of(tokenizer)
    before = logits(model, ids)
    maps = {name: (lambda h: h) for name in site_names(model)}
    with intervene(model, maps):
        assert torch.equal(logits(model, ids), before)


def test_a_fitted_eraser_is_a_map(llama, tokenizer):
    acts = capture(llama, tokenizer, TEXTS, "layers.1")
    eraser = SubspaceEraser("leace").fit(acts["layers.1"], acts.text_index == 0)
    with intervene(llama, {"layers.1": eraser}):
        after = capture(llama, tokenizer, TEXTS, "layers.1")["layers.1"]
    torch.testing.assert_close(after, eraser.transform(acts["layers.1"]))


def test_a_numpy_fit_and_bare_arrays_edit_alike(llama, tokenizer):
    X, y = two_classes(n_features=WIDTH)
    eraser = SubspaceEraser("leace").fit(X, y)
    bare = SimpleNamespace(matrix_=eraser.matrix_, bias_=eraser.bias_)
    out = []
    for fitted in (eraser, bare):
        with intervene(llama, {"layers.1": fitted}):
            out.append(logits(llama, ids_of(tokenizer)))
    torch.testing.assert_close(*out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [tuple, list])
def test_outputs_that_lead_a_tensor_keep_their_company(kind):
    class Pair(nn.Module):
        def forward(self, x):
            return kind([2 * x, "rest", 7])

    model = nn.Sequential(Pair())
    with intervene(model, {"0": lambda h: h + 1}):
        out = model[0](torch.ones(1, 2, 3))
    assert isinstance(out, kind)
    assert torch.equal(out[0], torch.full((1, 2, 3), 3.0))
    assert list(out[1:]) == ["rest", 7]


def test_the_rows_that_pass_are_not_written_to():
    model = nn.Sequential(nn.Identity())
    x = torch.ones(1, 2, 3)
    with intervene(model, {"0": DenseAffineMap(torch.zeros(3, 3), torch.ones(3) * 5)}):
        out = model(x)
    assert torch.equal(x, torch.ones(1, 2, 3))
    assert torch.equal(out, torch.full((1, 2, 3), 5.0))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(name, dtype, tokenizer):
    model = build_model(name, dtype=dtype)
    with intervene(model, {"layers.1": low_rank(), "layers.0.mlp.hidden": low_rank(HIDDEN)}):
        out = logits(model, ids_of(tokenizer))
        acts = capture(model, tokenizer, TEXTS[:1], "layers.1")
    assert out.dtype == acts["layers.1"].dtype == dtype
    assert torch.isfinite(out).all()


def test_nested_blocks_compose_and_the_inner_sees_what_the_outer_left(llama, tokenizer):
    outer, inner = low_rank(seed=1), low_rank(seed=2)
    before = capture(llama, tokenizer, TEXTS, "layers.1")["layers.1"]
    with intervene(llama, {"layers.1": outer}):
        with intervene(llama, {"layers.1": inner}):
            both = capture(llama, tokenizer, TEXTS, "layers.1")["layers.1"]
        one = capture(llama, tokenizer, TEXTS, "layers.1")["layers.1"]
    torch.testing.assert_close(both, inner(outer(before)))
    torch.testing.assert_close(one, outer(before))
    assert (inner(outer(before)) - outer(inner(before))).abs().max() > 1e-2


def test_gradients_flow_through_an_edit(llama, tokenizer):
    with intervene(llama, {"layers.1": low_rank()}):
        llama(input_ids=ids_of(tokenizer)).logits.sum().backward()
    assert llama.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


# --- the stream -----------------------------------------------------------------------------


def dual(width=WIDTH):
    made = low_rank(width)
    write = made.write @ torch.linalg.inv(made.read.T @ made.write)
    return AffineMap(made.read, write, made.offset)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gemma3"])
def test_stream_edits_every_state_of_the_stream(name, tokenizer):
    model, fitted = build_model(name), dual()
    sites = ["embed", "layers.0", "layers.1", "layers.2"]
    with intervene(model, {"stream": fitted}):
        after = capture(model, tokenizer, TEXTS, sites)
    free = capture(model, tokenizer, TEXTS, sites)
    for site in sites:
        read = after[site] @ fitted.read
        torch.testing.assert_close(read, fitted.offset.expand_as(read), rtol=1e-3, atol=1e-3)
        assert (free[site] @ fitted.read - fitted.offset).abs().max() > 0.1


def test_a_stream_that_is_normalized_after_the_writers_is_refused():
    with pytest.raises(ValueError, match="normalizes what its blocks write"):
        intervene(build_model("gemma3"), {"stream": dual()}).__enter__()


def test_a_writer_beside_the_stream_is_refused(llama):
    with pytest.raises(ValueError, match=r"'stream' already edits \['layers.1.mlp'\]"):
        intervene(llama, {"stream": dual(), "layers.1.mlp": dual()}).__enter__()


# --- generation -----------------------------------------------------------------------------


def test_generation_is_the_same_with_and_without_a_cache(model, tokenizer):
    ids = ids_of(tokenizer)
    free = generated(model, ids)
    with intervene(model, {"layers.1": low_rank(), "layers.0.attn": low_rank(seed=3)}):
        cached = generated(model, ids, use_cache=True)
        full = generated(model, ids, use_cache=False)
    assert torch.equal(cached, full)
    assert not torch.equal(cached, free)


@pytest.mark.parametrize("tokens", ["all", "but_first", "last", "prompt", "generated"])
def test_left_padding_generates_what_no_padding_does(model, tokenizer, tokens):
    ids, mask = padded(tokenizer, TEXTS[:3], "left")
    with intervene(model, {"layers.1": low_rank()}, tokens=tokens):
        together = generated(model, ids, mask)
        alone = [generated(model, ids_of(tokenizer, text))[0] for text in TEXTS[:3]]
    for row, expected in zip(together, alone, strict=True):
        assert torch.equal(row, expected)


def rows_edited(model, tokenizer, tokens, steps=3):
    """Which rows of each pass of a generation an edit changes."""
    changed = []

    def note(h):
        return h + 1

    def see(_module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        changed.append((hidden - kept[0]).abs().amax(-1) > 0.5)

    kept = []
    block = resolve_site(model, "layers.1").module
    first = block.register_forward_hook(
        lambda m, a, out: kept.__setitem__(slice(None), [out[0] if isinstance(out, tuple) else out])
    )
    with intervene(model, {"layers.1": note}, tokens=tokens):
        last = block.register_forward_hook(see)
        generated(model, ids_of(tokenizer), max_new_tokens=steps)
        last.remove()
    first.remove()
    return [pass_.int().tolist()[0] for pass_ in changed]


def test_tokens_choose_the_rows_of_each_pass(model, tokenizer):
    n = ids_of(tokenizer).shape[1]
    ones, zeros = [1] * n, [0] * n
    assert rows_edited(model, tokenizer, "all") == [ones, [1], [1]]
    assert rows_edited(model, tokenizer, "but_first") == [[0, *ones[1:]], [1], [1]]
    assert rows_edited(model, tokenizer, "last") == [[0] * (n - 1) + [1], [1], [1]]
    assert rows_edited(model, tokenizer, "prompt") == [ones, [0], [0]]
    assert rows_edited(model, tokenizer, "generated") == [zeros, [1], [1]]
    mask = torch.zeros(1, n, dtype=torch.bool)
    mask[0, [0, 4]] = True
    assert rows_edited(model, tokenizer, mask) == [mask[0].int().tolist(), [0], [0]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_row_is_the_last_that_is_not_padding(llama, tokenizer, side):
    ids, mask = padded(tokenizer, TEXTS[:3], side)
    seen = []
    with intervene(llama, {"layers.1": lambda h: torch.zeros_like(h)}, tokens="last"):
        handle = resolve_site(llama, "layers.1").module.register_forward_hook(
            lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        logits(llama, ids, attention_mask=mask)
        handle.remove()
    zeroed = (seen[0] == 0).all(-1)
    ends = [row.nonzero().max().item() for row in mask]
    assert [row.nonzero().flatten().tolist() for row in zeroed] == [[end] for end in ends]


def test_the_beams_of_a_prompt_share_its_mask(llama, tokenizer):
    """Generation with beams runs every prompt several times, one after the other."""
    ids = ids_of(tokenizer).repeat(4, 1)
    mask = torch.zeros(2, ids.shape[1], dtype=torch.bool)
    mask[0, 1] = mask[1, 5] = True
    seen = []
    with intervene(llama, {"layers.1": lambda h: torch.zeros_like(h)}, tokens=mask):
        handle = llama.model.layers[1].register_forward_hook(lambda m, a, out: seen.append(out))
        logits(llama, ids)
        handle.remove()
    zeroed = (seen[0] == 0).all(-1)
    assert [row.nonzero().flatten().tolist() for row in zeroed] == [[1], [1], [5], [5]]


def test_a_mask_serves_generation_with_beams(llama, tokenizer):
    ids, mask = padded(tokenizer, TEXTS[:2], "left")
    with intervene(llama, {"layers.1": low_rank()}, tokens=mask.bool()):
        masked = generated(llama, ids, mask, num_beams=2)
    with intervene(llama, {"layers.1": low_rank()}, tokens="prompt"):
        prompt = generated(llama, ids, mask, num_beams=2)
    assert torch.equal(masked, prompt)
    assert not torch.equal(masked, generated(llama, ids, mask, num_beams=2))


# --- nothing is left ------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["all", "last", "generated"])
def test_nothing_is_left_on_exit(model, tokenizer, tokens):
    ids, before, weights = ids_of(tokenizer), None, state(model)
    before = logits(model, ids)
    with intervene(model, {"layers.1": low_rank(), "embed": low_rank()}, tokens=tokens) as inside:
        assert inside is model
        assert is_intervened(model)
        assert hooks(model) >= 2
        logits(model, ids)
    assert hooks(model) == 0
    assert not is_intervened(model)
    assert same_state(model, weights)
    assert torch.equal(logits(model, ids), before)


def test_nothing_is_left_after_an_exception_of_the_block(model, tokenizer):
    weights = state(model)
    with (
        pytest.raises(KeyError, match="mine"),
        intervene(model, {"layers.1": low_rank()}, tokens="last"),
    ):
        raise KeyError("mine")
    assert hooks(model) == 0
    assert same_state(model, weights)


def test_nothing_is_left_after_an_exception_of_the_map(model, tokenizer):
    def broken(h):
        raise RuntimeError("broken map")

    with (
        pytest.raises(RuntimeError, match="broken map"),
        intervene(model, {"layers.0": low_rank(), "layers.1": broken}, tokens="prompt"),
    ):
        logits(model, ids_of(tokenizer))
    assert hooks(model) == 0


def test_a_missing_site_is_found_before_any_hook_is_set(model):
    with pytest.raises(ValueError, match="no site 'layers.9'"):
        intervene(model, {"layers.0": low_rank(), "layers.9": low_rank()}).__enter__()
    assert hooks(model) == 0


# --- errors ---------------------------------------------------------------------------------


def test_no_map_is_refused(llama):
    with pytest.raises(ValueError, match="site_maps is empty"):
        intervene(llama, {}).__enter__()


@pytest.mark.parametrize("make", [low_rank, lambda w: DenseAffineMap(torch.eye(w), torch.ones(w))])
def test_a_map_of_another_width_is_refused(llama, tokenizer, make):
    with (
        pytest.raises(ValueError, match=r"'layers.1' was fitted for width 16.*has width 32"),
        intervene(llama, {"layers.1": make(16)}),
    ):
        logits(llama, ids_of(tokenizer))


def test_a_map_that_changes_the_shape_is_refused(llama, tokenizer):
    with (
        pytest.raises(ValueError, match=r"answered .1, 14, 1. to .1, 14, 32.; it must keep"),
        intervene(llama, {"layers.1": lambda h: h[..., :1]}),
    ):
        logits(llama, ids_of(tokenizer))


def test_unknown_tokens_are_refused_and_no_hook_is_set(llama):
    with pytest.raises(ValueError, match="tokens='first' is not 'all', 'but_first'"):
        intervene(llama, {"layers.1": low_rank()}, tokens="first").__enter__()
    assert hooks(llama) == 0


def test_a_mask_of_another_shape_is_refused(llama, tokenizer):
    with (
        pytest.raises(ValueError, match=r"tokens has shape .1, 3.; the pass has .* .1, 14."),
        intervene(llama, {"layers.1": low_rank()}, tokens=torch.ones(1, 3, dtype=torch.bool)),
    ):
        logits(llama, ids_of(tokenizer))


def test_an_object_that_is_no_map_is_refused(llama):
    with pytest.raises(ValueError, match="is a ndarray without matrix_ and bias_"):
        intervene(llama, {"layers.1": np.eye(WIDTH)}).__enter__()
