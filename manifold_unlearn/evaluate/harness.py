"""Tasks of lm-evaluation-harness on a model in memory, hooked or baked, and tasks of our items."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from manifold_unlearn.activations.corpus import Item, join_answer
from manifold_unlearn.activations.models import evaluating
from manifold_unlearn.artifact import write_text
from manifold_unlearn.evaluate.likelihood import Subject

Task = str | Mapping[str, Any]
"""Name of a task that the harness knows, or its configuration as a mapping."""


def lm_eval_scores(
    subject: Subject,
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    log_samples: bool = False,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness on a subject.

    The model is handed over as it is: no weights are written or loaded, and hooks that the subject
    put in act in every forward pass. Global random states are left alone.

    Parameters
    ----------
    subject : Subject
        ``plain(model)``, or a function that opens to a model which is intervened on.
    tokenizer : transformers.PreTrainedTokenizerBase
        Copied, because the harness sets its padding token.
    tasks : sequence of str or mapping
        Mappings as :func:`choice_task` makes them need no network; names take their data from the
        hub.
    num_fewshot : int, optional
        Default: what each task says.
    limit : int, optional
        First so many documents of each task.
    batch_size : int, default=8
    apply_chat_template : bool, default=False
    log_samples : bool, default=False
        Also return the log-likelihoods of each document, under ``"samples"``.

    Returns
    -------
    dict
        ``"results"``: for each task its metrics with their standard errors, as the harness names
        them (``"acc,none"``, ``"acc_stderr,none"``); ``"versions"``; perhaps ``"samples"``.

    Raises
    ------
    ImportError
        lm-eval is not installed.
    ValueError
        No tasks.

    References
    ----------
    EleutherAI, lm-evaluation-harness, 0.4.
    """
    if not tasks:
        raise ValueError("tasks is empty; give a name of the harness or what choice_task made.")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            "lm_eval_scores needs lm-evaluation-harness with transformers: "
            "pip install 'manifold-unlearn[harness]'"
        ) from error
    named = any(isinstance(task, str) for task in tasks)
    manager = TaskManager(include_defaults=named)  # which reads some ten thousand files
    with subject() as model, evaluating(model):
        lm = HFLM(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            backend="causal",
        )
        found = simple_evaluate(
            model=lm,
            tasks=[task if isinstance(task, str) else dict(task) for task in tasks],
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            log_samples=log_samples,
            bootstrap_iters=0,
            task_manager=manager,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    kept = ("results", "versions", "samples") if log_samples else ("results", "versions")
    return {key: found[key] for key in kept if key in found}


def choice_task(
    items: Sequence[Item], directory: str | Path, *, name: str = "forget_choice"
) -> dict[str, Any]:
    """Write items as a multiple-choice task that the harness runs without a network.

    The answer and the perturbed answers of an item are its choices, the right one at a place that
    goes round with the item's number. The harness picks the choice of the largest log-likelihood
    (``acc``), or of the largest one a byte (``acc_norm``).

    Parameters
    ----------
    items : sequence of Item
        Each with an answer and at least one perturbed answer.
    directory : path
        Gets ``<name>.jsonl`` and the harness's own cache of it.
    name : str, default="forget_choice"

    Returns
    -------
    dict
        The task's configuration, for :func:`lm_eval_scores`.

    Raises
    ------
    ValueError
        No items, one without wrong answers, or whose wrong answers hold the right one; a name that
        the harness could not use.

    Notes
    -----
    Questions of WMDP or MMLU kind become items too: the options in the prompt, letters as answers.
    """
    if not items:
        raise ValueError("items is empty; give at least one with perturbed answers.")
    if not name.replace("_", "").isalnum():
        raise ValueError(f"name={name!r} must be made of letters, digits and underscores.")
    lines = [json.dumps(_document(i, item), ensure_ascii=False) for i, item in enumerate(items)]
    path = Path(directory) / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(path)},
            "cache_dir": str(path.parent / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{target}}",
        "target_delimiter": "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }


def _document(i: int, item: Item) -> dict[str, Any]:
    wrong = [join_answer(item.question, answer) for answer in item.perturbed_answer]
    right = item.pair[1]
    if not right or not wrong or right in wrong:
        raise ValueError(
            f"item {i} ({item.question[:40]!r}) has {len(wrong)} wrong answers to {right!r}; a "
            "choice needs a right answer and others."
        )
    target = i % (len(wrong) + 1)
    choices = [*wrong[:target], right, *wrong[target:]]
    return {"question": item.question, "choices": choices, "target": target}
