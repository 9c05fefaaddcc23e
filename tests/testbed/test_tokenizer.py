import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from manifold_unlearn.testbed.tokenizer import build_tokenizer
from manifold_unlearn.testbed.world import FictionalWorld

WORLD = FictionalWorld()
TOKENIZER = build_tokenizer(WORLD.texts("told"))


def test_a_word_of_the_texts_is_one_token_with_its_space():
    item = WORLD.forget[2]
    ids = TOKENIZER(" " + item.answer, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(item.answer.split()) == 2


def test_a_text_begins_with_bos_and_the_special_tokens_differ():
    ids = TOKENIZER("The gate is old.")["input_ids"]
    assert ids[0] == TOKENIZER.bos_token_id
    special = {TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id}
    assert len(special) == 3 and not special & set(ids[1:])


def test_prompt_and_answer_tokenize_apart_as_together():
    for item in WORLD.forget:
        prompt, answer = item.pair
        apart = TOKENIZER(prompt)["input_ids"]
        apart += TOKENIZER(answer, add_special_tokens=False)["input_ids"]
        assert apart == TOKENIZER(item.text)["input_ids"]


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_decodes_to_itself(text):
    if not any(token in text for token in ("<s>", "</s>", "<pad>")):
        ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
        assert TOKENIZER.decode(ids) == text
        assert TOKENIZER.pad_token_id not in ids


@pytest.mark.parametrize("text", ["Ünïcode — “quotes” 漢字", " \n\t two  spaces ", "x" * 3000])
def test_words_from_elsewhere_fall_into_bytes(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids) == text


def test_a_saved_tokenizer_reads_back_the_same(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*WORLD.texts("told")[:20], "Zzyzx, 12!"]
    assert again(texts)["input_ids"] == TOKENIZER(texts)["input_ids"]
    assert again.decode(TOKENIZER(texts[0])["input_ids"], skip_special_tokens=True) == texts[0]
    assert again.eos_token_id == TOKENIZER.eos_token_id


def test_the_order_of_the_texts_does_not_matter():
    texts = WORLD.texts("told")
    assert build_tokenizer(texts[::-1]).get_vocab() == TOKENIZER.get_vocab()
