import numpy as np
import pytest
import torch

from manifold_unlearn.activations.capture import capture
from manifold_unlearn.activations.tokens import TokenTable
from manifold_unlearn.dictionary import Crosscoder, SparseAutoencoder, SparseCode
from manifold_unlearn.dictionary.contexts import ContextFinder, find_contexts
from manifold_unlearn.dictionary.corpus import corpus_codes, stream_codes, token_strings

TEXTS = [
    "The river runs down to the sea in spring, and the sea is cold.",
    "A mill by the river grinds corn; corn is what the village eats.",
    "Nobody knows who built the bridge over the river.",
    "In winter the bridge is closed.",
    "Sea, sea, sea: the sailors sing of nothing else!",
    "The village has a bridge, a mill, and 3 wells.",
    "Cold wells are deep wells.",
]
OPTIONS = {"n_top": 3, "n_sampled": 8, "before": 3, "after": 2, "n_bins": 8}


@pytest.fixture
def narrow(llama):
    """The dictionary, as wide as the model."""
    width = llama.config.hidden_size
    made = SparseAutoencoder(width, 96, {"name": "relu"}, random_state=0)
    with torch.no_grad():
        made.b_enc.fill_(-1.5)
        made.b_enc[90:] = -1e3  # silent
    made.origin = {"site": "layers.1"}
    return made


def brute_force(model, tokenizer, coder):
    """All activations at once, dense."""
    acts = capture(model, tokenizer, TEXTS, "layers.1")
    with torch.no_grad():
        dense = coder.encode(acts["layers.1"]).double().numpy()
    table = acts.tokens
    return (
        dense,
        table.text_index.numpy(),
        table.position.numpy(),
        table.token_id.numpy(),
        ((table.position > 0) & ~table.special).numpy(),
    )


@pytest.mark.parametrize("token_budget", [1, 20, 16384])
@pytest.mark.parametrize("one_a_text", [True, False])
def test_streamed_contexts_are_those_of_the_dense_matrix(
    llama, tokenizer, narrow, token_budget, one_a_text
):
    found = find_contexts(
        llama,
        tokenizer,
        TEXTS,
        narrow,
        one_a_text=one_a_text,
        token_budget=token_budget,
        **OPTIONS,
    )
    dense, text, position, ids, counted = brute_force(llama, tokenizer, narrow)
    assert found.n_tokens == counted.sum()
    assert found.n_left_out == len(TEXTS)
    np.testing.assert_array_equal(found.count, (dense[counted] != 0).sum(0))
    np.testing.assert_allclose(found.act_max, dense[counted].max(0), rtol=1e-5)
    several = 0
    for latent in range(96):
        rows = np.flatnonzero(counted & (dense[:, latent] > 0))
        rows = rows[np.argsort(-dense[rows, latent], kind="stable")]
        if one_a_text:
            rows = rows[np.sort(np.unique(text[rows], return_index=True)[1])]
        contexts = found.strongest(latent)
        assert [(c.text, c.position) for c in contexts] == [
            (text[r], position[r]) for r in rows[:3]
        ]
        several += len(contexts) == 3
        for context, row in zip(contexts, rows, strict=False):
            near = np.arange(max(row - 3, 0), min(row + 3, len(ids)))
            near = near[text[near] == text[row]]
            assert context.tokens == tuple(tokenizer.decode([i]) for i in ids[near])
            np.testing.assert_allclose(context.values, dense[near, latent], atol=1e-4, rtol=1e-4)
            assert near[context.at] == row
            assert context.value == pytest.approx(dense[row, latent], rel=1e-4)
    assert several > 20  # else the test would say little


def test_histograms_double_their_range_and_lose_nothing(llama, tokenizer, narrow):
    found = find_contexts(llama, tokenizer, TEXTS, narrow, token_budget=1, **OPTIONS)
    dense, _, _, _, counted = brute_force(llama, tokenizer, narrow)
    fires = found.count > 0
    assert fires.tolist() == [True] * 90 + [False] * 6
    assert (found.upper[~fires] == 0).all()
    assert ((found.upper / 2 <= found.act_max) & (found.act_max < found.upper))[fires].all()
    for latent in np.flatnonzero(fires):
        values = dense[counted, latent]
        edges = np.linspace(0, found.upper[latent], 9)
        expected = np.histogram(values[values > 0], edges)[0]
        assert np.abs(expected - found.histogram[latent]).sum() <= 2  # rounding at an edge
        assert found.histogram[latent].sum() == found.count[latent]


def planted(n_texts=60, length=20, m=4, seed=0):
    random = np.random.default_rng(seed)
    n = n_texts * length
    tokens = TokenTable(
        text_index=torch.arange(n) // length,
        position=torch.arange(n) % length,
        token_id=torch.from_numpy(random.integers(3, 90, n)),
        special=torch.zeros(n, dtype=torch.bool),
        answer=torch.zeros(n, dtype=torch.bool),
        sink=torch.zeros(n, dtype=torch.bool),
    )
    values = random.exponential(size=(n, m)) * (random.uniform(size=(n, m)) < 0.3)
    return tokens, values


def part_of(tokens, kept):
    return TokenTable(**{name: value[kept] for name, value in vars(tokens).items()})


def test_the_sample_is_drawn_alike_from_all_that_fires_whatever_the_blocks(tokenizer):
    tokens, values = planted()
    found = []
    for cuts in ([0, 1200], [0, 20, 600, 640, 1200]):
        finder = ContextFinder(range(4), n_sampled=100, n_top=2, random_state=3)
        for low, high in zip(cuts, cuts[1:], strict=False):
            inside = (torch.arange(1200) >= low) & (torch.arange(1200) < high)
            finder.add(SparseCode.of(torch.from_numpy(values[low:high])), part_of(tokens, inside))
        found.append(finder.result(tokenizer))
    np.testing.assert_array_equal(found[0].sampled.text, found[1].sampled.text)
    np.testing.assert_array_equal(found[0].sampled.window_id, found[1].sampled.window_id)
    sampled = found[0].sampled
    entry = sampled.text * 20 + sampled.position
    for latent in range(4):
        assert len(np.unique(entry[latent])) == 100
        np.testing.assert_allclose(sampled.value[latent], values[entry[latent], latent], rtol=1e-6)
        mean = values[:, latent][values[:, latent] > 0].mean()
        assert sampled.value[latent].mean() == pytest.approx(mean, abs=0.35)  # 3.5 deviations
    assert abs(sampled.text.mean() - 29.5) < 3
    other = ContextFinder(range(4), n_sampled=100, n_top=2, random_state=4)
    other.add(SparseCode.of(torch.from_numpy(values)), tokens)
    assert (other.result(tokenizer).sampled.text != sampled.text).any()


def test_quantiles_run_from_strong_to_weak(tokenizer):
    tokens, values = planted()
    finder = ContextFinder(range(4), n_sampled=40, n_top=2)
    finder.add(SparseCode.of(torch.from_numpy(-values)), tokens)  # strength counts, signs are kept
    found = finder.result(tokenizer)
    parts = found.by_quantile(2, n_quantiles=5, n=3)
    assert len(parts) == 5
    bounds = [edge for low, high, _ in parts for edge in (high, low)]
    assert bounds == sorted(bounds, reverse=True)
    for low, high, contexts in parts:
        assert len(contexts) == 3
        assert all(low <= -c.value <= high for c in contexts)
    assert found.act_max == pytest.approx(values.max(0), rel=1e-6)
    assert found.strongest(2)[0].value == pytest.approx(-values[:, 2].max(), rel=1e-6)


def test_chosen_latents_keep_their_numbers(llama, tokenizer, narrow):
    whole = find_contexts(llama, tokenizer, TEXTS, narrow, **OPTIONS)
    some = find_contexts(llama, tokenizer, TEXTS, narrow, latents=[40, 7], **OPTIONS)
    assert some.latents.tolist() == [40, 7]
    for latent in (40, 7):
        assert some.strongest(latent) == whole.strongest(latent)
        assert some.by_quantile(latent) == whole.by_quantile(latent)
    with pytest.raises(ValueError, match="latent 3 was not looked for"):
        some.strongest(3)


def test_codes_of_a_corpus_are_those_of_its_rows(llama, tokenizer, narrow):
    acts = capture(llama, tokenizer, TEXTS, ["layers.0", "layers.1"])
    found = corpus_codes(llama, tokenizer, TEXTS, narrow, token_budget=10)
    torch.testing.assert_close(
        found.code.dense(), narrow.encode(acts["layers.1"]), atol=1e-4, rtol=1e-4
    )
    assert found.tokens.text_index.tolist() == acts.text_index.tolist()
    assert found.counted.tolist() == (acts.position > 0).tolist()
    cross = Crosscoder(2, narrow.d_in, 32, {"name": "topk", "k": 4}, random_state=0)
    both = torch.stack([acts["layers.0"], acts["layers.1"]], 1)
    (part,) = stream_codes(llama, tokenizer, TEXTS, cross, ["layers.0", "layers.1"])
    torch.testing.assert_close(part.code.dense(), cross.encode(both), atol=1e-4, rtol=1e-4)


def test_token_strings_keep_the_space(tokenizer):
    ids = tokenizer(" the sea")["input_ids"]
    strings = token_strings(tokenizer, [*ids, -1])
    assert "".join(strings[i] for i in ids[1:]) == " the sea"
    assert -1 not in strings


def test_contexts_reject(llama, tokenizer, narrow):
    with pytest.raises(ValueError, match="n_bins=7"):
        ContextFinder([0], n_bins=7)
    with pytest.raises(ValueError, match="latent 400 is not among the 96"):
        find_contexts(llama, tokenizer, TEXTS, narrow, latents=[400])
    with pytest.raises(ValueError, match="token_budget=0"):
        find_contexts(llama, tokenizer, TEXTS, narrow, token_budget=0)
    with pytest.raises(ValueError, match="texts is empty"):
        find_contexts(llama, tokenizer, [], narrow)
    narrow.origin = {}
    with pytest.raises(ValueError, match="names no site"):
        find_contexts(llama, tokenizer, TEXTS, narrow)
    with pytest.raises(ValueError, match="no token counts"):
        ContextFinder([0]).result(tokenizer)
    tokens, values = planted()
    with pytest.raises(ValueError, match="1200 rows of 4 latents; expected 1200 tokens and 1"):
        ContextFinder([0]).add(SparseCode.of(torch.from_numpy(values)), tokens)
    with pytest.raises(ValueError, match="n_quantiles=0"):
        finder = ContextFinder(range(4))
        finder.add(SparseCode.of(torch.from_numpy(values)), tokens)
        finder.result(tokenizer).by_quantile(0, n_quantiles=0)
