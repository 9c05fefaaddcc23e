"""One measurement in a process of its own: ``python child.py JOB.json``.

Reads a job, runs one library's function on a part of the data so that imports and compilers are
done, then measures it on the whole. Writes what it cost to the job's ``report`` and what it
answered to its ``answer``; accuracy is judged by who started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import libraries
import numpy as np

DISTRIBUTION = {"ours": "manifold-unlearn", "plain": "scipy", "scikit_learn": "scikit-learn",
                "faiss": "faiss-cpu", "skdim": "scikit-dimension", "gemm": "torch"}  # fmt: skip
WARM = 600
"""Rows of the warm-up; ``WARM_COMPILED`` for libraries that compile other code for more rows."""
WARM_COMPILED = 5000
COMPILED = {"pynndescent", "scanpy"}
N_AGAIN = 500
"""Fitted rows that are placed as new ones."""


def synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def cpu_seconds() -> float:
    """User and system time of this process and of those it started and waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def resident_mib(key: str) -> float:
    """``VmRSS`` or ``VmHWM`` (its peak) of this process."""
    status = Path("/proc/self/status")
    if not status.is_file():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    line = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def available_gib() -> float:
    """Memory that can be had without pushing anyone out."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return float("inf")
    lines = meminfo.read_text().splitlines()
    return int(next(line for line in lines if "MemAvailable" in line).split()[1]) / 2**20


def forget_peak() -> None:
    """Give freed memory back and let the peak begin anew."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def measured(run: Callable[[], Any], device: str) -> tuple[Any, dict[str, float]]:
    """What ``run`` returns, and its CPU seconds, wall seconds and increase of peak memory."""
    forget_peak()
    resident = resident_mib("VmRSS")
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
    synchronize(device)
    cpu, wall = cpu_seconds(), time.perf_counter()
    answer = run()
    synchronize(device)
    cost = {"cpu_seconds": cpu_seconds() - cpu, "wall_seconds": time.perf_counter() - wall}
    cost["peak_mib"] = max(0.0, resident_mib("VmHWM") - resident)
    if device == "cuda":
        cost["peak_gpu_mib"] = (torch.cuda.max_memory_allocated() - allocated) / 2**20
    return answer, cost


def plain(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def gemm(n_rows: int, n_features: int, n_columns: int, device: str) -> tuple[dict, dict]:
    """Rate of a single-precision product with the shape of one block of distances."""
    import torch

    A = torch.rand(n_rows, n_features, device=device)
    B = torch.rand(n_features, n_columns, device=device)
    out = A @ B
    times = []
    for _ in range(9):
        _, cost = measured(lambda: torch.mm(A, B, out=out), device)
        times.append(cost["cpu_seconds" if device == "cpu" else "wall_seconds"])
    rate = 2e-9 * n_rows * n_features * n_columns / min(times)
    return {}, {"gflops": rate, "cpu_seconds": min(times)}


def neighbors(task: Task) -> tuple[dict, dict]:
    found, cost = task.run(lambda X: task.function(X, task.job))
    return {"indices": plain(found)[task.data["rows"]]}, cost


def diffusion(task: Task) -> tuple[dict, dict]:
    X, new = task.data["X"], task.data.get("new")

    def warm(rows: np.ndarray) -> None:
        first = task.function(rows, task.job)
        if new is not None and first.transform is not None:
            first.transform(new[:50])

    found, cost = task.run(lambda rows: task.function(rows, task.job), warm)
    answer = {"coordinates": plain(found.coordinates)}
    if found.rates is not None:
        answer["rates"] = plain(found.rates)
    if new is not None and found.transform is not None:
        placed, extra = measured(lambda: found.transform(new), task.job.device)
        answer["new"] = plain(placed)
        answer["again"] = plain(found.transform(X[:N_AGAIN]))
        cost |= {f"transform_{name}": value for name, value in extra.items()}
    return answer, cost


def geodesics(task: Task) -> tuple[dict, dict]:
    few = replace(task.job, n_landmarks=task.job.n_landmarks and 50)
    some = np.arange(20)
    distances, cost = task.run(
        lambda X: task.function(X, task.job), lambda X: task.function(X, few)(some, some)
    )
    first, second = task.data["first"], task.data["second"]
    answer, extra = measured(lambda: distances(first, second), task.job.device)
    cost |= {f"query_{name}": value for name, value in extra.items()}
    return {"distances": plain(answer)}, cost


def dimension(task: Task) -> tuple[dict, dict]:
    value, cost = task.run(lambda X: task.function(X, task.job))
    return {"dimension": np.array(value)}, cost


@dataclass(frozen=True)
class Task:
    """One library's function, what it works on, and how much of that warms it up."""

    function: Callable[..., Any]
    job: libraries.Job
    data: dict[str, np.ndarray]
    n_warm: int

    def run(
        self, work: Callable[[np.ndarray], Any], warm: Callable[[np.ndarray], Any] | None = None
    ) -> tuple[Any, dict[str, float]]:
        (warm or work)(self.data["X"][: self.n_warm])
        spent = cpu_seconds()
        answer, cost = measured(lambda: work(self.data["X"]), self.job.device)
        return answer, cost | {"warmup_cpu_seconds": spent}


def run(job: dict) -> dict:
    library, task, device = job["library"], job["task"], job["device"]
    seconds = int(job["timeout"])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    if device == "cpu":
        limit = int(min(job["memory_gib"], 0.8 * available_gib()) * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise libraries.NotOfferedError("no CUDA device")
    if task == "gemm":
        answer, cost = gemm(*job["shape"], device)
    else:
        with np.load(job["data"]) as file:
            data = {name: file[name] for name in file.files}
        function = getattr(libraries, f"{task}_{library}")
        settings = libraries.Job(job["method"], device, **job["options"])
        n_warm = WARM_COMPILED if library in COMPILED else WARM
        answer, cost = globals()[task](Task(function, settings, data, n_warm))
    np.savez(job["answer"], **answer)
    return {"cost": cost, "version": metadata.version(DISTRIBUTION.get(library, library))}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = run(job)
    except (libraries.NotOfferedError, ModuleNotFoundError) as error:
        report = {"not_run": str(error)}
    except Exception as error:  # a failure is a result
        report = {"error": f"{type(error).__name__}: {error}"[:300]}
    Path(job["report"]).write_text(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)  # some libraries hang or crash on the way out


if __name__ == "__main__":
    main()
