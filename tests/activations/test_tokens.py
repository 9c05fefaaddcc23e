import numpy as np
import pytest
import torch
from cases import TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st

from manifold_unlearn.activations.tokens import Encoding, batches, encode, select

PAIRS = [("The capital of France is", " Paris"), ("Water", " boils over")]


def encoding(n, start=5):
    none = torch.zeros(n, dtype=torch.bool)
    return Encoding(torch.arange(start, start + n), none, none)


def test_texts_are_what_the_tokenizer_says_and_its_own_tokens_are_special(tokenizer):
    rows = encode(tokenizer, TEXTS)
    for text, row in zip(TEXTS, rows, strict=True):
        assert row.ids.tolist() == tokenizer(text).input_ids
        assert row.special.tolist() == [True] + [False] * (len(row) - 1)
        assert not row.answer.any()


def test_a_pair_is_the_prompts_tokens_then_the_answers(tokenizer):
    for (prompt, answer), row in zip(PAIRS, encode(tokenizer, PAIRS), strict=True):
        head = tokenizer(prompt).input_ids
        tail = tokenizer(answer, add_special_tokens=False).input_ids
        assert row.ids.tolist() == head + tail
        assert row.answer.tolist() == [False] * len(head) + [True] * len(tail)


def test_an_ending_eos_is_part_of_the_answer(tokenizer):
    plain = encode(tokenizer, PAIRS)
    for row, short in zip(encode(tokenizer, PAIRS, append_eos=True), plain, strict=True):
        assert row.ids.tolist() == [*short.ids.tolist(), tokenizer.eos_token_id]
        assert row.answer[-1] and row.special[-1]


def test_joint_tokenization_merges_across_the_seam_and_marks_the_answer(tokenizer):
    pair = ("The cap", "ital of")
    (apart,) = encode(tokenizer, [pair])
    (joint,) = encode(tokenizer, [pair], joint=True)
    assert joint.ids.tolist() == tokenizer("The capital of").input_ids
    assert joint.ids.tolist() != apart.ids.tolist()
    marked = tokenizer.decode(joint.ids[joint.answer])
    assert marked == " capital of"  # the token that straddles the seam ends in the answer
    assert tokenizer.decode(apart.ids[apart.answer]) == "ital of"


def test_max_length_cuts(tokenizer):
    (row,) = encode(tokenizer, [TEXTS[2]], max_length=4)
    assert row.ids.tolist() == tokenizer(TEXTS[2]).input_ids[:4]
    assert len(row.special) == len(row.answer) == 4


def test_a_text_longer_than_the_context_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"text 1 \('aaaa.* tokens; the model takes 64.*Split"):
        encode(tokenizer, ["b", "a" * 100], context=64)


def test_a_text_as_long_as_the_context_passes(tokenizer):
    (row,) = encode(tokenizer, ["?" * 63], context=64)
    assert len(row) == 64


def test_no_texts_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="texts is empty"):
        encode(tokenizer, [])


def test_a_text_without_tokens_is_named(tokenizer, monkeypatch):
    bare = lambda texts, add_special_tokens, **k: tokenizer(  # noqa: E731
        texts, add_special_tokens=False, **k
    )
    bare.eos_token_id = 1
    with pytest.raises(ValueError, match="text 1 .*has no tokens; remove it"):
        encode(bare, ["a", ""])


def test_an_answer_cut_away_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="the answer ' Paris' has no tokens"):
        encode(tokenizer, PAIRS[:1], max_length=3)


def test_selections_by_name(tokenizer):
    rows = encode(tokenizer, PAIRS)
    assert all(mask.all() and len(mask) == len(r) for mask, r in zip(select(rows, "all"), rows))  # noqa: B905
    for mask, row in zip(select(rows, "last"), rows, strict=True):
        assert mask.nonzero().tolist() == [[len(row) - 1]]
    for mask, row in zip(select(rows, "answer"), rows, strict=True):
        assert torch.equal(mask, row.answer)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_padded_mask_selects(kind):
    masks = select([encoding(3), encoding(1)], kind([[1, 0, 1], [1, 0, 0]]))
    assert [m.tolist() for m in masks] == [[True, False, True], [True]]


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ("first", "tokens='first' is not 'all', 'last', 'answer'"),
        ("answer", "needs .prompt, answer. pairs; text 0 has no answer"),
        ([[1]], "1 token masks for 2 texts"),
        ([[1, 0, 0], [1, 1]], "mask of text 1 has shape .2,.; the text has 1 tokens"),
        ([[1], [1]], "mask of text 0 has shape .1,.; the text has 3 tokens"),
    ],
)
def test_a_selection_that_does_not_fit_is_an_error(tokens, words):
    with pytest.raises(ValueError, match=words):
        select([encoding(3), encoding(1)], tokens)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    batch_size=st.one_of(st.just("auto"), st.integers(1, 5)),
    side=st.sampled_from(["left", "right"]),
)
def test_batches_hold_every_text_once_whatever_the_padding(lengths, batch_size, side):
    rows = [encoding(n, start=10 * i + 1) for i, n in enumerate(lengths)]
    made = batches(rows, batch_size=batch_size, padding_side=side, token_budget=20, pad_id=0)
    seen = []
    for batch in made:
        assert batch.input_ids.numel() <= 20 or batch_size != "auto"
        assert batch_size == "auto" or len(batch.index) <= batch_size
        for r, i in enumerate(batch.index.tolist()):
            present = batch.attention_mask[r].bool()
            assert torch.equal(batch.input_ids[r][present], rows[i].ids)
            assert batch.position_ids[r][present].tolist() == list(range(lengths[i]))
            assert not batch.input_ids[r][~present].any()
            assert present[0 if side == "right" else -1]
            seen.append(i)
    assert sorted(seen) == list(range(len(lengths)))
    assert [len(rows[i]) for i in seen] == sorted(lengths, reverse=True)


def test_a_batch_of_no_texts_is_refused():
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        batches([encoding(2)], batch_size=0)
