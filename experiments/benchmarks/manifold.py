"""Is the geometry as accurate as the best peer, at less cost than any?

Every measurement runs in a fresh process: imports and compilers are warmed up on a part of the data
and reported apart; then CPU seconds (user and system), the increase of peak memory, and accuracy
against the manifold's analytic truth. Libraries alternate; repeats give the least, the median and
the largest. A library that is not installed is "not run", a failure is counted.

    python experiments/benchmarks/manifold.py --preset quick --only diffusion geodesics \
        --libraries ours pydiffmap --peer-python datafold=envs/datafold/bin/python

Results are merged into the preset's file by (section, case, seed, library, method, device).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from cli_from_dataclass import environment, parse
from geometry.claims import claims
from geometry.measurements import SECTIONS, Case
from geometry.table import lines

from manifold_unlearn import artifact

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "manifold"
COMMAND = "python experiments/benchmarks/manifold.py --preset {}"
KEY = ("section", "case", "seed", "library", "method", "device")


@dataclass(frozen=True)
class Config:
    """What is measured, and how often."""

    seeds: int = 3
    """Samples of every known manifold that our maps are fitted to."""
    rival_seeds: int = 1
    """Of them fitted by the peers too; one less of those with noise."""
    dimension_seeds: int = 1
    """Samples of every sphere whose dimension is estimated."""
    neighbor_sizes: tuple[str, ...] = ("10000x768",)
    compiled_on: tuple[str, ...] = ("power law",)
    """Data on which libraries are measured that compile for a minute first."""
    fit_sizes: tuple[str, ...] = ("2000x128", "10000x128", "10000x768")
    slow_peer_sizes: tuple[str, ...] = ("2000x128",)
    """Those of them to which datafold and scanpy are fitted."""
    geodesic_rows: tuple[int, ...] = (5000, 20000)
    repeats: int = 2
    """Fresh processes a measurement of cost is made in; accuracy alone is measured once a seed."""
    geodesic_repeats: int = 1
    patience: float = 15.0
    """CPU seconds, with imports and warm-up, from which a measurement is not repeated."""
    timeout: float = 120.0
    """CPU seconds after which a measurement counts as failed; of wall time, four times as many."""
    memory_gib: float = 16.0
    """Memory beyond which a measurement fails; less where less is free."""
    n_threads: int = 1
    """Of every library: CPU seconds then count work, not waiting."""
    only: tuple[str, ...] = ()
    """Sections to run; default all."""
    cases: tuple[str, ...] = ()
    """Parts of names of cases to run; default all."""
    libraries: tuple[str, ...] = ()
    """Libraries to run; default all."""
    device: tuple[str, ...] = ("cpu",)
    """cpu, cuda or both; on cuda wall seconds count, and only libraries that use it run."""
    peer_python: tuple[str, ...] = ()
    """NAME=PATH: the Python that runs a peer; NAME all for every peer not named."""


PRESETS = {
    "quick": Config(),
    "full": Config(
        seeds=10,
        rival_seeds=3,
        dimension_seeds=5,
        neighbor_sizes=("10000x768", "50000x768"),
        compiled_on=("clusters", "power law", "roll"),
        fit_sizes=("2000x128", "10000x128", "10000x768", "50000x768"),
        slow_peer_sizes=("2000x128", "10000x128", "10000x768"),
        repeats=5,
        geodesic_repeats=3,
        patience=200.0,
        timeout=1800.0,
    ),
}
ON_CUDA = {"ours", "gemm", "faiss", "torchdr"}


def words(values: tuple[str, ...]) -> list[str]:
    """Entries given with spaces, commas or both."""
    return [word for value in values for word in value.split(",") if word]


def chosen_cases(config: Config) -> list[Case]:
    sections = words(config.only) or list(SECTIONS)
    if unknown := sorted(set(sections) - set(SECTIONS)):
        raise SystemExit(f"--only names {unknown}; there are {list(SECTIONS)}.")
    made = [case for name in sections for yielder in SECTIONS[name] for case in yielder(config)]
    known = {library for case in made for library in case.methods}
    if unknown := sorted(set(words(config.libraries)) - known):
        raise SystemExit(f"--libraries names {unknown}; there are {sorted(known)}.")
    return [c for c in made if not config.cases or any(part in c.name for part in config.cases)]


class Bench:
    """Runs measurements one by one in processes of their own."""

    def __init__(self, config: Config, directory: Path) -> None:
        self.config, self.directory = config, directory
        self.pythons = dict(word.split("=", 1) for word in words(config.peer_python))
        for name, path in self.pythons.items():
            if not Path(path).is_file():
                raise SystemExit(f"--peer-python {name}={path}: no such file.")
        self.versions: dict[str, str] = {}
        self.run = datetime.now(UTC).isoformat(timespec="seconds")
        self.not_run: dict[tuple[str, str], str] = {}

    def python(self, library: str) -> str:
        if library in ("ours", "gemm"):
            return sys.executable
        return self.pythons.get(library, self.pythons.get("all", sys.executable))

    def measure(self, case: Case) -> list[dict]:
        """One row for each library, method and device."""
        asked = words(self.config.libraries)
        runs = [(library, method, device) for device in words(self.config.device)
                for library, methods in case.methods.items() for method in methods
                if (not asked or library in asked or library == "gemm")
                and (device == "cpu" or library in ON_CUDA)]  # fmt: skip
        if not runs:
            return []
        arrays, judge = case.make()
        data = self.directory / "data.npz"
        np.savez(data, **arrays)
        found: dict[tuple, list[dict]] = {one: [] for one in runs}
        for repeat in range(self.repeats(case)):
            for one in runs[:: -1 if repeat % 2 else 1]:
                if self.worth_repeating(found[one]):
                    found[one].append(self.child(case, one, data, judge))
        return [self.row(case, one, reports) for one, reports in found.items()]

    def repeats(self, case: Case) -> int:
        if case.section == "geodesics":
            return self.config.geodesic_repeats
        cost = case.section == "neighbors" or case.name.startswith("cost")
        return self.config.repeats if cost else 1

    def worth_repeating(self, reports: list[dict]) -> bool:
        if not reports:
            return True
        if "not_run" in reports[-1] or "timed_out" in reports[-1]:
            return False
        spent = sum(reports[-1].get(name, 0.0) for name in ("cpu_seconds", "warmup_cpu_seconds"))
        return spent < self.config.patience

    def child(self, case: Case, one: tuple, data: Path, judge: Any) -> dict:
        library, method, device = one
        if (library, device) in self.not_run:
            return {"not_run": self.not_run[library, device]}
        paths = {name: self.directory / name for name in ("job.json", "report.json", "answer.npz")}
        for path in paths.values():
            path.unlink(missing_ok=True)
        job = {"task": case.task, "library": library, "method": method, "device": device,
               "data": str(data), "report": str(paths["report.json"]),
               "answer": str(paths["answer.npz"]), "memory_gib": self.config.memory_gib,
               "timeout": self.config.timeout,
               **({"shape": case.options["shape"]} if case.task == "gemm" else
                  {"options": dict(case.options)})}  # fmt: skip
        paths["job.json"].write_text(json.dumps(job))
        command = [self.python(library), str(HERE / "geometry/child.py"), str(paths["job.json"])]
        limits = {"timeout": 4 * self.config.timeout, "env": self.environment(library)}
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, **limits)
        except subprocess.TimeoutExpired:
            late = True
        else:
            late = done.returncode == -signal.SIGXCPU
        if late:
            error = f"not done after {self.config.timeout:.0f} CPU seconds"
            return {"error": error, "timed_out": True}
        if not paths["report.json"].is_file():
            last = (done.stderr.strip().splitlines() or [""])[-1]
            return {"error": f"ended with code {done.returncode} {last}"[:300]}
        report = json.loads(paths["report.json"].read_text())
        if "not_run" in report:
            if "No module named" in report["not_run"] and "manifold_" not in report["not_run"]:
                self.not_run[library, device] = report["not_run"]
            return report
        if "error" in report:
            return report
        self.versions[library] = report["version"]
        with np.load(paths["answer.npz"]) as file:
            answer = {name: file[name] for name in file.files}
        try:
            return report["cost"] | judge(answer)
        except Exception as error:  # an answer that cannot be judged is a failure too
            return {"error": f"{type(error).__name__}: {error}"[:300]}

    def environment(self, library: str) -> dict[str, str]:
        n = str(self.config.n_threads)
        names = ("OMP", "OPENBLAS", "MKL", "NUMBA", "NUMEXPR", "VECLIB_MAXIMUM")
        made = os.environ | {f"{name}_NUM_THREADS": n for name in names}
        made.pop("PYTHONPATH", None)
        if library == "ours":
            made["PYTHONPATH"] = str(HERE.parents[1])
        return made

    def row(self, case: Case, one: tuple, reports: list[dict]) -> dict:
        row: dict[str, Any] = {"section": case.section, "case": case.name, "seed": case.seed,
                               **dict(zip(("library", "method", "device"), one, strict=True)),
                               "run": self.run}  # fmt: skip
        if "not_run" in reports[-1]:
            return row | {"not_run": reports[-1]["not_run"]}
        good = [report for report in reports if "error" not in report]
        row |= {"repeats": len(reports), "failures": len(reports) - len(good)}
        if len(good) < len(reports):
            row["error"] = next(r["error"] for r in reports if "error" in r)
        for name in good[0] if good else ():
            values = [report[name] for report in good]
            if name.endswith("_seconds"):
                row[name] = min(values)
                if len(values) > 1 and not name.startswith("warmup"):
                    row[f"{name}_median"] = float(np.median(values))
                    row[f"{name}_max"] = max(values)
            elif name == "gflops":
                row[name] = max(values)
            else:  # memory and accuracy: the median of the repeats
                row[name] = float(np.median(values))
        return row


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """Rows of both by key, the new ones in place of the old."""
    rows = {tuple(row[name] for name in KEY): row for row in old}
    rows |= {tuple(row[name] for name in KEY): row for row in new}
    return list(rows.values())


def earlier(preset: str) -> dict:
    """What the preset's file holds."""
    path = RESULTS / f"{preset}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def run(config: Config, preset: str) -> dict:
    """Measure, and write after every case, so that what was interrupted goes on where it was."""
    began = time.perf_counter()
    result = earlier(preset)
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(config, Path(directory))
        for case in chosen_cases(config):
            rows = bench.measure(case)
            for line in lines(rows, result.get("rows", [])):
                print(line, flush=True)
            seconds = time.perf_counter() - began
            result = whole(config, preset, earlier(preset), rows, bench, seconds)
            artifact.write_json(RESULTS / f"{preset}.json", result)
    return result


def whole(
    config: Config, preset: str, before: dict, fresh: list[dict], bench: Bench, seconds: float
) -> dict:
    """The preset's file with the rows ``fresh`` in it."""
    rows = merged(before.get("rows", []), fresh)
    chosen = {"only", "cases", "libraries", "peer_python"}
    around = environment()
    one = {"seconds": seconds, "git": around["versions"].pop("git")}
    runs = before.get("runs", {}) | {bench.run: one}
    runs = {run: runs[run] for run in sorted({row["run"] for row in rows})}
    return {
        "config": {name: value for name, value in asdict(config).items() if name not in chosen},
        "versions": before.get("versions", {}) | around["versions"] | bench.versions,
        "hardware": around["hardware"] | {"cpus": os.cpu_count(), "threads": config.n_threads},
        "seconds": sum(one["seconds"] for one in runs.values()),
        "runs": runs,
        "rows": rows,
        "claims": claims(rows, COMMAND.format(preset)),
    }


def main() -> None:
    preset, config = parse(PRESETS, __doc__)
    for claim in run(config, preset)["claims"]:
        word = "holds" if claim["holds"] else "FAILS" if claim["value"] is not None else "not run"
        value = "" if claim["value"] is None else f"{claim['value']:.4g} "
        print(f"{word:8}{claim['claim']}: {value}(target {claim['target']})")


if __name__ == "__main__":
    main()
