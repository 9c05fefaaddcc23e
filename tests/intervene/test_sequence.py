import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
from cases import ARCHITECTURES, TEXTS, WIDTH, build_model, hooks, logits, same_state, state
from torch import nn
from transformers import DynamicCache, StaticCache

from manifold_unlearn import capture, intervene
from manifold_unlearn.activations.sites import resolve_site
from manifold_unlearn.intervene.maps import SequentialSiteMap, SiteMap, is_sequential
from manifold_unlearn.intervene.sequence import EvidenceTrace

SITE = "layers.1"


@dataclass(frozen=True, eq=False)
class Cusum:
    """Moves the rows of a sequence once the one-sided sum of a linear score has been reached."""

    direction: torch.Tensor
    drift: float
    threshold: float
    shift: torch.Tensor

    def step(self, h, start, present):
        wide = h.to(start.dtype)
        score = torch.where(present, wide @ self.direction.to(wide) - self.drift, 0)
        total = start[:, None] + score.cumsum(1)
        evidence = total - total.cummin(1).values.clamp(max=0)
        moved = (wide + self.shift.to(wide)).to(h.dtype)
        return torch.where((evidence >= self.threshold)[..., None], moved, h), evidence


def by_the_loop(rows, direction, drift, present, start=0.0):
    """Page's recursion, one row after the other."""
    evidence, e = [], start
    for row, counts in zip(rows.double(), present, strict=True):
        e = max(0.0, e + float(row @ direction.double()) - drift) if counts else e
        evidence.append(e)
    return torch.tensor(evidence)


def ids_of(tokenizer, text=TEXTS[0]):
    return torch.tensor([tokenizer(text).input_ids])


def padded(tokenizer, texts):
    """Ids and mask of texts, padded on the left."""
    rows = [tokenizer(text).input_ids for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[2] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def generated(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2} | options
    options["min_new_tokens"] = options["max_new_tokens"]
    new = model.generate(input_ids=ids, attention_mask=mask, **options)
    return new[:, ids.shape[1] :]


def rows_at(model, tokenizer, site=SITE):
    acts = capture(model, tokenizer, TEXTS, site)
    return acts[site], acts


def fitted_cusum(model, tokenizer, site=SITE, size=8.0):
    """A map that opens within the first text, where the evidence leaps, and mostly stays open."""
    rows, acts = rows_at(model, tokenizer, site)
    draw = torch.Generator().manual_seed(1)
    rows = rows.float()
    direction = torch.randn(rows.shape[1], generator=draw) / rows.norm(dim=1).median()
    first = rows[(acts.text_index == 0) & (acts.position > 0)]
    drift = float((first @ direction).quantile(0.3))
    levels = by_the_loop(first, direction, drift, [True] * len(first)).sort().values
    middle = levels[3:-3]
    at = int(middle.diff().argmax())
    threshold = float(middle[at : at + 2].mean())
    shift = size * torch.randn(rows.shape[1], generator=draw) * rows.std()
    return Cusum(direction, drift, threshold, shift)


class Recorded:
    """Keeps what a sequential map was given and answered."""

    def __init__(self, inner):
        self.inner, self.passes = inner, []

    def step(self, h, start, present):
        edited, evidence = self.inner.step(h, start, present)
        self.passes.append((h.clone(), start.clone(), present.clone(), evidence.clone()))
        return edited, evidence


@pytest.fixture
def cusum(model, tokenizer):
    return fitted_cusum(model, tokenizer)


# --- one pass -------------------------------------------------------------------------------------


def test_a_map_with_step_is_sequential_unless_its_evidence_is_a_tokens_own(llama, tokenizer):
    fitted = fitted_cusum(llama, tokenizer)
    assert is_sequential(fitted)
    assert isinstance(fitted, SequentialSiteMap)
    assert not isinstance(fitted, SiteMap)
    assert not is_sequential(torch.relu)

    class Both(Recorded):
        evidence = "token"

        def __call__(self, h):
            return h + 1

    both = Both(fitted)
    assert not is_sequential(both)
    with intervene(llama, {SITE: both}):
        logits(llama, ids_of(tokenizer))
    assert both.passes == []
    both.evidence = "sequence"
    with intervene(llama, {SITE: both}):
        logits(llama, ids_of(tokenizer))
    assert len(both.passes) == 1


def test_rows_are_edited_from_where_the_evidence_suffices(model, tokenizer, cusum):
    """Independent: Page's recursion by a loop over the rows that the unedited model has."""
    before, acts = rows_at(model, tokenizer)
    with intervene(model, {SITE: cusum}):
        after, _ = rows_at(model, tokenizer)
    changed = 0
    for text in range(len(TEXTS)):
        at = acts.text_index == text
        counts = acts.position[at] > 0
        open_ = by_the_loop(before[at], cusum.direction, cusum.drift, counts) >= cusum.threshold
        expected = before[at] + (open_ & counts)[:, None] * cusum.shift
        torch.testing.assert_close(after[at], expected, rtol=1e-4, atol=1e-4)
        closed = ~(open_ & counts)
        assert torch.equal(after[at][closed], before[at][closed])
        changed += int((open_ & counts).sum())
    assert 0 < changed < int((acts.position > 0).sum())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_first_tokens_do_not_count_and_stay(model, tokenizer, side):
    ids, mask = padded(tokenizer, TEXTS[:3])
    if side == "right":
        ids, mask = ids.clone(), mask.clone()
        for r, n in enumerate(mask.sum(1)):
            ids[r], mask[r] = ids[r].roll(int(n)), mask[r].flip(0)
    seen = Recorded(Cusum(torch.zeros(WIDTH), -1.0, 0.5, torch.ones(WIDTH)))
    with intervene(model, {SITE: seen}):
        logits(model, ids, attention_mask=mask)
    (_, start, present, evidence) = seen.passes[0]
    assert torch.equal(start, torch.zeros(3))
    expected = mask.bool() & (mask.cumsum(1) > 1)
    assert torch.equal(present, expected)
    torch.testing.assert_close(evidence, expected.cumsum(1).float())


@pytest.mark.parametrize("kind", ["none", "bool", "additive", "by kind of layer"])
def test_every_kind_of_mask_says_the_same(llama, kind, tokenizer):
    ids, mask = padded(tokenizer, TEXTS[:3])
    if kind == "none":
        ids, mask = ids[2:], mask[2:]
    allowed = torch.ones(ids.shape[1], ids.shape[1]).tril().bool() & mask[:, None, None].bool()
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    by_kind = {"sliding_attention": None, "full_attention": additive}
    given = {"none": None, "bool": allowed, "additive": additive, "by kind of layer": by_kind}
    seen = Recorded(Cusum(torch.zeros(WIDTH), -1.0, 0.5, torch.ones(WIDTH)))
    probe = nn.ModuleDict({"block": nn.Identity()})
    probe.forward = lambda x, attention_mask=None: probe["block"](x)
    with intervene(probe, {"block": seen}):
        probe(torch.zeros(*ids.shape, WIDTH), attention_mask=given[kind])
    assert torch.equal(seen.passes[0][2], mask.bool() & (mask.cumsum(1) > 1))


def test_a_closed_gate_leaves_the_logits_to_the_bit(model, tokenizer, cusum):
    ids = ids_of(tokenizer)
    before, said = logits(model, ids), generated(model, ids)
    closed = Cusum(cusum.direction, cusum.drift, 1e9, cusum.shift)
    with intervene(model, {SITE: closed, "embed": closed}):
        assert torch.equal(logits(model, ids), before)
        assert torch.equal(generated(model, ids), said)


def test_tokens_choose_among_the_rows_and_all_rows_count(llama, tokenizer):
    ids = ids_of(tokenizer)
    fitted = fitted_cusum(llama, tokenizer)
    whole = Recorded(fitted)
    with intervene(llama, {SITE: whole}):
        logits(llama, ids)
    last = Recorded(fitted)
    with intervene(llama, {SITE: last}, tokens="last"):
        after = capture(llama, tokenizer, TEXTS[:1], SITE)[SITE]
    assert torch.equal(last.passes[0][3], whole.passes[0][3])
    before = capture(llama, tokenizer, TEXTS[:1], SITE)[SITE]
    assert (after[:-1] == before[:-1]).all()
    assert bool(whole.passes[0][3][0, -1] >= fitted.threshold) == (after[-1] != before[-1]).any()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_and_the_evidence_is_wider(name, dtype, tokenizer):
    model = build_model(name, dtype=dtype)
    seen = Recorded(fitted_cusum(model, tokenizer))
    with intervene(model, {SITE: seen}):
        out, acts = logits(model, ids_of(tokenizer)), capture(model, tokenizer, TEXTS[:1], SITE)
        generated(model, ids_of(tokenizer), max_new_tokens=3)
    assert out.dtype == acts[SITE].dtype == dtype
    assert {evidence.dtype for *_, evidence in seen.passes} == {torch.float32}
    assert torch.isfinite(out).all()


def test_a_map_that_answers_wider_rows_does_not_widen_the_model(tokenizer):
    class Wide(Cusum):
        def step(self, h, start, present):
            edited, evidence = super().step(h, start, present)
            return edited.float(), evidence

    model = build_model("llama", dtype=torch.bfloat16)
    fitted = fitted_cusum(model, tokenizer)
    wide = Wide(*(getattr(fitted, f) for f in ("direction", "drift", "threshold", "shift")))
    ids = ids_of(tokenizer)
    with intervene(model, {SITE: fitted}):
        expected = logits(model, ids)
    with intervene(model, {SITE: wide}):
        assert torch.equal(logits(model, ids), expected)


# --- generation: the same with and without a cache ------------------------------------------------


def test_greedy_generation_is_the_same_with_and_without_a_cache(model, tokenizer, cusum):
    ids = ids_of(tokenizer)
    free = generated(model, ids)
    with intervene(model, {SITE: cusum}):
        cached, full = (generated(model, ids, use_cache=use) for use in (True, False))
    assert torch.equal(cached, full)
    assert not torch.equal(cached, free)


def test_the_evidence_of_the_prompt_is_carried_to_the_answer(model, tokenizer, cusum):
    """Every pass begins with the evidence that the one before ended with, as one long pass has."""
    ids = ids_of(tokenizer)
    seen, n = Recorded(cusum), ids.shape[1]
    with intervene(model, {SITE: seen}):
        new = generated(model, ids, max_new_tokens=6)
    carried = torch.cat([evidence for *_, evidence in seen.passes], dim=1)
    whole = Recorded(cusum)
    with intervene(model, {SITE: whole}):
        logits(model, torch.cat([ids, new[:, :-1]], dim=1))
    torch.testing.assert_close(carried, whole.passes[0][3], rtol=1e-4, atol=1e-4)
    assert [h.shape[1] for h, *_ in seen.passes] == [n, 1, 1, 1, 1, 1]
    assert float(seen.passes[1][1]) == float(seen.passes[0][3][0, -1])
    assert float(seen.passes[1][1]) > 0


def test_a_left_padded_batch_generates_what_single_texts_do(model, tokenizer, cusum):
    texts = [TEXTS[0], TEXTS[1], TEXTS[4]]
    ids, mask = padded(tokenizer, texts)
    with intervene(model, {SITE: cusum}):
        for use in (True, False):
            together = generated(model, ids, mask, use_cache=use)
            for row, text in zip(together, texts, strict=True):
                assert torch.equal(row, generated(model, ids_of(tokenizer, text))[0])


@pytest.mark.parametrize("beams", [2, 4])
def test_beams_are_the_same_with_and_without_a_cache(model, tokenizer, cusum, beams):
    ids, mask = padded(tokenizer, [TEXTS[0], TEXTS[4]])
    with intervene(model, {SITE: cusum}):
        cached, full = (
            generated(model, ids, mask, num_beams=beams, num_return_sequences=2, use_cache=use)
            for use in (True, False)
        )
    assert torch.equal(cached, full)


def test_reordered_beams_take_their_evidence_along(llama, tokenizer):
    """It fails where the trace keeps the order that the rows had before."""
    fitted = fitted_cusum(llama, tokenizer)
    ids, other = ids_of(tokenizer), ids_of(tokenizer, TEXTS[4])
    width = min(ids.shape[1], other.shape[1])
    both, order = torch.cat([ids[:, :width], other[:, :width]]), torch.tensor([1, 1])
    seen = Recorded(fitted)
    with intervene(llama, {SITE: seen}):
        cache = llama(both, use_cache=True).past_key_values
        cache.reorder_cache(order)
        llama(both[:, :1], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        llama(both[:, :1].repeat(2, 1), past_key_values=cache)
        cache.batch_select_indices(torch.tensor([3, 0, 1]))
        llama(both[:1, :1].repeat(3, 1), past_key_values=cache)
    last = [evidence[:, -1] for *_, evidence in seen.passes]
    starts = [start for _, start, _, _ in seen.passes]
    assert last[0][0] != last[0][1]
    assert torch.equal(starts[1], last[0][order])
    assert torch.equal(starts[2], last[1].repeat_interleave(2))
    assert torch.equal(starts[3], last[2][[3, 0, 1]])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_assisted_generation_says_what_greedy_does(name, tokenizer):
    """Tokens that were drafted and rejected are cropped from the cache, and count no more."""
    model, draft = build_model(name), build_model(name, seed=3)
    fitted = fitted_cusum(model, tokenizer)
    ids = ids_of(tokenizer)
    with intervene(model, {SITE: fitted}):
        greedy = generated(model, ids, use_cache=False)
        by_draft = generated(model, ids, assistant_model=draft)
        by_lookup = generated(model, ids, prompt_lookup_num_tokens=3)
    assert torch.equal(by_draft, greedy)
    assert torch.equal(by_lookup, greedy)


def test_a_prompt_read_in_pieces_is_read_as_one(model, tokenizer, cusum):
    ids = ids_of(tokenizer)
    with intervene(model, {SITE: cusum}):
        whole = logits(model, ids)
        cache = DynamicCache(config=model.config)
        parts = [logits(model, part, past_key_values=cache) for part in ids.split(5, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("site", ["layers.1", "layers.2"])
def test_rows_captured_in_chunks_are_those_of_one_pass(model, tokenizer, cusum, site):
    """Capture stops behind its deepest site, where the decoder never comes to its end."""
    with intervene(model, {SITE: cusum}), warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = capture(model, tokenizer, TEXTS, site)[site]
        parts = capture(model, tokenizer, TEXTS, site, chunk_size=4)[site]
    plain = capture(model, tokenizer, TEXTS, site)[site]
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-3)
    assert float((whole - plain).abs().max()) > 0.1


def test_a_copied_cache_continues_by_itself(llama, tokenizer):
    """One prompt, several continuations, as when a system prompt is read once."""
    fitted, ids = fitted_cusum(llama, tokenizer), ids_of(tokenizer)
    with intervene(llama, {SITE: fitted}), torch.no_grad():
        whole = logits(llama, ids)
        cache = llama(ids[:, :6], use_cache=True).past_key_values
        for _ in range(2):
            rest = llama(ids[:, 6:], past_key_values=copy.deepcopy(cache)).logits
            torch.testing.assert_close(rest, whole[:, 6:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gpt_neox"])
def test_a_cache_of_fixed_size_generates_the_same(name, tokenizer):
    model = build_model(name)
    fitted = fitted_cusum(model, tokenizer)
    ids, mask = padded(tokenizer, [TEXTS[0], TEXTS[1], TEXTS[4]])
    with intervene(model, {SITE: fitted}):
        full = generated(model, ids, mask, use_cache=False)
        fixed = generated(model, ids, mask, cache_implementation="static")
        again = generated(model, ids, mask, cache_implementation="static")
    assert torch.equal(fixed, full)
    assert torch.equal(again, full)


def test_a_fixed_cache_that_is_reset_begins_anew(llama, tokenizer):
    """Its length is a tensor, which it counts up in place while the pass runs."""
    ids = ids_of(tokenizer)
    seen = Recorded(fitted_cusum(llama, tokenizer))
    cache = StaticCache(config=llama.config, max_cache_len=32)
    with intervene(llama, {SITE: seen}), torch.no_grad():
        for _ in range(2):
            for part in ids.split(6, dim=1):
                llama(part, past_key_values=cache)
            cache.reset()
    n = len(seen.passes) // 2
    for (_, *first), (_, *second) in zip(seen.passes[:n], seen.passes[n:], strict=True):
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b)
    assert float(seen.passes[1][1]) == float(seen.passes[0][3][0, -1]) > 0
    assert float(seen.passes[n][1]) == 0


def test_two_maps_and_nested_blocks_keep_their_own_evidence(model, tokenizer):
    ids = ids_of(tokenizer)
    free = generated(model, ids)
    outer = fitted_cusum(model, tokenizer, "layers.0", size=1.0)
    with intervene(model, {"layers.0": outer}):
        inner = fitted_cusum(model, tokenizer, "layers.0")
        attn = fitted_cusum(model, tokenizer, "layers.2.attn")
        with intervene(model, {"layers.0": inner, "layers.2.attn": attn}):
            cached, full = (generated(model, ids, use_cache=use) for use in (True, False))
        alone = [generated(model, ids, use_cache=use) for use in (True, False)]
    assert torch.equal(cached, full)
    assert torch.equal(*alone)
    assert not torch.equal(cached, free)


def test_evidence_of_several_numbers_a_row(llama, tokenizer):
    """As a composition of maps has, one of each."""

    class Two(Recorded):
        evidence_shape = (2,)

        def step(self, h, start, present):
            parts = [self.inner[i].step(h, start[..., i], present) for i in (0, 1)]
            return parts[0][0], torch.stack([part[1] for part in parts], dim=-1)

    ids, one = ids_of(tokenizer), fitted_cusum(llama, tokenizer)
    reverse = Cusum(-one.direction, -one.drift, 1e9, one.shift)
    with intervene(llama, {SITE: one}):
        alone = [generated(llama, ids, num_beams=beams) for beams in (1, 3)]
    with intervene(llama, {SITE: Two((one, reverse))}):
        assert torch.equal(generated(llama, ids), alone[0])
        assert torch.equal(generated(llama, ids, num_beams=3), alone[1])


# --- compiled -------------------------------------------------------------------------------------


@pytest.fixture
def eager_compiler():
    torch._dynamo.reset()
    yield lambda model: torch.compile(model, backend="eager", fullgraph=True)
    torch._dynamo.reset()


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "gemma3", "qwen3")]


@pytest.mark.parametrize("name", ["llama", *SLOW])
def test_an_edited_model_compiles_without_a_break(name, tokenizer, eager_compiler):
    model = build_model(name)
    fitted = fitted_cusum(model, tokenizer)
    ids, mask = padded(tokenizer, [TEXTS[0], TEXTS[1], TEXTS[4]])
    free = logits(model, ids, attention_mask=mask, use_cache=False)
    with intervene(model, {SITE: fitted}):
        plain = logits(model, ids, attention_mask=mask, use_cache=False)
        compiled = eager_compiler(model)
        with torch.no_grad():
            out = compiled(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(out, plain)
    assert (plain - free).abs().max() > 1e-2


@pytest.mark.parametrize("in_place", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_model_compiled_before_is_edited_too(llama, tokenizer, in_place):
    """Traced code does not look for hooks that were not there: without care nothing is edited."""
    torch._dynamo.reset()
    ids, fitted = ids_of(tokenizer), fitted_cusum(llama, tokenizer)
    with intervene(llama, {SITE: fitted}):
        expected = logits(llama, ids, use_cache=False)
    free = logits(llama, ids, use_cache=False)
    if in_place:
        llama.compile(backend="eager")
    compiled = llama if in_place else torch.compile(llama, backend="eager")
    torch.testing.assert_close(logits(compiled, ids, use_cache=False), free)
    with intervene(compiled, {SITE: fitted}):
        torch.testing.assert_close(logits(compiled, ids, use_cache=False), expected)
    torch.testing.assert_close(logits(compiled, ids, use_cache=False), free)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_compiled_model_decodes_with_a_cache_as_the_plain_one(
    llama, tokenizer, kind, eager_compiler
):
    fitted, ids = fitted_cusum(llama, tokenizer), ids_of(tokenizer)
    options = {"max_cache_len": 32} if kind is StaticCache else {}
    outs = []
    with intervene(llama, {SITE: fitted}), torch.no_grad():
        for run in (llama, eager_compiler(llama)):
            cache = kind(config=llama.config, **options)
            parts = ids[:, :12].split([8, 1, 1, 2], dim=1)
            outs.append(torch.cat([run(p, past_key_values=cache).logits for p in parts], dim=1))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


# --- nothing is left, and what is refused ---------------------------------------------------------


def test_nothing_is_left_in_model_and_cache(model, tokenizer, cusum):
    ids, weights = ids_of(tokenizer), state(model)
    before = logits(model, ids)
    with intervene(model, {SITE: cusum}), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        assert isinstance(cache.layers[-1], EvidenceTrace)
        with intervene(model, {SITE: cusum}), pytest.warns(UserWarning, match="passed before"):
            model(ids[:, :1], past_key_values=cache)
            assert len(cache.layers[-1].evidence) == 2
        assert len(cache.layers[-1].evidence) == 1
    assert len(cache.layers) == 3
    assert hooks(model) == 0
    assert same_state(model, weights)
    assert torch.equal(logits(model, ids), before)


def test_nothing_is_left_after_an_exception_of_a_step(llama, tokenizer):
    class Broken:
        def step(self, h, start, present):
            raise RuntimeError("broken step")

    ids, before = ids_of(tokenizer), logits(llama, ids_of(tokenizer))
    with (
        pytest.raises(RuntimeError, match="broken step"),
        intervene(llama, {SITE: fitted_cusum(llama, tokenizer), "layers.2": Broken()}),
    ):
        generated(llama, ids)
    assert hooks(llama) == 0
    assert torch.equal(logits(llama, ids), before)


def test_after_a_failed_pass_the_next_begins_anew(llama, tokenizer):
    fitted, ids = fitted_cusum(llama, tokenizer), ids_of(tokenizer)
    with intervene(llama, {SITE: fitted}):
        expected = logits(llama, ids)
        handle = llama.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError, match="division by zero"):
            logits(llama, ids)
        handle.remove()
        assert torch.equal(logits(llama, ids), expected)


def test_a_cache_filled_outside_warns_and_counts_as_nothing(llama, tokenizer):
    seen, ids = Recorded(fitted_cusum(llama, tokenizer)), ids_of(tokenizer)
    cache = llama(ids, use_cache=True).past_key_values
    with intervene(llama, {SITE: seen}), torch.no_grad():
        with pytest.warns(UserWarning, match="holds 14 tokens that passed before this intervene"):
            llama(ids[:, :2], past_key_values=cache)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            llama(ids[:, :1], past_key_values=cache)
    assert float(seen.passes[0][1]) == 0
    assert seen.passes[0][2].all()
    assert torch.equal(seen.passes[1][1], seen.passes[0][3][:, -1])


def test_a_cache_of_another_batch_is_refused(llama, tokenizer):
    ids = ids_of(tokenizer)
    fitted = fitted_cusum(llama, tokenizer, "embed")
    with intervene(llama, {"embed": fitted}), torch.no_grad():
        cache = llama(ids, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="evidence of 1 sequences; the pass has 2"):
            llama(ids[:, :1].repeat(2, 1), past_key_values=cache)


def test_a_cache_without_layers_is_refused(llama, tokenizer):
    class Odd(nn.Identity):
        def get_seq_length(self):
            return 0

    probe = nn.ModuleDict({"block": nn.Identity()})
    probe.forward = lambda x, past_key_values=None: probe["block"](x)
    with (
        pytest.raises(ValueError, match="the cache is a Odd without a list of layers"),
        intervene(probe, {"block": fitted_cusum(llama, tokenizer)}),
    ):
        probe(torch.zeros(1, 2, WIDTH), past_key_values=Odd())


def test_a_site_outside_the_decoder_is_refused_and_no_hook_is_left(llama, tokenizer):
    with pytest.raises(ValueError, match="'lm_head' lies outside the decoder"):
        intervene(llama, {"lm_head": fitted_cusum(llama, tokenizer)}).__enter__()
    assert hooks(llama) == 0


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda h, e: (h[..., :1], e), r"answered .1, 14, 1. to .1, 14, 32."),
        (lambda h, e: (h, e[:, :1]), r"answered evidence of shape .1, 1.; expected .1, 14."),
    ],
)
def test_answers_of_another_shape_are_refused(llama, tokenizer, answer, words):
    class Wrong(Recorded):
        def step(self, h, start, present):
            return answer(*self.inner.step(h, start, present))

    with (
        pytest.raises(ValueError, match=words),
        intervene(llama, {SITE: Wrong(fitted_cusum(llama, tokenizer))}),
    ):
        logits(llama, ids_of(tokenizer))


def test_rows_without_a_sequence_are_refused(llama, tokenizer):
    probe = nn.Sequential(nn.Identity())
    with (
        pytest.raises(ValueError, match=r"carries rows .4, 32.; evidence over a sequence needs"),
        intervene(probe, {"0": fitted_cusum(llama, tokenizer)}),
    ):
        probe(torch.zeros(4, WIDTH))


def test_a_mask_of_an_unknown_kind_is_refused(llama, tokenizer):
    probe = nn.ModuleDict({"block": nn.Identity()})
    probe.forward = lambda x, attention_mask=None: probe["block"](x)
    with (
        pytest.raises(ValueError, match=r"attention_mask is .*.1, 2, 2.*needs one of shape"),
        intervene(probe, {"block": fitted_cusum(llama, tokenizer)}),
    ):
        probe(torch.zeros(1, 2, WIDTH), attention_mask=torch.ones(1, 2, 2))


def test_texts_packed_into_one_row_are_refused(llama, tokenizer):
    """As continuous batching passes them."""
    probe = nn.ModuleDict({"block": nn.Identity()})
    probe.forward = lambda x, cu_seq_lens_q=None: probe["block"](x)
    with (
        pytest.raises(ValueError, match="several texts packed into one row"),
        intervene(probe, {"block": fitted_cusum(llama, tokenizer)}),
    ):
        probe(torch.zeros(1, 6, WIDTH), cu_seq_lens_q=torch.tensor([0, 2, 6]))


def test_a_map_fitted_for_another_width_is_refused(llama, tokenizer):
    fitted = Recorded(fitted_cusum(llama, tokenizer))
    fitted.n_features_in_ = 16
    with (
        pytest.raises(ValueError, match="was fitted for width 16; the site has width 32"),
        intervene(llama, {SITE: fitted}),
    ):
        logits(llama, ids_of(tokenizer))


def test_the_trace_passes_for_a_layer_of_its_cache(llama, tokenizer):
    ids = ids_of(tokenizer)
    with intervene(llama, {SITE: fitted_cusum(llama, tokenizer)}), torch.no_grad():
        cache = llama(ids, use_cache=True).past_key_values
        trace = cache.layers[-1]
        assert trace.get_seq_length() == cache.get_seq_length() == ids.shape[1]
        assert cache.get_max_length() == trace.get_max_length() == -1
        assert cache.is_croppable
        assert cache.is_sliding == [False] * 4
        cache.crop(-3)
        cache.reset()
        assert trace.get_seq_length() == cache.get_seq_length() == 0
    assert resolve_site(llama, SITE).module._forward_hooks == {}
