import pytest
import torch

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.finetune.batches import (
    IGNORED,
    batches_in_order,
    collate,
    encode_examples,
    epochs,
)


def labeled(tokenizer, row):
    return tokenizer.decode(row.ids[row.answer])


def test_loss_is_on_answers_or_on_all_of_a_text(tokenizer):
    examples = [Item("The capital of France is", "Paris"), ("Water", " boils"), "Iron rusts"]
    rows = encode_examples(tokenizer, examples)
    assert labeled(tokenizer, rows[0]) == " Paris"
    assert labeled(tokenizer, rows[1]) == " boils"
    assert labeled(tokenizer, rows[2]) == "Iron rusts"
    assert not rows[2].answer[0]  # bos


def test_a_text_without_bos_does_not_predict_its_first_token(tokenizer):
    def bare(texts, **keywords):
        return tokenizer(texts, **{**keywords, "add_special_tokens": False})

    (row,) = encode_examples(bare, ["Iron rusts"])
    assert row.answer.tolist() == [False] + [True] * (len(row) - 1)
    with pytest.raises(ValueError, match="'x'.* nothing to learn; remove it or give it a prompt"):
        encode_examples(bare, ["Iron rusts", "x"], name="forget")


def test_the_end_of_an_answer_may_carry_loss(tokenizer):
    (row,) = encode_examples(tokenizer, [("Water", " boils")], include_eos=True)
    assert row.ids[-1] == tokenizer.eos_token_id
    assert row.answer[-1]


def test_padding_carries_neither_attention_nor_loss(tokenizer):
    rows = encode_examples(tokenizer, [("The capital of France is", " Paris"), ("x", " y")])
    batch = collate(rows, torch.tensor([1, 0]), pad_id=2)
    n = len(rows[1])
    assert batch.index.tolist() == [1, 0]
    assert batch.attention_mask[0].tolist() == [1] * n + [0] * (len(rows[0]) - n)
    assert set(batch.labels[0, n:].tolist()) == {IGNORED}
    assert set(batch.input_ids[0, n:].tolist()) == {2}
    assert batch.marked("all").sum().item() == len(rows[0]) + n
    loss = batch.labels != IGNORED
    assert torch.equal(batch.marked("answer"), loss)
    predicting = batch.marked("predicting")
    assert torch.equal(predicting[:, :-1], loss[:, 1:])
    assert not predicting[:, -1].any()
    with pytest.raises(ValueError, match="tokens='last' is not 'predicting'"):
        batch.marked("last")


def test_every_epoch_has_every_row_once_in_an_order_of_its_own():
    order = epochs(10, 4, torch.Generator().manual_seed(0))
    first = [next(order) for _ in range(3)]
    second = [next(order) for _ in range(3)]
    assert [len(index) for index in first] == [4, 4, 2]
    assert sorted(torch.cat(first).tolist()) == sorted(torch.cat(second).tolist()) == [*range(10)]
    assert torch.cat(first).tolist() != torch.cat(second).tolist()
    again = epochs(10, 4, torch.Generator().manual_seed(0))
    assert torch.equal(next(again), first[0])


def test_rows_in_the_order_given(tokenizer):
    rows = encode_examples(tokenizer, ["Water", "Iron rusts", "x"])
    assert [b.index.tolist() for b in batches_in_order(rows, 2)] == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "the forget set is empty; give at least one item or text"),
        ("Water boils", "the forget set is one string; give a list"),
        (["word " * 200], "the forget set: text 0 .* tokens; the model takes 64"),
    ],
)
def test_bad_examples(tokenizer, examples, message):
    with pytest.raises(ValueError, match=message):
        encode_examples(tokenizer, examples, name="forget", context=64)


def test_an_answer_that_tokenizes_to_nothing_is_named(tokenizer):
    def stripping(texts, **keywords):
        return tokenizer([text.strip() for text in texts], **keywords)

    with pytest.raises(ValueError, match="forget set: text 1 .*the answer '  ' has no tokens"):
        encode_examples(stripping, [("Water", " boils"), ("Iron", "  ")], name="forget")
