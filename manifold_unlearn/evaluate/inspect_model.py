"""A model in memory, hooked or baked, as a model of inspect_ai."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from manifold_unlearn.evaluate.likelihood import Subject, greedy_answers
from manifold_unlearn.evaluate.sampling import sample_answers

PROVIDER = "manifold_unlearn"
"""What inspect_ai calls the source of such models."""


def inspect_model(
    subject: Subject,
    tokenizer: Any,
    *,
    name: str = "in-memory",
    chat: bool = False,
    max_tokens: int = 64,
) -> Any:
    """Model of inspect_ai that answers from a subject: ``inspect_ai.eval(task, model=...)``.

    Parameters
    ----------
    subject : Subject
        ``plain(model)``, or a function that opens to a model which is intervened on. It is opened
        for every call, and calls run one after the other.
    tokenizer : transformers.PreTrainedTokenizerBase
    name : str, default="in-memory"
        Stands in the logs.
    chat : bool, default=False
        Write messages in the tokenizer's chat template. Otherwise their texts stand under each
        other, so that the prompt of a single message is its text.
    max_tokens : int, default=64
        Where the task gives no limit.

    Returns
    -------
    inspect_ai.model.Model
        It follows ``temperature`` (greedy for none or 0), ``top_p``, ``seed``, ``num_choices``,
        ``max_tokens`` and ``stop_seqs`` of the task's configuration.

    Raises
    ------
    ImportError
        inspect_ai is not installed.
    ValueError
        ``chat`` with a tokenizer that has no chat template; at a call, a task with tools.

    References
    ----------
    UK AI Security Institute, inspect_ai, 0.3.
    """
    try:
        from inspect_ai.model import GenerateConfig, ModelAPI, get_model, modelapi
    except ImportError as error:
        raise ImportError(
            "inspect_model needs inspect_ai: pip install 'manifold-unlearn[inspect]'"
        ) from error
    if chat and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("the tokenizer has no chat template; take chat=False.")

    def start(self: Any, model_name: str, **given: Any) -> None:
        config = given.get("config") or GenerateConfig()
        ModelAPI.__init__(self, model_name, None, None, [], config)

    async def generate(
        _: Any, input: Sequence[Any], tools: Sequence[Any], tool_choice: Any, config: Any
    ) -> Any:
        del tool_choice
        if tools:
            raise ValueError(f"the task has {len(tools)} tools; this model calls none.")
        prompt = _prompt(tokenizer, input, chat)
        said = _answers(subject, tokenizer, prompt, config, max_tokens)
        return _output(tokenizer, name, prompt, said, config.max_tokens or max_tokens)

    made = type("InMemoryModel", (ModelAPI,), {"__init__": start, "generate": generate})
    modelapi(name=PROVIDER)(lambda: made)
    return get_model(f"{PROVIDER}/{name}", memoize=False)


def _prompt(tokenizer: Any, messages: Sequence[Any], chat: bool) -> str:
    if not chat:
        return "\n".join(message.text for message in messages)
    turns = [{"role": message.role, "content": message.text} for message in messages]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    begin = tokenizer.bos_token
    adds = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text[len(begin) :] if begin and adds and text.startswith(begin) else text


def _answers(
    subject: Subject, tokenizer: Any, prompt: str, config: Any, max_tokens: int
) -> list[str]:
    length = config.max_tokens or max_tokens
    number = config.num_choices or 1
    if config.temperature:
        (said,) = sample_answers(
            subject,
            tokenizer,
            [prompt],
            n_samples=number,
            max_new_tokens=length,
            temperature=config.temperature,
            top_p=1.0 if config.top_p is None else config.top_p,
            random_state=config.seed or 0,
        )
    else:
        said = greedy_answers(subject, tokenizer, [prompt], max_new_tokens=length) * number
    return [_stopped(text, config.stop_seqs or ()) for text in said]


def _stopped(text: str, stops: Sequence[str]) -> str:
    """Text up to the first stop sequence in it."""
    return text[: min([at for stop in stops if (at := text.find(stop)) >= 0], default=len(text))]


def _output(tokenizer: Any, name: str, prompt: str, said: Sequence[str], length: int) -> Any:
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessageAssistant,
        ModelOutput,
        ModelUsage,
    )

    read = len(tokenizer(prompt)["input_ids"])
    wrote = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in said]
    choices = [
        ChatCompletionChoice(
            message=ChatMessageAssistant(content=text, model=name),
            stop_reason="stop" if n < length else "max_tokens",
        )
        for text, n in zip(said, wrote, strict=True)
    ]
    total = sum(wrote)
    usage = ModelUsage(input_tokens=read, output_tokens=total, total_tokens=read + total)
    return ModelOutput(model=name, choices=choices, usage=usage)
