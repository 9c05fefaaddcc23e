"""A model asked in the chat form that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from manifold_unlearn.attack.judges import Reply
from manifold_unlearn.evaluate.likelihood import BatchSize, Subject, greedy_answers


def chat_prompt(tokenizer: Any, message: str) -> str:
    """Message as the user's, in the tokenizer's chat template, up to where the reply begins.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    message : str

    Returns
    -------
    str
        Without the beginning-of-sequence token that the tokenizer puts before every text.

    Raises
    ------
    ValueError
        The tokenizer has no chat template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("the tokenizer has no chat template; take chat=False and a template.")
    text = str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
    )
    begin = tokenizer.bos_token
    if begin and text.startswith(begin):
        doubled = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
        return text[len(begin) :] if doubled else text
    return text


def model_reply(
    subject: Subject,
    tokenizer: Any,
    *,
    begin: str = "",
    max_new_tokens: int = 64,
    batch_size: BatchSize = "auto",
) -> Reply:
    """A model as a function from prompts to greedy replies, as a judge of text needs one.

    Parameters
    ----------
    subject : Subject
    tokenizer : transformers.PreTrainedTokenizerBase
        Its chat template is used where it has one.
    begin : str, default=""
        Written for the model as the beginning of every reply, and part of it: ``"refusal:"`` puts
        a judge that rambles on the rubric's first line.
    max_new_tokens : int, default=64
        Of each reply; the three lines of the rubric take about 20.
    batch_size : int or "auto"

    Returns
    -------
    callable
        Raises ValueError for a prompt longer than the model's context.

    Examples
    --------
    ``RubricJudge(model_reply(plain(model), tokenizer), name="my model")``
    """
    chat = getattr(tokenizer, "chat_template", None) is not None

    def reply(prompts: Sequence[str]) -> list[str]:
        asked = [chat_prompt(tokenizer, prompt) if chat else prompt for prompt in prompts]
        said = greedy_answers(
            subject,
            tokenizer,
            [prompt + begin for prompt in asked],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        return [begin + text for text in said]

    return reply
