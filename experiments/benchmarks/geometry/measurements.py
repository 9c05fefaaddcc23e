"""What is measured: data whose truth is known, the libraries, and the judging of their answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from manifold_unlearn.manifold import samples

Arrays = Mapping[str, np.ndarray]
N_QUERIES = 500
PEERS = ("pydiffmap", "datafold", "scikit_learn", "graphtools", "scanpy", "plain")


class Sizes(Protocol):
    """The fields of the configuration that decide which cases there are."""

    seeds: int
    rival_seeds: int
    neighbor_sizes: tuple[str, ...]
    compiled_on: tuple[str, ...]
    device: tuple[str, ...]
    fit_sizes: tuple[str, ...]
    slow_peer_sizes: tuple[str, ...]
    geodesic_rows: tuple[int, ...]
    dimension_seeds: int


@dataclass(frozen=True)
class Case:
    """Data, what to do with it, who does it, and how an answer is judged."""

    section: str
    name: str
    task: str
    methods: Mapping[str, tuple[str, ...]]
    """Names of the methods that each library is measured with"""
    make: Callable[[], tuple[dict[str, np.ndarray], Callable[[Arrays], dict[str, float]]]]
    """Arrays for the library, and the judge of its answer"""
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


def libraries(*names: str) -> dict[str, tuple[str, ...]]:
    return {name: ("default",) for name in names}


def rows_by_features(size: str) -> tuple[int, int]:
    rows, features = size.split("x")
    return int(rows), int(features)


# neighbors


def clusters(n: int, d: int) -> np.ndarray:
    """Easy: 200 Gaussian clusters far apart."""
    random = np.random.default_rng(0)
    centers = random.normal(size=(200, d)) * 10 / np.sqrt(d)
    return centers[random.integers(200, size=n)] + random.normal(size=(n, d)) / np.sqrt(d)


def power_law(n: int, d: int) -> np.ndarray:
    """Hard: one Gaussian whose variances fall as a power, about 32 directions taking part."""
    scale = (1 + np.arange(d)) ** -0.5
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(d, d)))
    return (np.random.default_rng(0).normal(size=(n, d)) * scale) @ rotation


def roll(n: int, d: int) -> np.ndarray:
    return samples.swiss_roll(n, n_features=d, noise=0.1, random_state=0).points


def nearest(X: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """Distance of each of ``rows`` to its k-th nearest other row, in double precision."""
    squared = (X**2).sum(1)
    block = squared[rows, None] + squared[None, :] - 2 * X[rows] @ X.T
    block[np.arange(len(rows)), rows] = np.inf
    return np.sqrt(np.maximum(np.partition(block, k - 1, axis=1)[:, k - 1], 0))


def neighbor_cases(config: Sizes) -> Iterator[Case]:
    k = 64
    for size in config.neighbor_sizes:
        n, d = rows_by_features(size)
        shape = {"shape": (1024, d, min(n, 16384))}
        yield Case("neighbors", f"matrix product, {size}", "gemm", libraries("gemm"),
                   lambda: ({}, lambda _: {}), shape)  # fmt: skip
        for name, draw in (("clusters", clusters), ("power law", power_law), ("roll", roll)):
            compiled = ("pynndescent",) if name in config.compiled_on else ()
            methods = {"ours": ("exact",)} | libraries("faiss", *compiled)
            if name == "power law":  # exact search costs the same whatever the data
                methods |= libraries("scikit_learn", "torchdr") | {"ours": ("exact", "auto")}
                if any("cuda" in device for device in config.device):  # slow where emulated
                    methods |= {"ours": ("exact", "auto", "half")}

            def make(n: int = n, d: int = d, draw: Callable = draw) -> tuple:
                X = draw(n, d).astype(np.float32)
                rows = np.random.default_rng(2).choice(n, N_QUERIES, replace=False)
                wide = X.astype(np.float64)
                reach = nearest(wide, rows, k) * (1 + 1e-6)

                def judge(answer: Arrays) -> dict[str, float]:
                    found = answer["indices"]
                    gaps = np.stack([
                        np.linalg.norm(wide[found[:, j]] - wide[rows], axis=1) for j in range(k)
                    ], axis=1)  # fmt: skip
                    hit = (gaps <= reach[:, None]) & (found != rows[:, None])
                    return {"recall": float(hit.mean())}

                return {"X": X, "rows": rows}, judge

            yield Case("neighbors", f"{name}, {size}", "neighbors", methods, make,
                       {"n_neighbors": k})  # fmt: skip


# diffusion maps

KNOWN: dict[str, Callable[[int], samples.ManifoldSample]] = {
    "circle, density 1 + .8 cos, 2000x128": lambda seed: samples.circle(
        2000, n_features=128, density_amplitude=0.8, random_state=seed
    ),
    "sphere, density exp(z), 5000x128": lambda seed: samples.sphere(
        5000, n_features=128, tilt=1.0, random_state=seed
    ),
    "flat torus, 5000x128": lambda seed: samples.flat_torus(
        5000, n_features=128, random_state=seed
    ),
    "swiss roll, 2000x128": lambda seed: samples.swiss_roll(
        2000, n_features=128, random_state=seed
    ),
    "circle, density 1 + .8 cos, noise 1e-3, 2000x96": lambda seed: samples.circle(
        2000, n_features=96, density_amplitude=0.8, noise=1e-3, random_state=seed
    ),
    "swiss roll, noise .1, 2000x128": lambda seed: samples.swiss_roll(
        2000, n_features=128, noise=0.1, random_state=seed
    ),
}


def eigenspaces(sample: samples.ManifoldSample) -> tuple[slice, slice]:
    """Columns of the first and of the second eigenspace."""
    starts = np.flatnonzero(np.r_[True, np.diff(sample.eigenvalues) > 1e-9, True])
    return slice(starts[0], starts[1]), slice(starts[1], starts[2])


def explained(embedding: np.ndarray, functions: np.ndarray) -> float:
    """Part of the functions' variance that is linear in the embedding."""
    design = np.c_[np.ones(len(embedding)), embedding]
    rest = functions - design @ np.linalg.lstsq(design, functions, rcond=None)[0]
    return float(1 - (rest**2).sum() / ((functions - functions.mean(0)) ** 2).sum())


def judge_map(answer: Arrays, sample: samples.ManifoldSample) -> dict[str, float]:
    coordinates = answer["coordinates"].astype(float)
    if not np.isfinite(coordinates).all():
        raise ValueError("coordinates are not finite")
    first, second = eigenspaces(sample)
    made = {
        "r2_first": explained(coordinates[:, first], sample.eigenfunctions[:, first]),
        "r2_second": explained(coordinates[:, second], sample.eigenfunctions[:, second]),
    }
    if "rates" in answer:
        rates = answer["rates"]
        truth = sample.eigenvalues[second.start] / sample.eigenvalues[0]
        made["ratio_error"] = float(abs(rates[second].mean() / rates[first].mean() / truth - 1))
    return made


def accuracy_cases(config: Sizes) -> Iterator[Case]:
    for name, draw in KNOWN.items():
        n_components = int(eigenspaces(draw(0))[1].stop)
        for seed in range(config.seeds):

            def make(draw: Callable = draw, seed: int = seed) -> tuple:
                sample = draw(seed)
                return {"X": sample.points}, lambda answer: judge_map(answer, sample)

            few = config.rival_seeds - ("noise" in name)
            methods = libraries("ours", *(PEERS if seed < few else ()))
            if "datafold" in methods:  # no setting is its best on all of them
                methods["datafold"] = ("default", "k 64")
            yield Case("diffusion", name, "diffusion", methods, make,
                       {"n_components": n_components, "n_neighbors": 64}, seed)  # fmt: skip


def cost_cases(config: Sizes) -> Iterator[Case]:
    """Swiss roll with noise, 10 coordinates; and 10,000 new points."""
    for size in config.fit_sizes:
        n, d = rows_by_features(size)

        def make(n: int = n, d: int = d) -> tuple:
            whole = samples.swiss_roll(n + 10000, n_features=d, noise=0.1, random_state=0)
            points = whole.points.astype(np.float32)
            truth = whole.eigenfunctions[:, :6]

            def judge(answer: Arrays) -> dict[str, float]:
                coordinates = answer["coordinates"].astype(float)
                made = {"r2": explained(coordinates, truth[:n])}
                if "new" in answer:
                    again = answer["again"]
                    made["r2_new"] = explained(answer["new"].astype(float), truth[n:])
                    off = np.abs(again - coordinates[: len(again)]) / coordinates.std(0)
                    made["again_error"] = float(off.max())
                return made

            return {"X": points[:n], "new": points[n:]}, judge

        slow = ("datafold", "scanpy") if size in config.slow_peer_sizes else ()
        peers = ("pydiffmap", "scikit_learn", "graphtools", "plain", *slow)
        yield Case("diffusion", f"cost, swiss roll, noise .1, {size}", "diffusion",
                   libraries("ours", *peers), make,
                   {"n_components": 10, "n_neighbors": 64})  # fmt: skip


# geodesics

CURVED: dict[str, Callable[[int], samples.ManifoldSample]] = {
    "sphere": lambda n: samples.sphere(n, n_features=128, random_state=0),
    "swiss roll": lambda n: samples.swiss_roll(n, n_features=128, random_state=0),
    "swiss roll, noise .02": lambda n: samples.swiss_roll(
        n, n_features=128, noise=0.02, random_state=0
    ),
}


def geodesic_cases(config: Sizes) -> Iterator[Case]:
    for n in config.geodesic_rows:
        n_landmarks = None if n <= 5000 else 400
        rival = "scikit_learn" if n_landmarks is None else "plain"
        methods = {"ours": ("graph", "tangent", "heat")} | libraries(rival)
        for name, draw in CURVED.items():
            if "noise" in name and n > 5000:
                continue

            def make(draw: Callable = draw, n: int = n) -> tuple:
                sample, random = draw(n), np.random.default_rng(1)
                first, second = random.choice(n, (2, N_QUERIES), replace=False)
                truth = sample.geodesic_distances(first, second)

                def judge(answer: Arrays) -> dict[str, float]:
                    error = answer["distances"] / truth - 1
                    return {
                        "median_error": float(np.median(np.abs(error))),
                        "bias": float(error.mean()),
                        "p95_error": float(np.quantile(np.abs(error), 0.95)),
                    }

                return {"X": sample.points, "first": first, "second": second}, judge

            yield Case("geodesics", f"{name}, {n}x128", "geodesics", methods, make,
                       {"n_neighbors": 12, "n_landmarks": n_landmarks})  # fmt: skip


# dimension


def sphere(dimension: int, n: int, d: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    points = random.normal(size=(n, dimension + 1))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points @ np.linalg.qr(random.normal(size=(d, dimension + 1)))[0].T


def dimension_cases(config: Sizes) -> Iterator[Case]:
    methods = {"ours": ("default", "mle", "gride", "local_pca"), "skdim": ("two_nn", "mle"),
               "dadapy": ("two_nn", "gride")}  # fmt: skip
    for dimension in (2, 5, 10):
        for seed in range(config.dimension_seeds):

            def make(dimension: int = dimension, seed: int = seed) -> tuple:
                def judge(answer: Arrays) -> dict[str, float]:
                    value = float(answer["dimension"])
                    return {"dimension": value, "deviation": value - dimension}

                return {"X": sphere(dimension, 2000, 128, seed)}, judge

            yield Case("dimension", f"sphere of dimension {dimension}, 2000x128", "dimension",
                       methods, make, seed=seed)  # fmt: skip


SECTIONS: dict[str, tuple[Callable[[Sizes], Iterator[Case]], ...]] = {
    "neighbors": (neighbor_cases,),
    "diffusion": (accuracy_cases, cost_cases),
    "geodesics": (geodesic_cases,),
    "dimension": (dimension_cases,),
}
