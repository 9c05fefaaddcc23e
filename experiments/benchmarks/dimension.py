"""Is the intrinsic dimension right, on spheres and other data, beside scikit-dimension?"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from manifold_unlearn import artifact
from manifold_unlearn.manifold import samples
from manifold_unlearn.manifold.dimension import estimate_dimension

RESULTS = Path(__file__).parents[1] / "results" / "dimension"
COMMAND = "python experiments/benchmarks/dimension.py --preset {}"
PEER = """
import json, sys, time
import numpy as np, skdim.id
X = np.load(sys.stdin.buffer)
out = {}
for name, made in (("TwoNN", skdim.id.TwoNN()), ("MLE", skdim.id.MLE())):
    before = time.process_time()
    value = float(made.fit(X).dimension_)
    out["skdim " + name] = {"value": value, "cpu_seconds": time.process_time() - before}
print(json.dumps(out))
"""


@dataclass(frozen=True)
class Config:
    """One run."""

    preset: str
    seeds: int
    n_samples: int = 2000
    n_features: int = 128


PRESETS = {"quick": Config("quick", seeds=5), "full": Config("full", seeds=30)}


def cube(n: int, d: int, D: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    frame = np.linalg.qr(random.standard_normal((D, d)))[0]
    return random.uniform(size=(n, d)) @ frame.T


def tails(n: int, d: int, D: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    flat = samples.linear_subspace(n, dimension=d, n_features=D, random_state=seed).points
    return flat / np.sqrt(random.chisquare(5, (n, 1)) / 5)


CASES: dict[str, tuple[int, Callable[[int, int, int], np.ndarray]]] = {}
for _d in (2, 5, 10):
    CASES |= {
        f"sphere {_d}": (_d, lambda n, D, s, d=_d: samples.hypersphere(
            n, dimension=d, n_features=D, random_state=s).points),
        f"Gaussian {_d}": (_d, lambda n, D, s, d=_d: samples.linear_subspace(
            n, dimension=d, n_features=D, random_state=s).points),
        f"Student t5 {_d}": (_d, lambda n, D, s, d=_d: tails(n, d, D, s)),
        f"cube {_d}": (_d, lambda n, D, s, d=_d: cube(n, d, D, s)),
    }  # fmt: skip
CASES |= {
    "circle, density 1 + .8 cos": (1, lambda n, D, s: samples.circle(
        n, n_features=D, density_amplitude=0.8, random_state=s).points),
    "sphere 2, density exp(z)": (2, lambda n, D, s: samples.sphere(
        n, n_features=D, tilt=1.0, random_state=s).points),
    "sphere 2, noise .01": (2, lambda n, D, s: samples.sphere(
        n, n_features=D, noise=0.01, random_state=s).points),
    "flat torus": (2, lambda n, D, s: samples.flat_torus(n, n_features=D, random_state=s).points),
    "swiss roll": (2, lambda n, D, s: samples.swiss_roll(n, n_features=D, random_state=s).points),
}  # fmt: skip


def measure(name: str, seed: int, config: Config, peer: str | None) -> list[dict]:
    truth, make = CASES[name]
    X = make(config.n_samples, config.n_features, seed)
    rows = []
    for method in ("two_nn", "mle", "gride", "bgh"):
        before = time.process_time()
        found = estimate_dimension(X, method)
        cpu = time.process_time() - before
        row = {"sample": name, "seed": seed, "truth": truth, "cpu_seconds": cpu}
        rows.append({**row, "library": method, "error": found.value - truth,
                     "standard_error": found.standard_error})  # fmt: skip
        if found.pair_fraction:
            published = {"library": f"{method}, uncorrected", "error": found.uncorrected - truth}
            rows.append({**row, **published})
    if peer:
        import io

        stream = io.BytesIO()
        np.save(stream, X)
        done = subprocess.run([peer, "-c", PEER], input=stream.getvalue(), capture_output=True)
        answers = json.loads(done.stdout) if done.returncode == 0 else {}
        for library, answer in answers.items():
            rows.append({"sample": name, "seed": seed, "truth": truth, "library": library,
                         "error": answer["value"] - truth,
                         "cpu_seconds": answer["cpu_seconds"]})  # fmt: skip
    return rows


def claims(rows: list[dict], command: str) -> list[dict]:
    made = []
    for d in (2, 5, 10):
        mine = [r for r in rows if r["sample"] == f"sphere {d}" and r["library"] == "two_nn"]
        worst = max(abs(r["error"]) for r in mine)
        cpu = max(r["cpu_seconds"] for r in mine)
        made.append((f"sphere {d}: largest error of the default", worst, "<= 0.3", worst <= 0.3))
        made.append((f"sphere {d}: CPU seconds", cpu, "< 1", cpu < 1))
    return [
        {"claim": c, "value": v, "target": t, "holds": bool(h), "command": command}
        for c, v, t, h in made
    ]


def run(config: Config, peer: str | None) -> dict:
    began = time.perf_counter()
    torch.set_num_threads(1)
    rows = [
        r for name in CASES for s in range(config.seeds) for r in measure(name, s, config, peer)
    ]
    packages = ("numpy", "scipy", "scikit-learn", "torch")
    return {
        "config": asdict(config) | {"scikit-dimension": "run" if peer else "not run"},
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "seconds": time.perf_counter() - began,
        "rows": rows,
        "claims": claims(rows, COMMAND.format(config.preset)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--peer-python", help="Python that has scikit-dimension")
    parser.add_argument("--seeds", type=int)
    given = parser.parse_args()
    config = PRESETS[given.preset]
    if given.seeds:
        config = Config(config.preset, given.seeds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run(config, given.peer_python)
    artifact.write_json(RESULTS / f"{config.preset}.json", result)
    libraries = dict.fromkeys(r["library"] for r in result["rows"])
    print("| sample |", " | ".join(libraries), "|")
    for name in CASES:
        means = []
        for library in libraries:
            errors = [r["error"] for r in result["rows"]
                      if r["sample"] == name and r["library"] == library]  # fmt: skip
            means.append(f"{np.mean(errors):+.2f}" if errors else "-")
        print("|", name, "|", " | ".join(means), "|")
    for claim in result["claims"]:
        print("holds" if claim["holds"] else "FAILS", f"{claim['value']:.4g}", claim["claim"])


if __name__ == "__main__":
    main()
