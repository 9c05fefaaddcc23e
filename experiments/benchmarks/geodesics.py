"""Are distances along a manifold right to one percent, at no more than Isomap's cost?

Fits every method and scikit-learn's Isomap to the same samples of manifolds whose distances are
known, and writes errors and CPU seconds side by side, with the claims they decide.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from sklearn.manifold import Isomap

from manifold_unlearn import artifact
from manifold_unlearn.manifold import samples
from manifold_unlearn.manifold.geodesic import GeodesicMap

RESULTS = Path(__file__).parents[1] / "results" / "geodesics"
COMMAND = "python experiments/benchmarks/geodesics.py --preset {}"
RIVAL = "scikit-learn Isomap"


@dataclass(frozen=True)
class Config:
    """One run."""

    preset: str
    seeds: int
    n_samples: int = 5000
    n_samples_landmarks: int = 20000
    n_landmarks: int = 400
    n_features: int = 128
    n_neighbors: int = 12  # of every library
    n_rows: int = 500  # whose distances to all are compared
    n_threads: int = 1  # so that CPU seconds count work, not waiting


PRESETS = {"quick": Config("quick", seeds=1), "full": Config("full", seeds=3)}

SAMPLES: dict[str, Callable[..., samples.ManifoldSample]] = {
    "sphere": lambda n, **options: samples.sphere(n, **options),
    "swiss roll": lambda n, **options: samples.swiss_roll(n, **options),
    "swiss roll, noise .1": lambda n, **options: samples.swiss_roll(n, noise=0.1, **options),
}


def isomap(X: np.ndarray, rows: np.ndarray, config: Config) -> np.ndarray:
    return Isomap(n_neighbors=config.n_neighbors).fit(X).dist_matrix_[rows]


def ours(method: str, n_landmarks: int | None = None) -> Callable[..., np.ndarray]:
    def distances(X: np.ndarray, rows: np.ndarray, config: Config):
        fitted = GeodesicMap(
            n_neighbors=config.n_neighbors, method=method, n_landmarks=n_landmarks
        ).fit(X)
        if n_landmarks is not None:
            return fitted.landmark_indices_, fitted.landmark_distances_
        return fitted.geodesic_distances()[rows]

    return distances


def measure(name: str, seed: int, library: str, config: Config, n_landmarks: int | None) -> dict:
    n_samples = config.n_samples if n_landmarks is None else config.n_samples_landmarks
    sample = SAMPLES[name](n_samples, n_features=config.n_features, random_state=seed)
    rows = np.random.default_rng(seed).choice(n_samples, config.n_rows, replace=False)
    find = isomap if library == RIVAL else ours(library, n_landmarks)
    before = time.process_time()
    found = find(sample.points, rows, config)
    seconds = time.process_time() - before
    if n_landmarks is not None:
        rows, found = found
    exact = sample.geodesic_distances(rows)
    error = found[exact > 0] / exact[exact > 0] - 1
    return {
        "sample": f"{name}, {n_samples} x {config.n_features}",
        "seed": seed,
        "library": library,
        "n_landmarks": n_landmarks,
        "cpu_seconds": seconds,
        "median_error": float(np.median(np.abs(error))),
        "bias": float(error.mean()),
        "quantile_95": float(np.quantile(np.abs(error), 0.95)),
    }


def claims(rows: list[dict], command: str) -> list[dict]:
    made = []
    for row in rows:
        if row["library"] == RIVAL:
            continue
        target = 0.01 if row["n_landmarks"] is None else 0.02
        text = f"{row['sample']}, seed {row['seed']}, {row['library']}"
        text += "" if row["n_landmarks"] is None else f", {row['n_landmarks']} landmarks"
        value = row["median_error"]
        made.append((f"{text}: median relative error", value, f"<= {target}", value <= target))
        rivals = [
            r["cpu_seconds"]
            for r in rows
            if r["library"] == RIVAL and (r["sample"], r["seed"]) == (row["sample"], row["seed"])
        ]
        if rivals:
            value = row["cpu_seconds"] / rivals[0]
            made.append((f"{text}: CPU over Isomap's", value, "<= 1", value <= 1))
    return [
        {"claim": c, "value": v, "target": t, "holds": bool(h), "command": command}
        for c, v, t, h in made
    ]


def run(config: Config) -> dict:
    began = time.perf_counter()
    torch.set_num_threads(config.n_threads)
    warm = samples.sphere(300, random_state=0).points
    for library in ("graph", "tangent", "heat"):
        ours(library)(warm, np.arange(3), config)  # imports and caches apart
    isomap(warm, np.arange(3), config)
    rows = [
        measure(name, seed, library, config, None)
        for name in SAMPLES
        for seed in range(config.seeds)
        for library in (RIVAL, "tangent", "graph", "heat")
    ]
    rows += [
        measure(name, seed, "tangent", config, config.n_landmarks)
        for name in SAMPLES
        for seed in range(config.seeds)
    ]
    packages = ("numpy", "scipy", "scikit-learn", "torch")
    return {
        "config": asdict(config),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "seconds": time.perf_counter() - began,
        "rows": rows,
        "claims": claims(rows, COMMAND.format(config.preset)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    config = PRESETS[parser.parse_args().preset]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run(config)
    artifact.write_json(RESULTS / f"{config.preset}.json", result)
    for row in result["rows"]:
        figures = [f"{row[k]:.4f}" for k in ("median_error", "bias", "quantile_95", "cpu_seconds")]
        print(row["sample"], row["library"], *figures)
    for claim in result["claims"]:
        print("holds" if claim["holds"] else "FAILS", f"{claim['value']:.4g}", claim["claim"])


if __name__ == "__main__":
    # threads of BLAS are fixed when it is loaded: start again with one, see Config.n_threads
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
        import sys

        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
