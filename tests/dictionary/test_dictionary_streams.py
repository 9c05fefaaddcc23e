"""Batches: every row once an epoch, the same again from any place, from memory, disk or models."""

from itertools import islice

import pytest
import torch
from cases import build_model

from manifold_unlearn.activations.capture import capture
from manifold_unlearn.dictionary import (
    RowStream,
    stream_activations,
    stream_paired,
    stream_rows,
    stream_saved,
)

WORDS = ["cat", "dog", "mat", "hat", "bat", "rat", "log", "fog"]
TEXTS = [f"the {word} sat on the {word}" for word in WORDS]


def ids(batches):
    return [batch["ids"][:, 0].tolist() for batch in batches]


@pytest.fixture
def blocks():
    """Five blocks of 7 rows that say which row of which block they are."""
    return RowStream(
        lambda _epoch, block: {"ids": torch.arange(7)[:, None] + 10 * block}, 5, 2, random_state=3
    )


def test_an_epoch_has_every_row_once_but_for_the_rest_of_a_block(blocks):
    seen = sum(ids(blocks), [])
    assert len(seen) == len(set(seen)) == 30
    assert ids(blocks) == ids(blocks)


def test_a_block_smaller_than_a_batch_is_kept():
    stream = stream_rows(torch.ones(3, 2), batch_size=8)
    assert [len(batch[""]) for batch in stream] == [3]


def test_epochs_differ_and_any_place_goes_on_alike(blocks):
    whole = list(islice(blocks.walk(), 45))
    assert ids(b for _, b in whole[:15]) != ids(b for _, b in whole[15:30])
    for k in (0, 1, 2, 14, 15, 29):
        again = list(islice(blocks.walk(whole[k][0]), 10))
        assert [p for p, _ in again] == [p for p, _ in whole[k + 1 : k + 11]]
        assert ids(b for _, b in again) == ids(b for _, b in whole[k + 1 : k + 11])


def test_another_random_state_gives_another_order(blocks):
    other = RowStream(blocks.read, 5, 2, random_state=4)
    assert ids(other) != ids(blocks)


@pytest.mark.parametrize("n_blocks", [5, 1])
def test_processes_share_an_epoch(blocks, n_blocks):
    stream = RowStream(blocks.read, n_blocks, 2, random_state=0)
    each = [
        sum(ids(b for p, b in islice(stream.walk(rank=r, world=2), 12) if p.epoch == 0), [])
        for r in (0, 1)
    ]
    assert each[0] and each[1] and not set(each[0]) & set(each[1])


def test_too_few_rows_for_the_processes_is_an_error():
    stream = stream_rows(torch.ones(4, 2), batch_size=4)
    with pytest.raises(ValueError, match="no batch for process 1 of 2"):
        next(stream.walk(rank=1, world=2))


def test_arrays_stay_aligned():
    x = torch.arange(20.0)[:, None]
    stream = stream_rows({"a": x, "b": (x * 2, x * 3)}, batch_size=4)
    for batch in stream:
        assert torch.equal(batch["a"] * 2, batch["b"][0])
        assert torch.equal(batch["a"] * 3, batch["b"][1])


@pytest.mark.parametrize("rows", [{"a": torch.ones(3, 2), "b": torch.ones(4, 2)}, torch.ones(0, 2)])
def test_lengths_that_differ_are_an_error(rows):
    with pytest.raises(ValueError, match="all need one length above 0"):
        stream_rows(rows)


def test_batch_size_must_be_positive():
    with pytest.raises(ValueError, match="batch_size=0"):
        stream_rows(torch.ones(3, 2), batch_size=0)


def as_set(rows):
    return sorted(map(tuple, rows.flatten(1).tolist()))


def test_a_model_is_streamed_as_it_is_captured(llama, tokenizer):
    sites = {
        "sae": "layers.0",
        "transcoder": ("layers.1.mlp.input", "layers.1.mlp"),
        "crosscoder": ["layers.0", "layers.2"],
        "clt": (["layers.0", "layers.1"], ["layers.0.mlp", "layers.1.mlp"]),
    }
    stream = stream_activations(
        llama, tokenizer, TEXTS, sites, batch_size=1, block_tokens=40, keep_sinks=True
    )
    assert stream.n_blocks > 2
    batches = list(stream)
    names = ["layers.0", "layers.1.mlp.input", "layers.1.mlp", "layers.2", "layers.0.mlp"]
    acts = capture(llama, tokenizer, TEXTS, [*names, "layers.1"])
    assert len(batches) == len(acts.token_id)
    for name in sites:
        assert all(name in batch for batch in batches)
    both = torch.cat([torch.cat(b["transcoder"], dim=1) for b in batches])
    expected = torch.cat([acts["layers.1.mlp.input"], acts["layers.1.mlp"]], dim=1)
    torch.testing.assert_close(
        torch.tensor(as_set(both)), torch.tensor(as_set(expected)), rtol=1e-4, atol=1e-5
    )
    first = batches[0]
    torch.testing.assert_close(first["crosscoder"][:, 0], first["sae"])
    assert first["clt"][0].shape == first["clt"][1].shape == (1, 2, 32)


def test_sites_name_themselves(llama, tokenizer):
    sites = ["layers.0", ("layers.0", "layers.1"), ["layers.0", "layers.2"]]
    batch = next(iter(stream_activations(llama, tokenizer, TEXTS, sites, batch_size=4)))
    assert list(batch) == ["layers.0", "layers.0->layers.1", "layers.0+layers.2"]


def test_all_sites_come_from_one_pass(llama, tokenizer):
    passes = []
    hook = llama.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    sites = ["layers.0", "layers.1", "layers.2", ["layers.0", "layers.1"]]
    next(iter(stream_activations(llama, tokenizer, TEXTS, sites, read_size=len(TEXTS))))
    hook.remove()
    assert len(passes) == 1


def test_dictionaries_of_one_site_share_its_rows(llama, tokenizer):
    stream = stream_activations(llama, tokenizer, TEXTS, {"a": "layers.0", "b": "layers.0"})
    rows = stream.read(0, 0)
    assert rows["a"].data_ptr() == rows["b"].data_ptr()


def test_sinks_are_left_out_and_special_tokens_on_request(llama, tokenizer):
    acts = capture(llama, tokenizer, TEXTS, ["layers.0"], sink_ratio=1.05)
    assert acts.sink.any() and not acts.sink.all() and acts.special.any()

    def n_rows(**options):
        stream = stream_activations(
            llama, tokenizer, TEXTS, "layers.0", batch_size=1, sink_ratio=1.05, **options
        )
        return len(list(stream))

    assert n_rows() == int((~acts.sink).sum())
    assert n_rows(keep_sinks=True) == len(acts.sink)
    assert n_rows(keep_special=False) == int((~acts.sink & ~acts.special).sum())
    later = acts.position > 0
    assert n_rows(keep_sinks=True, keep_first=False) == int(later.sum()) < len(later)


def test_a_stream_from_a_model_goes_on_alike(llama, tokenizer):
    def stream():
        return stream_activations(
            llama, tokenizer, TEXTS, "layers.1", batch_size=4, block_tokens=30, random_state=1
        )

    whole = list(islice(stream().walk(), 60))
    again = list(islice(stream().walk(whole[44][0]), 15))
    assert whole[44][0].epoch >= 1
    for (_, a), (_, b) in zip(whole[45:], again, strict=True):
        assert torch.equal(a["layers.1"], b["layers.1"])


def test_saved_activations_are_streamed(llama, tokenizer, tmp_path):
    for i in (0, 1):
        acts = capture(llama, tokenizer, TEXTS[i::2], ["layers.0", "layers.1"])
        acts.save(tmp_path / str(i))
    stream = stream_saved(
        [tmp_path / "0", tmp_path / "1"], ["layers.1"], batch_size=1, keep_sinks=True
    )
    rows = torch.cat([batch["layers.1"] for batch in stream])
    expected = capture(llama, tokenizer, TEXTS, ["layers.1"])["layers.1"]
    torch.testing.assert_close(
        torch.tensor(as_set(rows)), torch.tensor(as_set(expected)), rtol=1e-4, atol=1e-5
    )


def test_activations_in_memory_are_streamed_without_sinks(llama, tokenizer):
    acts = capture(llama, tokenizer, TEXTS, ["layers.0"], sink_ratio=1.05)
    rows = torch.cat([batch["layers.0"] for batch in stream_rows(acts, batch_size=1)])
    assert as_set(rows) == as_set(acts["layers.0"][~acts.sink])


def test_paired_streams_are_of_the_same_tokens(llama, tokenizer):
    other = build_model("llama", seed=1)
    stream = stream_paired(
        {"a": llama, "b": other}, tokenizer, TEXTS, ["layers.0", "layers.1"], batch_size=1,
        keep_sinks=True,
    )  # fmt: skip
    rows = torch.cat([batch["layers.1"] for batch in stream])
    each = [capture(m, tokenizer, TEXTS, ["layers.1"])["layers.1"] for m in (llama, other)]
    expected = torch.stack(each, dim=1)
    assert rows.shape == expected.shape and not torch.allclose(each[0], each[1])
    torch.testing.assert_close(
        torch.tensor(as_set(rows)), torch.tensor(as_set(expected)), rtol=1e-4, atol=1e-5
    )


class Renamed:
    """A tokenizer with another vocabulary."""

    def __init__(self, tokenizer, vocabulary):
        self._tokenizer, self._vocabulary = tokenizer, vocabulary

    def get_vocab(self):
        return self._vocabulary

    def __call__(self, *args, **kwargs):
        return self._tokenizer(*args, **kwargs)


def test_models_of_other_tokenizers_are_refused(llama, tokenizer):
    swapped = Renamed(tokenizer, {token: -i for token, i in tokenizer.get_vocab().items()})
    with pytest.raises(ValueError, match="tokenizer 1 gives other tokens"):
        stream_paired([llama, llama], [tokenizer, swapped], TEXTS, "layers.0")
    wide = Renamed(tokenizer, {**tokenizer.get_vocab(), "more": 10_000})
    with pytest.raises(ValueError, match="model 0 has 300 embeddings"):
        stream_paired([llama, llama], wide, TEXTS, "layers.0")
    with pytest.raises(ValueError, match="1 model given"):
        stream_paired([llama], tokenizer, TEXTS, "layers.0")


def test_streams_of_other_widths_are_refused(llama, tokenizer):
    sites = [["layers.0", "layers.0.mlp.hidden"]]
    with pytest.raises(ValueError, match=r"streams have widths \[32, 48\]"):
        next(iter(stream_activations(llama, tokenizer, TEXTS, sites)))


@pytest.mark.parametrize("sites", [[], {}])
def test_no_sites_is_an_error(llama, tokenizer, sites):
    with pytest.raises(ValueError, match="sites is empty"):
        stream_activations(llama, tokenizer, TEXTS, sites)


def test_no_directories_and_no_tokens_are_errors(llama, tokenizer):
    with pytest.raises(ValueError, match="directories is empty"):
        stream_saved([], "layers.0")
    with pytest.raises(ValueError, match="block_tokens=0"):
        stream_activations(llama, tokenizer, TEXTS, "layers.0", block_tokens=0)
    with pytest.raises(ValueError, match="texts is empty"):
        stream_activations(llama, tokenizer, [], "layers.0")
