import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from cases import TEXTS, build_model

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.evaluate import (
    Metric,
    answer_log_probabilities,
    answer_probability,
    assess,
    assess_text,
    greedy_answers,
    membership_scores,
    model_report,
    perplexity,
    plain,
    rouge_l_recall,
    score_answers,
    summarize,
    text_log_probabilities,
    token_memorization,
)
from manifold_unlearn.evaluate.suites import compare_text

FACTS = [
    Item(
        "The capital of France is",
        "Paris",
        paraphrased_question=("France has the capital", "In France the capital is"),
        paraphrased_answer="it is Paris",
        perturbed_answer=("Rome", "Madrid"),
    ),
    Item(
        "Iron",
        "rusts",
        paraphrased_question=("It is iron that",),
        paraphrased_answer="is wet",
        perturbed_answer=("boils", "jumps over"),
    ),
]


def probability(model, tokenizer, *pairs, eos=False):
    log_p = answer_log_probabilities(plain(model), tokenizer, list(pairs), include_eos=eos)
    return answer_probability(log_p)


@pytest.mark.parametrize("eos", [False, True])
def test_every_metric_by_its_formula(model, tokenizer, eos):
    found = assess(plain(model), tokenizer, FACTS, include_eos=eos, max_new_tokens=5)
    assert list(found) == [
        "probability",
        "paraphrase_probability",
        "paraphrased_answer_probability",
        "rank",
        "truth_ratio",
        "rouge_l_recall",
    ]
    for i, item in enumerate(FACTS):
        q, p = item.question, lambda *pairs: probability(model, tokenizer, *pairs, eos=eos)
        right, wrong = p((q, " " + item.answer)), p(*((q, " " + w) for w in item.perturbed_answer))
        reworded = p(*((other, " " + item.answer) for other in item.paraphrased_question))
        restated = p((q, " " + item.paraphrased_answer))
        ratio = np.sqrt(wrong.prod()) / restated[0]
        (said,) = greedy_answers(plain(model), tokenizer, [q], max_new_tokens=5)
        expected = {
            "probability": right[0],
            "paraphrase_probability": reworded.mean(),
            "paraphrased_answer_probability": restated[0],
            "rank": 1 + (wrong >= right).sum(),
            "truth_ratio": ratio,
            "rouge_l_recall": rouge_l_recall(said, item.answer),
        }
        for name, value in expected.items():
            assert found[name].values[i] == pytest.approx(value, rel=1e-3), name
    assert all(metric.name == name for name, metric in found.items())


def test_answers_without_words_are_left_out_of_rouge_and_counted(model, tokenizer):
    odd = [*FACTS, Item("Two times three is", "?!")]
    with pytest.warns(UserWarning, match="1 of 3 answers have no words"):
        found = assess(plain(model), tokenizer, odd, max_new_tokens=3)
    assert len(found["rouge_l_recall"].values) == 2
    assert len(found["probability"].values) == 3


def test_without_a_paraphrased_answer_the_ratio_is_to_the_answer(llama, tokenizer):
    item = Item("Iron", "rusts", perturbed_answer=("boils",))
    found = assess(plain(llama), tokenizer, [item], generate=False)
    right, wrong = probability(llama, tokenizer, ("Iron", " rusts"), ("Iron", " boils"))
    assert found["truth_ratio"].values == pytest.approx([wrong / right])


def test_metrics_for_which_an_item_lacks_what_it_takes_are_left_out(llama, tokenizer):
    bare = [FACTS[0], Item("Water", "boils")]
    assert list(assess(plain(llama), tokenizer, bare, generate=False)) == ["probability"]


@pytest.mark.parametrize("include_eos", [False, True])
def test_one_pass_gives_what_each_metric_scores_alone(llama, tokenizer, include_eos):
    scored = score_answers(plain(llama), tokenizer, FACTS, include_eos=include_eos)
    recited = token_memorization(plain(llama), tokenizer, FACTS)
    for name, metric in scored.memorization().items():
        np.testing.assert_array_equal(metric.values, recited[name].values)
    known = membership_scores(
        plain(llama), tokenizer, [item.pair for item in FACTS], include_eos=include_eos
    )
    for name, values in scored.membership().items():
        np.testing.assert_allclose(values, known[name], rtol=1e-5, err_msg=name)
    for i, item in enumerate(FACTS):
        ids = tokenizer(" " + item.answer, add_special_tokens=False).input_ids
        assert len(scored.answers[i].correct) == len(ids) + include_eos


def test_an_answer_that_ends_itself_keeps_its_end_in_memorization(llama, tokenizer):
    item = Item("Iron", "rusts" + tokenizer.eos_token)
    scored = score_answers(plain(llama), tokenizer, [item], include_eos=True)
    alone = token_memorization(plain(llama), tokenizer, [item])
    assert scored.ended == [False]
    found = scored.memorization()["exact_memorization"].values
    np.testing.assert_array_equal(found, alone["exact_memorization"].values)


def test_each_model_reads_the_texts_once_when_they_are_compared(llama, tokenizer):
    other = build_model("llama", seed=1)
    opened = []
    found = compare_text(
        lambda: opened.append("subject") or nullcontext(llama),
        lambda: opened.append("reference") or nullcontext(other),
        tokenizer,
        TEXTS,
    )
    assert opened.count("reference") == 1  # one batch
    for name, model in (("perplexity", llama), ("reference_perplexity", other)):
        alone = assess_text(plain(model), tokenizer, TEXTS)["perplexity"]
        assert found[name] == pytest.approx(alone, rel=1e-6)


def test_greedy_answers_are_a_quarter_longer_than_the_longest_answer(llama, tokenizer):
    asked = []
    generate = llama.generate
    llama.generate = lambda **options: asked.append(options) or generate(**options)
    assess(plain(llama), tokenizer, [Item("Iron", "rusts"), Item("Iron", "x")])
    n = len(tokenizer(" rusts", add_special_tokens=False).input_ids)
    assert n % 4
    assert asked[0]["max_new_tokens"] == n + 1 + n // 4


def test_plain_texts_have_a_probability(llama, tokenizer):
    found = assess(plain(llama), tokenizer, [Item(text) for text in TEXTS])
    log_p, _ = text_log_probabilities(plain(llama), tokenizer, TEXTS)
    assert list(found) == ["probability"]
    np.testing.assert_allclose(found["probability"].values, answer_probability(log_p))


def test_no_items_and_mixed_items_are_refused(llama, tokenizer):
    with pytest.raises(ValueError, match="items is empty"):
        assess(plain(llama), tokenizer, [])
    with pytest.raises(ValueError, match="plain texts and questions are mixed"):
        assess(plain(llama), tokenizer, [FACTS[0], Item("a text")])


def test_neutral_text_has_perplexity_and_divergence(llama, tokenizer):
    other = build_model("llama", seed=1)
    found = assess_text(plain(llama), tokenizer, TEXTS, reference=plain(other))
    log_p, kl = text_log_probabilities(plain(llama), tokenizer, TEXTS, reference=plain(other))
    assert found["perplexity"] == pytest.approx(perplexity(log_p))
    assert found["kl"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-5)
    assert list(assess_text(plain(llama), tokenizer, TEXTS)) == ["perplexity"]


def metrics(**values):
    return {name: Metric(name, np.array(row)) for name, row in values.items()}


def test_a_summary_has_the_means_and_both_forms_of_the_ratio():
    found = summarize(metrics(probability=[0.2, 0.4], truth_ratio=[0.5, 4.0]))
    assert found == pytest.approx(
        {
            "probability": 0.3,
            "truth_ratio": (0.5 + 0.25) / 2,
            "truth_ratio_preference": (0.5 + 0) / 2,
        }
    )


def test_a_report_by_hand():
    forget = metrics(probability=[0.1], truth_ratio=[1.0])
    retain = metrics(probability=[0.5], rouge_l_recall=[1.0], truth_ratio=[0.75], rank=[3.0])
    report = model_report(forget, retain, metrics(truth_ratio=[3.0]))
    assert report["forget"]["probability"] == 0.1
    assert report["retain"]["rank"] == 3
    assert report["forget_quality"]["ks_statistic"] == 1
    assert report["forget_quality"]["wasserstein"] == pytest.approx(0.25)
    assert report["model_utility"] == pytest.approx(3 / (1 / 0.5 + 1 / 1 + 1 / 0.25))
    assert json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("reference", [None, {}, metrics(probability=[0.1])])
def test_without_a_reference_there_is_no_forget_quality(reference):
    plain_metrics = metrics(probability=[0.5], truth_ratio=[1.0])
    report = model_report(plain_metrics, plain_metrics, reference)
    assert report["forget_quality"] is None
    bare = model_report(metrics(probability=[0.5]), metrics(probability=[0.5]), plain_metrics)
    assert bare["forget_quality"] is None
    assert bare["model_utility"] == pytest.approx(0.5)
