from dataclasses import replace

import numpy as np
import pytest

from manifold_unlearn.activations.corpus import Item
from manifold_unlearn.evaluate.probe_tasks import ProbeTask, attribute_task, truth_task

COLORS = ("red", "green", "blue", "gray")
ITEMS = [
    Item(f"Thing {i} is", f" {COLORS[i % 4]}", perturbed_answer=(f" {COLORS[(i + 1) % 4]}",))
    for i in range(12)
]


def test_an_item_is_asked_with_its_right_and_a_wrong_answer():
    extra = [replace(ITEMS[0], question="Other is", paraphrased_answer="reddish")]
    task = truth_task(ITEMS, trained_on=extra)
    assert task.texts[:2] == (("Thing 0 is", " red"), ("Thing 0 is", " green"))
    assert task.texts[24] == ("Other is", " reddish")
    assert task.labels.tolist() == [1, 0] * 13
    assert task.groups.tolist() == np.repeat(np.arange(13), 2).tolist()
    assert task.asked.tolist() == [True] * 24 + [False] * 2
    people = truth_task(ITEMS, groups=["x", "y"] * 6)
    assert people.groups.tolist() == [0, 0, 1, 1] * 6


def test_an_attribute_is_asked_at_the_prompt():
    labels = [item.answer for item in ITEMS]
    task = attribute_task(
        ITEMS[:8], labels[:8], range(8),
        trained_on=ITEMS[8:], trained_labels=labels[8:], trained_groups=range(8, 12),
    )  # fmt: skip
    assert task.texts[0] == "Thing 0 is"
    assert task.labels.tolist() == [0, 1, 2, 3] * 3
    assert task.asked.sum() == 8


def test_tasks_that_ask_nothing_are_refused():
    with pytest.raises(ValueError, match="lacks an answer or a perturbed_answer"):
        truth_task([Item("Water", " boils")])
    with pytest.raises(ValueError, match="2 groups for 12 items"):
        truth_task(ITEMS, groups=[0, 1])
    with pytest.raises(ValueError, match="fewer than two labels"):
        attribute_task(ITEMS, [0] * 12, range(12))
    with pytest.raises(ValueError, match="12 texts with 3 labels"):
        attribute_task(ITEMS, [0, 1, 2], range(12))


def test_a_task_needs_one_of_each_for_every_text():
    with pytest.raises(ValueError, match="1 texts with 2 labels"):
        ProbeTask(("a",), np.array([0, 1]), np.array([0]), np.array([True]))
