import pytest
import torch

from manifold_unlearn.attack.chat import chat_prompt, model_reply
from manifold_unlearn.evaluate import plain

CHAT = "{% for m in messages %}<s>[{{ m.role }}] {{ m.content }}{% endfor %} [assistant]"


@pytest.fixture
def chatty(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT)
    return tokenizer


def test_the_message_is_the_users_and_begins_once(chatty):
    assert chat_prompt(chatty, "Bake") == "[user] Bake [assistant]"
    ids = chatty(chat_prompt(chatty, "Bake")).input_ids
    assert ids.count(chatty.bos_token_id) == 1


def test_without_a_chat_template_there_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        chat_prompt(tokenizer, "Bake")


def continued(model, tokenizer, text, n):
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=n, do_sample=False, pad_token_id=2)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_replies_continue_the_prompt_or_what_is_begun_for_them(llama, tokenizer):
    said = model_reply(plain(llama), tokenizer, max_new_tokens=5)(["Iron", "Water boils"])
    assert list(said) == [continued(llama, tokenizer, text, 5) for text in ("Iron", "Water boils")]
    begun = model_reply(plain(llama), tokenizer, begin=" so:", max_new_tokens=5)(["Iron"])
    assert list(begun) == [" so:" + continued(llama, tokenizer, "Iron so:", 5)]
    assert begun[0] != " so:" + said[0]


def test_a_model_that_has_a_chat_template_is_asked_in_it(llama, chatty):
    said = model_reply(plain(llama), chatty, max_new_tokens=5)(["Iron"])
    assert list(said) == [continued(llama, chatty, "[user] Iron [assistant]", 5)]
    assert list(said) != [continued(llama, chatty, "Iron", 5)]
