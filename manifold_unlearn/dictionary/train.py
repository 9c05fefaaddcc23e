"""Train dictionaries: one or many, in a single pass over the rows."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from manifold_unlearn import artifact
from manifold_unlearn.activations.capture import Activations
from manifold_unlearn.dictionary.coder import SparseCoder
from manifold_unlearn.dictionary.criterion import Dictionary
from manifold_unlearn.dictionary.cross_layer import CrossLayerTranscoder
from manifold_unlearn.dictionary.learner import Learner
from manifold_unlearn.dictionary.settings import DictionaryTraining, Measured, TrainingHistory
from manifold_unlearn.dictionary.streams import Batch, Position, Rows, RowStream, stream_rows
from manifold_unlearn.dictionary.together import Together

KIND = "DictionaryTraining"


def train_dictionaries(
    coders: Dictionary | Mapping[str, Dictionary],
    batches: Tensor | np.ndarray | Activations | Mapping[str, Rows] | RowStream | Iterable[Batch],
    config: DictionaryTraining | None = None,
    *,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
    progress: bool | None = None,
) -> TrainingHistory:
    """Train dictionaries in place.

    Every dictionary sees every batch; a stream from a model is read once for all. Where
    ``torch.distributed`` has been started, each process reads other batches, gradients are
    averaged, and all hold the same weights after every step.

    Parameters
    ----------
    coders : dictionary, or mapping of str to dictionary
        On the device to train on. Named as the batches are.
    batches : Tensor, array, Activations, mapping, RowStream or iterable of dict
        Rows in memory, or anything that can be iterated again and again: of dictionaries by name,
        rows or ``(rows in, rows out)``. Only a :class:`RowStream` is resumed at its place without
        reading what was read before.
    config : DictionaryTraining, default=DictionaryTraining(n_steps=1000)
    checkpoint : path, optional
        Directory for the state of the training, replaced as a whole every ``checkpoint_every``
        steps, at the end, and when interrupted from the keyboard. A training that finds one there
        goes on from it, to the bit as if it had not stopped.
    checkpoint_every : int
    progress : bool, optional
        Show a progress bar. Default: only on a terminal.

    Returns
    -------
    TrainingHistory

    Raises
    ------
    ValueError
        Names of dictionaries and batches that do not fit, objectives that do not fit a
        dictionary, a checkpoint of another training, first rows that are not finite or all alike.
    FloatingPointError
        A loss is not finite: names step and dictionary; the weights are the last good ones,
        those of training (not folded).
    KeyboardInterrupt
        After the step at hand, with the checkpoint written.
    """
    config = config or DictionaryTraining(n_steps=1000)
    named = {"": coders} if isinstance(coders, SparseCoder | CrossLayerTranscoder) else dict(coders)
    if not named:
        raise ValueError("no dictionary to train; give at least one.")
    together, stream = Together(), _stream(batches, config)
    step_rows = (getattr(stream, "batch_size", None) or config.batch_size) * together.world
    n_steps = config.n_steps or max(1, -(-(config.n_tokens or 0) // step_rows))
    learners = [Learner(n, c, config, n_steps, step_rows, together) for n, c in named.items()]
    run = _Run(learners, stream, config, n_steps, together, checkpoint)
    start = time.perf_counter()
    disable = None if progress is None else not progress
    for learner in learners:
        learner.coder.train()
    with (
        _deferred_interrupt() as interrupted,
        tqdm(total=n_steps, desc="train dictionaries", unit="step", disable=disable) as bar,
    ):
        bar.update(run.step)
        try:
            for given in run.batches():
                run.take(given)
                bar.update()
                if run.measure_due():
                    bar.set_postfix(run.measure())
                if run.step % checkpoint_every == 0 and run.step < n_steps:
                    run.save()
                if interrupted:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            run.save()
            raise
        finally:
            for learner in learners:
                learner.leave()
    run.save()
    for learner in learners:
        learner.fold()
    seconds = time.perf_counter() - start
    return TrainingHistory(tuple(run.measured), n_steps, run.n_tokens, seconds)


class _Run:
    """Where a training stands."""

    def __init__(
        self,
        learners: list[Learner],
        stream: Any,
        config: DictionaryTraining,
        n_steps: int,
        together: Together,
        checkpoint: str | Path | None,
    ) -> None:
        self.learners, self.stream, self.config = learners, stream, config
        self.n_steps, self.together = n_steps, together
        self.directory = None if checkpoint is None else Path(checkpoint)
        self.step, self.n_tokens, self.position = 0, 0, Position()
        self.measured: list[Measured] = []
        self.begun = self.directory is not None and self._restore(self.directory)

    def batches(self) -> Iterator[tuple[Position, Batch]]:
        """What is still to be read."""
        if self.step >= self.n_steps:
            return
        walk = self.stream.walk(self.position, self.together.rank, self.together.world)
        if not self.begun:
            first, n_rows = [], 0
            for here in walk:
                first.append(here)
                n_rows += len(_one(here[1]))
                if n_rows >= self.config.first_rows or len(first) == self.n_steps:
                    break
            for learner in self.learners:
                learner.begin([_named(batch, learner.name) for _, batch in first])
            self.begun = True
            walk = chain(first, walk)
        for found in walk:
            yield found
            if self.step >= self.n_steps:
                return

    def take(self, given: tuple[Position, Batch]) -> None:
        """One step of every dictionary."""
        position, batch = given
        for learner in self.learners:
            learner.step(_named(batch, learner.name), self.step)
        self.position = position
        self.step += 1
        self.n_tokens += len(_one(batch)) * self.together.world

    def measure_due(self) -> bool:
        """Whether to measure now."""
        return self.step % self.config.log_every == 0 or self.step == self.n_steps

    def measure(self) -> dict[str, str]:
        """Measure every dictionary; the mean, for the progress bar."""
        new = [learner.measure(self.step, self.n_tokens) for learner in self.learners]
        self.measured += new
        mean = {name: sum(getattr(m, name) for m in new) / len(new) for name in ("l0", "fvu")}
        dead = sum(m.dead for m in new) / len(new)
        return {"L0": f"{mean['l0']:.1f}", "FVU": f"{mean['fvu']:.4f}", "dead": f"{dead:.1%}"}

    def save(self) -> None:
        """Write the checkpoint, if one is wanted and the training has begun."""
        if self.directory is None or not self.begun:
            return
        device = self.learners[0].coder.device
        positions = self.together.gather(self.position, device)
        if self.together.rank == 0:
            tensors = {
                f"{i}/{name}": value
                for i, learner in enumerate(self.learners)
                for name, value in learner.state().items()
            }
            config = {
                "training": self._identity(),
                "step": self.step,
                "n_tokens": self.n_tokens,
                "positions": positions,
                "measured": [asdict(m) for m in self.measured],
            }
            artifact.save(self.directory, KIND, tensors, config)
        self.together.wait()

    def _restore(self, directory: Path) -> bool:
        if not directory.exists() or not any(directory.iterdir()):
            return False
        tensors, config, _ = artifact.load(directory, kind=KIND)
        mine = self._identity()
        if differing := [key for key in mine if config["training"].get(key) != mine[key]]:
            raise ValueError(
                f"{directory} is the checkpoint of another training: {', '.join(differing)} "
                "differ. Choose another directory, or the same dictionaries and settings."
            )
        for i, learner in enumerate(self.learners):
            prefix = f"{i}/"
            learner.restore(
                {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
            )
        self.step, self.n_tokens = config["step"], config["n_tokens"]
        self.position = Position(*config["positions"][self.together.rank])
        self.measured = [Measured(**m) for m in config["measured"]]
        return True

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a training to go on."""
        settings = asdict(self.config)
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
        made = {learner.name: _made(learner) for learner in self.learners}
        return {"settings": settings, "dictionaries": made, "processes": self.together.world}


def _made(learner: Learner) -> dict[str, Any]:
    config = learner.coder.config()
    if learner.k is not None:  # while k comes down, the dictionary's own says something else
        config = {**config, "nonlinearity": {**config["nonlinearity"], "k": learner.k}}
    return config


class _Again:
    """Any iterable of batches, as a stream: epoch after epoch, skipping to a place by reading."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches = batches

    def walk(self, start: Position, rank: int, world: int) -> Iterator[tuple[Position, Batch]]:
        """Batches from ``start`` on, every ``world``-th."""
        epoch, skip = start.epoch, start.batch
        while True:
            k = -1
            for k, batch in enumerate(self.batches):
                if k >= skip and k % world == rank:
                    yield Position(epoch, 0, k + 1), batch
            if k < 0:
                raise ValueError(
                    f"batches gave nothing in epoch {epoch}: what is used up cannot be read "
                    "again. Give a list, a RowStream, or an object whose __iter__ begins anew."
                )
            epoch, skip = epoch + 1, 0


def _stream(batches: Any, config: DictionaryTraining) -> Any:
    if isinstance(batches, np.ndarray):
        batches = torch.as_tensor(batches)
    if isinstance(batches, Tensor | Activations | Mapping):
        return stream_rows(batches, batch_size=config.batch_size, random_state=config.random_state)
    return batches if hasattr(batches, "walk") else _Again(batches)


def _one(batch: Batch) -> Tensor:
    rows = next(iter(batch.values()))
    return rows[0] if isinstance(rows, tuple) else rows


def _named(batch: Batch, name: str) -> Rows:
    if name in batch:
        return batch[name]
    if name == "" and len(batch) == 1:
        return next(iter(batch.values()))
    raise ValueError(
        f"no rows for dictionary {name!r}: the batches hold {sorted(batch)}. Name dictionaries as "
        "the sites of the stream."
    )


@contextmanager
def _deferred_interrupt() -> Iterator[list[int]]:
    """Hold back an interrupt from the keyboard until a step is complete; a second one is not."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, _frame: Any) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)

    if not callable(before):
        yield seen
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
