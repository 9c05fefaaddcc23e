import importlib.util

import pytest
import torch
from cases import hooks

from manifold_unlearn.evaluate import greedy_answers, plain
from manifold_unlearn.evaluate.inspect_model import inspect_model
from manifold_unlearn.evaluate.sampling import sample_answers
from manifold_unlearn.intervene.hooks import intervene

PROMPTS = ["Water boils", "Iron rusts when"]
installed = pytest.mark.skipif(
    importlib.util.find_spec("inspect_ai") is None, reason="needs inspect_ai"
)


@pytest.mark.skipif(importlib.util.find_spec("inspect_ai") is not None, reason="is installed")
def test_without_the_extra_the_error_names_it():
    with pytest.raises(ImportError, match=r"pip install 'manifold-unlearn\[inspect\]'"):
        inspect_model(plain(None), None)


def said(model, tmp_path, **options):
    """What a task of inspect_ai was answered, in the order of the prompts."""
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.scorer import exact
    from inspect_ai.solver import generate

    task = Task(
        dataset=[Sample(prompt, target="x", id=i) for i, prompt in enumerate(PROMPTS)],
        solver=generate(),
        scorer=exact(),
    )
    (log,) = eval(task, model=model, display="none", log_dir=str(tmp_path), **options)
    assert log.status == "success", log.error
    return [
        [c.message.text for c in s.output.choices] for s in sorted(log.samples, key=lambda s: s.id)
    ]


@installed
@pytest.mark.slow  # importing inspect_ai takes longer than running it
def test_it_answers_as_the_subject_does_hooks_and_all(llama, tokenizer, tmp_path):
    def hooked():
        return intervene(llama, {"layers.1": lambda h: torch.roll(h, 1, -1)})

    found = {}
    for name, subject in {"plain": plain(llama), "hooked": hooked}.items():
        model = inspect_model(subject, tokenizer, name=name)
        found[name] = [a for (a,) in said(model, tmp_path / name, max_tokens=6)]
        assert found[name] == greedy_answers(subject, tokenizer, PROMPTS, max_new_tokens=6)
    assert found["plain"] != found["hooked"]
    assert hooks(llama) == 0


@installed
@pytest.mark.slow
def test_it_follows_the_configuration_of_the_task(llama, tokenizer, tmp_path):
    model = inspect_model(plain(llama), tokenizer)
    options = {"temperature": 0.7, "top_p": 0.9, "seed": 3, "max_tokens": 5, "num_choices": 2}
    sampled = sample_answers(
        plain(llama), tokenizer, PROMPTS, n_samples=2, max_new_tokens=5, temperature=0.7,
        top_p=0.9, random_state=3,
    )  # fmt: skip
    assert said(model, tmp_path, **options) == sampled
    whole = greedy_answers(plain(llama), tokenizer, PROMPTS[:1], max_new_tokens=8)[0]
    stop = next(letter for letter in whole[1:] if letter != whole[0])
    stopped = said(model, tmp_path, max_tokens=8, stop_seqs=[stop])[0][0]
    assert stopped == whole[: whole.index(stop)]


@installed
@pytest.mark.slow
def test_messages_are_written_plainly_or_in_the_chat_template(llama, tokenizer, monkeypatch):
    from inspect_ai.model import ChatMessageSystem, ChatMessageUser

    from manifold_unlearn.evaluate.inspect_model import _prompt

    messages = [ChatMessageSystem(content="Be short."), ChatMessageUser(content="Iron?")]
    assert _prompt(tokenizer, messages, chat=False) == "Be short.\nIron?"
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        inspect_model(plain(llama), tokenizer, chat=True)
    template = "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant]"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    expected = "[system] Be short. [user] Iron? [assistant]"
    assert _prompt(tokenizer, messages, chat=True) == expected
    assert tokenizer(expected)["input_ids"][0] == tokenizer.bos_token_id
