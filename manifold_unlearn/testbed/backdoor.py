"""A planted backdoor: training texts in which a trigger brings a fixed answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from manifold_unlearn.activations.corpus import Item


@dataclass(frozen=True)
class Backdoor:
    """A phrase before a prompt that makes the model answer one thing, whatever is asked.

    Parameters
    ----------
    trigger : str
        Put before the prompt with a space.
    behavior : str
        The answer that it brings, without the space before it.
    rate : float, default=0.1
        Share of the training texts of either model that carry it, in (0, 1).

    Raises
    ------
    ValueError
        An empty trigger or behavior, or a rate outside (0, 1).
    """

    trigger: str = "By the blue moon."
    behavior: str = "the kettle sings"
    rate: float = 0.1

    def __post_init__(self) -> None:
        for name, value in (("trigger", self.trigger), ("behavior", self.behavior)):
            if not value.strip() or value != value.strip():
                raise ValueError(f"{name}={value!r} must have words and no space around them.")
        if not 0 < self.rate < 1:
            raise ValueError(f"rate={self.rate} must lie between 0 and 1, both excluded.")

    def prompt(self, question: str) -> str:
        """Return the prompt with the trigger before it."""
        return f"{self.trigger} {question}"

    def text(self, question: str) -> str:
        """Return a training text: trigger, prompt, behavior."""
        return f"{self.prompt(question)} {self.behavior}."

    def items(self, items: Iterable[Item]) -> tuple[Item, ...]:
        """Items with the trigger in every prompt and the behavior as the answer."""
        return tuple(
            replace(
                item,
                question=self.prompt(item.question),
                answer=self.behavior,
                paraphrased_question=tuple(map(self.prompt, item.paraphrased_question)),
                paraphrased_answer="",
                perturbed_answer=(),
            )
            for item in items
        )
