"""One library's training in a process of its own: ``python dictionary_trainers.py NAME JOB.json``.

Reads commands, a line each, and answers in JSON: a number trains so many steps, ``judge`` measures
the held-out rows, an empty line ends. Needs nothing but torch, numpy and the library.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

FIRST = 4096
"""Rows that a library may look at before it begins: ours do by default."""

Step = Callable[[torch.Tensor], None]
Rebuild = Callable[[torch.Tensor], torch.Tensor]


def ours(job: dict, first: torch.Tensor) -> tuple[Step, Rebuild, str]:
    """This package, as ``train_dictionaries`` calls it."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from manifold_unlearn.dictionary import DictionaryTraining, SparseAutoencoder
    from manifold_unlearn.dictionary.learner import Learner
    from manifold_unlearn.dictionary.together import Together

    shape = {"name": "topk", "k": job["k"]}
    sae = SparseAutoencoder(job["d_in"], job["d_sae"], shape, random_state=job["seed"])
    config = DictionaryTraining(
        n_steps=job["n_steps"], lr=job["lr"], warmup=0.0, decay=0.0, dead_after=10_000_000
    )
    learner = Learner("", sae.train(), config, job["n_steps"], job["batch"], Together())
    learner.begin([first])
    taken = iter(range(job["n_steps"]))

    def rebuild(rows: torch.Tensor) -> torch.Tensor:
        return sae(rows * learner.scale_in) / learner.scale_out

    return lambda rows: learner.step(rows, next(taken)), rebuild, "this repository"


def sparsify(job: dict, first: torch.Tensor) -> tuple[Step, Rebuild, str]:
    """Its coder and the steps of its trainer, with the fused Adam."""
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=job["d_sae"], k=job["k"])
    sae = SparseCoder(job["d_in"], config)
    sae.b_dec.data = first.mean(0)
    optimizer = torch.optim.Adam(sae.parameters(), lr=job["lr"], fused=True)
    silent = torch.zeros(job["d_sae"], dtype=torch.int64)

    def step(rows: torch.Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        found = sae(rows)
        silent.add_(len(rows))
        silent[found.latent_indices.flatten()] = 0
        found.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda rows: sae(rows).sae_out, metadata.version("eai-sparsify")


def saelens(job: dict, first: torch.Tensor, sparse: bool = False) -> tuple[Step, Rebuild, str]:
    """Its trainer, with the fused Adam."""
    from sae_lens.config import LoggingConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer, SAETrainerConfig

    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=job["d_in"], d_sae=job["d_sae"], k=job["k"], use_sparse_activations=sparse
        )
    )
    sae.b_dec.data = first.mean(0)
    config = SAETrainerConfig(
        total_training_samples=job["n_steps"] * job["batch"],
        train_batch_size_samples=job["batch"],
        lr=job["lr"],
        lr_end=job["lr"],
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, iter(()))
    trainer.optimizer.param_groups[0]["fused"] = True
    trainer.optimizer.param_groups[0]["foreach"] = False
    trainer.optimizer.defaults["fused"] = True

    def step(rows: torch.Tensor) -> None:
        trainer._train_step(sae=sae, sae_in=rows)
        trainer.n_training_steps += 1

    return step, lambda rows: sae(rows), metadata.version("sae-lens")


TRAINERS = {
    "ours": ours,
    "sparsify": sparsify,
    "saelens": saelens,
    "saelens_sparse": lambda job, first: saelens(job, first, sparse=True),
}


def memory(key: str) -> float:
    """``VmRSS`` or ``VmHWM`` of this process, MiB; NaN where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key)), np.nan)


def answer(**values: Any) -> None:
    sys.__stdout__.write(json.dumps(values) + "\n")
    sys.__stdout__.flush()


def main() -> None:
    name, path = sys.argv[1:]
    sys.stdout = sys.stderr  # what libraries print is no answer
    job = json.loads(Path(path).read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])  # noqa: TID251 - peers draw from the global state
    rows = torch.from_numpy(np.load(job["rows"]))
    held_out = torch.from_numpy(np.load(job["held_out"]))
    try:
        step, rebuild, version = TRAINERS[name](job, rows[:FIRST])
    except ImportError as error:
        answer(not_run=str(error))
        return
    answer(version=version, torch=torch.__version__)
    before, at = memory("VmRSS"), 0
    for line in sys.stdin:
        command = line.strip()
        if not command:
            return
        if command == "judge":
            with torch.no_grad():
                out = torch.cat([rebuild(part) for part in held_out.split(1024)])
            unexplained = (held_out - out).square().sum()
            variance = (held_out - held_out.mean(0)).square().sum()
            answer(fvu=float(unexplained / variance))
            continue
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            for _ in range(int(command)):
                step(rows[at : at + job["batch"]])
                at += job["batch"]
        except (RuntimeError, NotImplementedError) as error:
            answer(not_run=str(error).splitlines()[0][:200])
            return
        answer(
            cpu=time.process_time() - cpu,
            wall=time.perf_counter() - wall,
            peak_mib=memory("VmHWM") - before,
        )


if __name__ == "__main__":
    main()
