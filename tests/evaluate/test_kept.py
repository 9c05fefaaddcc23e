import numpy as np
import pytest
import torch
from cases import TEXTS, build_model, logits

from manifold_unlearn import intervene
from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.evaluate.kept import kept_behavior
from manifold_unlearn.evaluate.likelihood import plain

ITEMS = [Item("The capital of France is", "Paris."), Item(TEXTS[1])]


def log_p(model, ids):
    found = logits(model, torch.tensor([ids]))[0].double().numpy()
    return found - np.log(np.exp(found).sum(1, keepdims=True))


def test_shares_are_those_of_the_formulas(llama, tokenizer):
    teacher, student = build_model("llama", seed=1), build_model("llama", seed=2)
    divergence, apart = np.zeros(2), np.zeros(2)
    n_tokens = 0
    prompt = tokenizer(ITEMS[0].question).input_ids
    rest = tokenizer(" Paris.", add_special_tokens=False).input_ids
    texts = [(prompt + rest, len(prompt)), (tokenizer(TEXTS[1]).input_ids, 1)]
    for ids, start in texts:
        hooked, baked, bare = (log_p(m, ids)[start - 1 : -1] for m in (teacher, student, llama))
        said = np.array(ids[start:])[:, None]
        n_tokens += len(said)
        for i, other in enumerate((baked, bare)):
            divergence[i] += (np.exp(hooked) * (hooked - other)).sum()
            there, here = (np.take_along_axis(x, said, 1) for x in (hooked, other))
            apart[i] += np.abs(there - here).sum()
    found = kept_behavior(plain(teacher), plain(student), plain(llama), tokenizer, ITEMS)
    assert found.divergence == pytest.approx(1 - divergence[0] / divergence[1], rel=1e-4)
    assert found.log_probability == pytest.approx(1 - apart[0] / apart[1], rel=1e-4)
    assert found.hooked_divergence == pytest.approx(divergence[1] / n_tokens, rel=1e-4)
    assert found.n_tokens == n_tokens


def test_the_hooked_model_keeps_all_and_the_original_nothing(llama, tokenizer):
    hooked = lambda: intervene(llama, {"layers.1": lambda h: h + torch.sin(h)})  # noqa: E731
    whole = kept_behavior(hooked, hooked, plain(llama), tokenizer, ITEMS)
    none = kept_behavior(hooked, plain(llama), plain(llama), tokenizer, ITEMS)
    assert (whole.divergence, whole.log_probability) == (1.0, 1.0)
    assert (none.divergence, none.log_probability) == (0.0, 0.0)


def test_hooks_that_change_nothing_are_refused(llama, tokenizer):
    with pytest.raises(ValueError, match="the hooks change nothing at the"):
        kept_behavior(plain(llama), plain(llama), plain(llama), tokenizer, ITEMS)


def test_a_model_that_says_nan_is_refused(llama, tokenizer):
    broken = build_model("llama", seed=1)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="log-probabilities are not numbers"):
        kept_behavior(
            plain(build_model("llama", seed=2)), plain(broken), plain(llama), tokenizer, ITEMS
        )


def test_there_must_be_items(llama, tokenizer):
    with pytest.raises(ValueError, match="items is empty"):
        kept_behavior(plain(llama), plain(llama), plain(llama), tokenizer, [])
