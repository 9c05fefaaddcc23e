"""What a model knows and does, measured."""

from manifold_unlearn.evaluate.likelihood import (
    Subject,
    answer_log_probabilities,
    greedy_answers,
    plain,
    text_log_probabilities,
)
from manifold_unlearn.evaluate.metrics import (
    answer_probability,
    answer_rank,
    forget_quality,
    harmonic_mean,
    perplexity,
    rouge_l_recall,
    truth_ratio,
    truth_ratio_preference,
    truth_ratio_symmetric,
)
from manifold_unlearn.evaluate.results import Change, Metric
from manifold_unlearn.evaluate.suites import assess, assess_text, model_report, summarize

__all__ = [
    "Change",
    "Metric",
    "Subject",
    "answer_log_probabilities",
    "answer_probability",
    "answer_rank",
    "assess",
    "assess_text",
    "forget_quality",
    "greedy_answers",
    "harmonic_mean",
    "model_report",
    "perplexity",
    "plain",
    "rouge_l_recall",
    "summarize",
    "text_log_probabilities",
    "truth_ratio",
    "truth_ratio_preference",
    "truth_ratio_symmetric",
]
