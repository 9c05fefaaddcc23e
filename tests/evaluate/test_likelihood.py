import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import ARCHITECTURES, TEXTS, build_model, build_tokenizer, hooks, logits
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from manifold_unlearn import intervene, load_model
from manifold_unlearn.activations.corpus import read_items
from manifold_unlearn.evaluate.likelihood import (
    answer_log_probabilities,
    answer_scores,
    greedy_answers,
    plain,
    text_log_probabilities,
    text_scores,
)
from manifold_unlearn.evaluate.metrics import answer_probability

SHARED = Path(__file__).parents[3] / "shared"
PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " Rome, it is"),
    ("Water", " boils"),
    ("The capital of France is", "."),
    ("A quick brown fox jumps over the lazy dog", " and the dog is wet"),
    ("The capital of Spain is", " Madrid"),
]
"""Shared prompts, answers of one token and of many, prompts of many lengths."""
SEAM = ("The cap", "ital of")


def naive(model, tokenizer, prompt, answer, *, eos=False, joint=False):
    """One full forward pass of one pair."""
    if joint:
        ids = tokenizer(prompt + answer, return_offsets_mapping=True)
        inside = [end > len(prompt) for _, end in ids.offset_mapping]
        n_prompt, ids = inside.index(True), ids.input_ids
    else:
        head = tokenizer(prompt).input_ids
        ids = head + tokenizer(answer, add_special_tokens=False).input_ids
        n_prompt = len(head)
    ids = ids + [tokenizer.eos_token_id] * eos
    log_p = logits(model, torch.tensor([ids]))[0].log_softmax(-1)
    return log_p[range(n_prompt - 1, len(ids) - 1), ids[n_prompt:]]


def _unmarked(tokenizer):
    """The tokenizer without the bos that it puts before every text."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps(described | {"post_processor": None})


@pytest.mark.parametrize("eos", [False, True])
def test_answers_are_scored_as_by_one_forward_pass_each(model, tokenizer, eos):
    found = answer_log_probabilities(plain(model), tokenizer, PAIRS, include_eos=eos)
    for (prompt, answer), row in zip(PAIRS, found, strict=True):
        expected = naive(model, tokenizer, prompt, answer, eos=eos)
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=2e-5)
    assert {len(row) - eos for row in found} >= {1, 4, 11}


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_batch_size_does_not_matter(model, tokenizer, batch_size):
    auto = answer_log_probabilities(plain(model), tokenizer, PAIRS)
    found = answer_log_probabilities(plain(model), tokenizer, PAIRS, batch_size=batch_size)
    for row, expected in zip(found, auto, strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=2e-5)


def test_neither_the_order_nor_the_company_matters(llama, tokenizer):
    whole = answer_log_probabilities(plain(llama), build_tokenizer("left"), PAIRS)
    turned = answer_log_probabilities(plain(llama), tokenizer, PAIRS[::-1])[::-1]
    for i, (row, other) in enumerate(zip(whole, turned, strict=True)):
        (alone,) = answer_log_probabilities(plain(llama), tokenizer, [PAIRS[i]])
        torch.testing.assert_close(row, other, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(row, alone, rtol=1e-5, atol=2e-5)


def test_a_prompt_that_answers_share_is_run_once(llama, tokenizer):
    seen = []
    llama.model.register_forward_pre_hook(
        lambda m, a, k: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True
    )
    answer_log_probabilities(plain(llama), tokenizer, PAIRS)
    assert seen[0][0] == 4  # distinct prompts
    assert seen[1][0] == 5  # answers of more than one token
    assert len(seen) == 2


def test_of_two_tokenizations_the_likelier_is_used(tokenizer):
    chosen = set()
    for seed in range(8):
        model = build_model("llama", seed=seed)
        (found,) = answer_log_probabilities(plain(model), tokenizer, [SEAM])
        ways = {joint: naive(model, tokenizer, *SEAM, joint=joint) for joint in (True, False)}
        best = max(ways, key=lambda joint: float(ways[joint].mean()))
        torch.testing.assert_close(found, ways[best], rtol=1e-5, atol=2e-5)
        chosen.add(best)
    assert chosen == {True, False}


def test_dropout_is_off_and_training_goes_on_afterwards(tokenizer):
    model = build_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    expected = answer_log_probabilities(plain(model), tokenizer, PAIRS[:1])
    model.train()
    found = answer_log_probabilities(plain(model), tokenizer, PAIRS[:1])
    assert torch.equal(found[0], expected[0])
    assert model.training


def test_the_subject_may_be_a_model_under_an_edit(llama, tokenizer):
    @contextmanager
    def edited():
        with intervene(llama, {"layers.1": lambda h: 0.5 * h}) as model:
            yield model

    found = answer_log_probabilities(edited, tokenizer, PAIRS)
    assert hooks(llama) == 0
    free = answer_log_probabilities(plain(llama), tokenizer, PAIRS)
    with intervene(llama, {"layers.1": lambda h: 0.5 * h}):
        expected = naive(llama, tokenizer, *PAIRS[1])
    torch.testing.assert_close(found[1], expected, rtol=1e-5, atol=2e-5)
    assert (found[1] - free[1]).abs().max() > 1e-2


def test_a_pair_longer_than_the_context_is_named(model, tokenizer):
    with pytest.raises(ValueError, match="text 1 .*the model takes 64"):
        answer_log_probabilities(plain(model), tokenizer, [PAIRS[0], ("a", "?" * 80)])


def test_an_empty_answer_is_refused(llama, tokenizer):
    with pytest.raises(ValueError, match="pair 0 has no answer"):
        answer_log_probabilities(plain(llama), tokenizer, [("Water", "")])


def test_an_answer_without_a_prompt_is_refused(llama, tokenizer):
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_unmarked(tokenizer)), eos_token="</s>"
    )
    with pytest.raises(ValueError, match="pair 1 has no prompt tokens before its answer"):
        answer_log_probabilities(plain(llama), bare, [PAIRS[0], ("", "Water")])


# --- greedy answers ---------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, "auto"])
def test_greedy_answers_are_generates_one_at_a_time(model, tokenizer, batch_size):
    prompts = [prompt for prompt, _ in PAIRS]
    found = greedy_answers(
        plain(model), tokenizer, prompts, max_new_tokens=7, batch_size=batch_size
    )
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        new = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=7,
            do_sample=False,
            pad_token_id=2,
        )[0, ids.shape[1] :]
        assert text == tokenizer.decode(new, skip_special_tokens=True)
    assert len(set(found)) > 1


def test_a_greedy_answer_ends_with_the_context(model, tokenizer):
    model.generation_config.eos_token_id = None
    new = []
    generate = model.generate
    model.generate = lambda **options: new.append(generate(**options)) or new[-1]
    prompts = ["?" * 59, "Water", "?" * 63]  # with bos, 60, 8 and 64 of 64 tokens
    greedy_answers(plain(model), tokenizer, prompts, max_new_tokens=9)
    lengths = sorted((row.shape[1] for row in new), reverse=True)
    assert lengths == [65, 65, len(tokenizer("Water").input_ids) + 9]  # the last is fed to no pass


def test_greedy_answers_do_not_sample(tokenizer):
    model = build_model("llama")
    model.generation_config.do_sample = True
    model.generation_config.temperature = 50.0
    a, b = (greedy_answers(plain(model), tokenizer, ["Water"], max_new_tokens=8) for _ in "ab")
    assert a == b


# --- texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_texts_are_scored_as_by_one_forward_pass_each(model, tokenizer, batch_size):
    found, kl = text_log_probabilities(plain(model), tokenizer, TEXTS, batch_size=batch_size)
    assert kl == []
    for text, row in zip(TEXTS, found, strict=True):
        ids = tokenizer(text).input_ids
        log_p = logits(model, torch.tensor([ids]))[0].log_softmax(-1)
        expected = log_p[range(len(ids) - 1), ids[1:]]
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=2e-5)


def test_a_model_does_not_diverge_from_itself(model, tokenizer):
    _, kl = text_log_probabilities(plain(model), tokenizer, TEXTS, reference=plain(model))
    assert all(torch.equal(row, torch.zeros_like(row)) for row in kl)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_divergence_is_the_naive_formula_from_the_reference(name, tokenizer):
    model, other = build_model(name), build_model(name, seed=1)
    _, kl = text_log_probabilities(plain(model), tokenizer, TEXTS, reference=plain(other))
    for text, row in zip(TEXTS, kl, strict=True):
        ids = torch.tensor([tokenizer(text).input_ids])
        q, p = (logits(m, ids)[0, :-1].double().softmax(-1).numpy() for m in (model, other))
        expected = (p * np.log(p / q)).sum(-1)
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)
        assert (row > 0.1).all()
    _, back = text_log_probabilities(plain(other), tokenizer, TEXTS, reference=plain(model))
    assert (torch.cat(kl) - torch.cat(back)).abs().max() > 0.01  # it has a direction


# --- all scores of a token ------------------------------------------------------------------------


def naive_scores(log_p, ids):
    """Argmax and moments of the vocabulary from the formulas, in double precision."""
    log_p = log_p.double().numpy()
    p = np.exp(log_p)
    mean = (p * log_p).sum(1)
    return {
        "log_probabilities": log_p[range(len(ids)), ids],
        "correct": log_p.argmax(1) == np.array(ids),
        "expected": mean,
        "variance": (p * log_p**2).sum(1) - mean**2,
    }


def assert_same_scores(row, expected):
    for name, values in expected.items():
        np.testing.assert_allclose(getattr(row, name).numpy(), values, rtol=1e-4, atol=1e-4)


def test_scores_of_answers_are_those_of_the_formulas(model, tokenizer):
    rows = answer_scores(plain(model), tokenizer, PAIRS, batch_size=3)
    again = answer_log_probabilities(plain(model), tokenizer, PAIRS, batch_size=3)
    for (prompt, answer), row, same in zip(PAIRS, rows, again, strict=True):
        head = tokenizer(prompt).input_ids
        tail = tokenizer(answer, add_special_tokens=False).input_ids
        log_p = logits(model, torch.tensor([head + tail]))[0].log_softmax(-1)[len(head) - 1 : -1]
        assert_same_scores(row, naive_scores(log_p, tail))
        torch.testing.assert_close(row.log_probabilities, same, rtol=0, atol=0)
    assert not torch.cat([row.correct for row in rows]).all()


def test_scores_of_texts_are_those_of_the_formulas(model, tokenizer):
    texts = [text for text in TEXTS if len(tokenizer(text).input_ids) > 1]
    for text, row in zip(texts, text_scores(plain(model), tokenizer, texts), strict=True):
        ids = tokenizer(text).input_ids
        log_p = logits(model, torch.tensor([ids]))[0].log_softmax(-1)[:-1]
        assert_same_scores(row, naive_scores(log_p, ids[1:]))


def test_vocabulary_moments_where_tokens_are_ruled_out():
    """A logit of minus infinity adds nothing and makes nothing NaN."""
    from manifold_unlearn.evaluate.likelihood import _all_scores

    logits_ = torch.tensor([[0.0, 0.0, -torch.inf]])
    (row,) = _all_scores(logits_, torch.tensor([1]))
    np.testing.assert_allclose(row.numpy(), [-np.log(2), 0, -np.log(2), 0], atol=1e-6)


@pytest.mark.parametrize("score", [answer_scores, answer_log_probabilities])
def test_a_model_that_gives_nan_is_refused(llama, tokenizer, score):
    with torch.no_grad():
        llama.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="pair 0: the model's log-probabilities are NaN"):
        score(plain(llama), tokenizer, PAIRS)
    with pytest.raises(ValueError, match="text 0: the model's log-probabilities are NaN"):
        text_log_probabilities(plain(llama), tokenizer, TEXTS)


def test_a_text_of_one_token_has_no_scores(llama):
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_unmarked(build_tokenizer())), eos_token="</s>"
    )
    with pytest.raises(ValueError, match=r"text 0 \('x'\) has one token"):
        text_scores(plain(llama), bare, ["x"])


# --- real checkpoints -----------------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.skipif(
    not (SHARED / "models" / "tofu-stories15m").is_dir(),
    reason="../shared/models/tofu-stories15m is not there",
)
def test_the_model_that_was_told_knows_and_its_twin_does_not():
    path = SHARED / "data" / "tofu" / "forget05_perturbed.jsonl"
    items = read_items(path, template="Question: {question}\nAnswer:")[:40]
    known = {}
    for name in ("told", "never_told"):
        model, tokenizer = load_model(SHARED / "models" / "tofu-stories15m" / name)
        pairs = [item.pair for item in items]
        log_p = answer_log_probabilities(plain(model), tokenizer, pairs, include_eos=True)
        known[name] = answer_probability(log_p).mean()
    assert known["told"] > 0.98
    assert known["never_told"] < 0.02


def test_pairs_that_are_alike_are_scored_once_and_given_to_each(llama, tokenizer):
    rows = []
    forward = llama.forward
    llama.forward = lambda **given: rows.append(len(given["input_ids"])) or forward(**given)
    found = answer_log_probabilities(plain(llama), tokenizer, [*PAIRS, PAIRS[1], PAIRS[1]])
    once = answer_log_probabilities(plain(llama), tokenizer, PAIRS)
    assert rows[: len(rows) // 2] == rows[len(rows) // 2 :]
    for row, pair in zip(found, [*PAIRS, PAIRS[1], PAIRS[1]], strict=True):
        torch.testing.assert_close(row, once[PAIRS.index(pair)], rtol=0, atol=0)


def test_answers_of_one_prompt_are_run_with_those_of_like_length(llama, tokenizer):
    shapes = []
    forward = llama.forward
    llama.forward = lambda **given: shapes.append(given["input_ids"].shape) or forward(**given)
    long = " and the dog is wet, it is a quick brown fox"
    pairs = [("Water", long), *[("Water", f" {name}") for name in ("Paris", "boils", "Rome, it")]]
    found = answer_log_probabilities(plain(llama), tokenizer, pairs, batch_size=1)
    answers = [len(row) - 1 for row in found if len(row) > 1]
    assert [tuple(shape) for shape in shapes[1:]] == [(1, n) for n in sorted(answers, reverse=True)]
    for row, pair in zip(found, pairs, strict=True):
        np.testing.assert_allclose(row.numpy(), naive(llama, tokenizer, *pair), rtol=1e-4)
