"""Claim: a TopK dictionary trains at least 1.3 times as fast as with its peers, and no worse.

Every library trains on the same rows in the same order at the same learning rate, in a process of
its own; a few steps each in turn, in alternating order, so that all share the machine's moods.
Peers run in interpreters of their own (``--peer-python sparsify=/path/python saelens=...``); one
that is not given or cannot be imported is "not run". No latent counts as dead in so few tokens, so
that no library computes an auxiliary loss. Rows are sparse sums of planted directions with uneven
frequencies, plus noise.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from cli_from_dataclass import parse, write

COMMAND = "python experiments/benchmarks/dictionary_training.py --preset {} --peer-python ..."
PEERS = {"sparsify": "sparsify", "saelens": "saelens", "saelens_sparse": "saelens"}
"""Trainer by name, and the peer whose interpreter runs it."""
FASTER = 1.3


@dataclass(frozen=True)
class Config:
    """What is timed."""

    d_in: int = 768
    d_sae: int = 6144
    k: int = 32
    batch: int = 1024
    rounds: int = 8
    """Turns of each library."""
    steps: int = 5
    """Steps a turn; the first turn warms up and is not counted."""
    lr: float = 1e-3
    threads: int = 1
    seed: int = 0
    peer_python: tuple[str, ...] = ()
    """NAME=PATH of the interpreters that hold the peers."""


PRESETS = {"quick": Config(), "full": Config(rounds=41, steps=25, threads=2)}


def planted(config: Config, n_rows: int, seed: int) -> np.ndarray:
    """Rows (n_rows, d_in), mean norm sqrt(d_in)."""
    world, draw = np.random.default_rng(config.seed), np.random.default_rng(seed)
    n_true = 2 * config.d_sae
    directions = world.standard_normal((n_true, config.d_in)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    often = 1 / np.arange(1, n_true + 1) ** 0.7
    often /= often.sum()
    n_on = 32
    rows = np.zeros((n_rows, config.d_in), dtype=np.float32)
    for _ in range(n_on):
        which = draw.choice(n_true, n_rows, p=often)
        strength = draw.exponential(1.0, (n_rows, 1)).astype(np.float32) + 0.3
        rows += strength * directions[which]
    rows += 0.05 * draw.standard_normal(rows.shape).astype(np.float32)
    return rows * np.float32(config.d_in**0.5 / np.linalg.norm(rows, axis=1).mean())


class Trainer:
    """A library in its process."""

    def __init__(self, name: str, python: str, job: Path) -> None:
        script = Path(__file__).with_name("dictionary_trainers.py")
        self.name, self.log = name, job.with_name(f"{name}.log").open("w+")
        self.process = subprocess.Popen(
            [python, str(script), name, str(job)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
        )  # fmt: skip
        self.about = self.read()

    def read(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.log.seek(0)
        raise SystemExit(
            f"{self.name} ended with {self.process.wait()}:\n{self.log.read()[-2000:]}"
        )

    def ask(self, command: str) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.read()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def run(config: Config, preset: str) -> dict:
    start = time.perf_counter()
    pythons = dict(word.split("=", 1) for word in config.peer_python)
    n_steps = config.rounds * config.steps
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.npy" for name in ("rows", "held_out")}
        np.save(paths["rows"], planted(config, n_steps * config.batch, config.seed + 1))
        np.save(paths["held_out"], planted(config, 4096, config.seed + 2))
        job = Path(folder) / "job.json"
        files = {name: str(path) for name, path in paths.items()}
        job.write_text(json.dumps({**asdict(config), **files, "n_steps": n_steps}))
        trainers = [Trainer("ours", sys.executable, job)]
        rows = []
        for name, peer in PEERS.items():
            if peer in pythons:
                trainers.append(Trainer(name, pythons[peer], job))
            else:
                rows.append({"name": name, "not_run": "no interpreter given"})
        rows += [{"name": t.name, **t.about} for t in trainers if "not_run" in t.about]
        trainers = [t for t in trainers if "not_run" not in t.about]
        found: dict[str, list[dict]] = {t.name: [] for t in trainers}
        for turn in range(config.rounds):
            for trainer in list(trainers[:: -1 if turn % 2 else 1]):
                told = trainer.ask(str(config.steps))
                if "not_run" in told:
                    rows.append({"name": trainer.name, **trainer.about, **told})
                    trainers.remove(trainer)
                found[trainer.name].append(told)
        rows += [row_of(trainer, found[trainer.name], config) for trainer in trainers]
        for trainer in trainers:
            trainer.end()
    return {
        "config": {**asdict(config), "peer_python": sorted(pythons)},
        "seconds": time.perf_counter() - start,
        "rows": rows,
        "claims": claims(rows, COMMAND.format(preset)),
    }


def row_of(trainer: Trainer, turns: list[dict], config: Config) -> dict:
    cpu, wall = (np.array([t[key] for t in turns[1:]]) / config.steps for key in ("cpu", "wall"))
    return {
        "name": trainer.name, **trainer.about,
        "cpu_seconds_a_step": float(np.median(cpu)), "least_cpu_seconds_a_step": float(cpu.min()),
        "wall_seconds_a_step": float(np.median(wall)),
        "cpu_seconds_of_turns": cpu.round(4).tolist(),
        "rows_a_cpu_second": float(config.batch / np.median(cpu)),
        "peak_mib": turns[-1]["peak_mib"], "tokens": config.rounds * config.steps * config.batch,
        "fvu": trainer.ask("judge")["fvu"],
    }  # fmt: skip


def claims(rows: list[dict], command: str) -> list[dict]:
    done = {row["name"]: row for row in rows if "not_run" not in row}
    mine, made = done["ours"], []
    for name in PEERS:
        if name not in done:
            continue
        ratios = np.divide(done[name]["cpu_seconds_of_turns"], mine["cpu_seconds_of_turns"])
        ratio = float(np.median(ratios))
        worse = mine["fvu"] - done[name]["fvu"]
        memory = mine["peak_mib"] / done[name]["peak_mib"]
        made += [
            (f"CPU time of a step: {name} over ours", ratio, FASTER, ratio >= FASTER),
            (f"FVU after equal tokens: ours less {name}'s", worse, 0.0, worse <= 0),
            (f"peak memory: ours over {name}'s", memory, 1.0, memory <= 1),
        ]
    return [{"claim": c, "value": v, "target": t, "holds": bool(h), "command": command}
            for c, v, t, h in made]  # fmt: skip


if __name__ == "__main__":
    preset, config = parse(PRESETS, __doc__)
    print(write("dictionary_training", preset, run(config, preset)))
