"""What must hold, decided from the rows of a benchmark."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple


class Claim(NamedTuple):
    """A figure and the bound it must keep; None where it was not measured."""

    text: str
    value: float | None
    bound: float
    at_least: bool
    only: str  # what to give to the command so that it measures this alone

    def decided(self, command: str) -> dict:
        value = self.value
        if value is not None and not math.isfinite(value):
            value = None
        kept = value is not None and (value >= self.bound if self.at_least else value <= self.bound)
        sign = ">=" if self.at_least else "<="
        return {"claim": self.text, "value": value, "target": f"{sign} {self.bound:g}",
                "holds": kept, "command": f"{command} {self.only}"}  # fmt: skip


class Rows:
    """Rows of one device by section and case."""

    def __init__(self, rows: list[dict], device: str = "cpu") -> None:
        self.rows = [r for r in rows if r["device"] == device]
        self.runs: set[str] = set()  # runs whose rows were asked for

    def of(self, case: str, library: str = "ours", method: str | None = None) -> list[dict]:
        """Measured rows of all seeds."""
        found = [r for r in self.rows if r["case"] == case and r["library"] == library
                 and (method is None or r["method"] == method)
                 and r.get("cpu_seconds")]  # fmt: skip
        self.runs |= {r["run"] for r in found}
        return found

    def figure(
        self, case: str, key: str, library: str = "ours", method: str | None = None
    ) -> float | None:
        """The least of ``key`` over the seeds."""
        values = [r[key] for r in self.of(case, library, method) if key in r]
        return min(values) if values else None

    def failed(self, case: str) -> bool:
        return any(r["case"] == case and r["library"] == "ours" and r.get("failures")
                   for r in self.rows)  # fmt: skip

    def peers(self, case: str) -> list[str]:
        names = {r["library"] for r in self.rows if r["case"] == case and r.get("cpu_seconds")}
        return sorted(names - {"ours", "plain", "gemm"})

    def cases(self, section: str) -> list[str]:
        return list(dict.fromkeys(r["case"] for r in self.rows if r["section"] == section))


def over(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by


def claims(rows: list[dict], command: str) -> list[dict]:
    """All claims, in the order of the benchmark; of each, whether one run measured all of it."""
    made = Rows(rows)
    decided = []
    for section in (neighbors, accuracy, cost, geodesics, dimension):
        for claim in section(made):  # a section asks for the rows of a claim right before it
            decided.append(claim.decided(command) | {"one_run": len(made.runs) <= 1})
            made.runs = set()
    return decided


def neighbors(rows: Rows) -> Iterator[Claim]:
    for size in dict.fromkeys(c.split(", ")[1] for c in rows.cases("neighbors")):
        rate = rows.figure(f"matrix product, {size}", "gflops", "gemm")
        n, d = map(int, size.split("x"))
        seconds = rows.figure(f"power law, {size}", "cpu_seconds", method="exact")
        work = None if seconds is None else 2e-9 * n * n * d / seconds
        yield Claim(f"exact 64 neighbors of {size}: share of the rate of a matrix product",
                    over(work, rate), 0.6, True, "--only neighbors")  # fmt: skip
        yield Claim(f"exact 64 neighbors of {size}: recall",
                    rows.figure(f"power law, {size}", "recall", method="exact"), 0.9999, True,
                    "--only neighbors")  # fmt: skip


ACCURATE = {
    "circle, density 1 + .8 cos, 2000x128": (0.999, None),
    "sphere, density exp(z), 5000x128": (0.998, 0.99),
    "flat torus, 5000x128": (0.998, 0.99),
    "swiss roll, 2000x128": (0.998, 0.99),
    "circle, density 1 + .8 cos, noise 1e-3, 2000x96": (0.999, None),
    "swiss roll, noise .1, 2000x128": (0.998, 0.99),
}
TILTED = "sphere, density exp(z), 5000x128"


def accuracy(rows: Rows) -> Iterator[Claim]:
    for case, (first, second) in ACCURATE.items():
        only = f"--only diffusion --cases {case!r}"
        failed = rows.failed(case)
        for text, key, bound in (
            ("least R2 of the first eigenspace", "r2_first", first),
            ("least R2 of the second eigenspace", "r2_second", second),
        ):
            if bound is not None:
                value = 0.0 if failed else rows.figure(case, key)
                yield Claim(f"{case}: {text}", value, bound, True, only)
        errors = [r["ratio_error"] for r in rows.of(case)]
        value = 1.0 if failed else max(errors, default=None)
        text = "largest relative error of the eigenvalue ratio"
        yield Claim(f"{case}: {text}", value, 0.04, False, only)
    cheap = over(rows.figure(TILTED, "cpu_seconds"),
                 rows.figure(TILTED, "cpu_seconds", "graphtools"))  # fmt: skip
    yield Claim(f"{TILTED}: CPU over graphtools'", cheap, 1.0, False,
                f"--only diffusion --cases {TILTED!r}")  # fmt: skip


def cost(rows: Rows) -> Iterator[Claim]:
    name = "cost, swiss roll, noise .1, {}"
    wide, widest = name.format("10000x768"), name.format("50000x768")
    only = "--only diffusion --cases cost"

    def over_ours(library: str | None) -> float | None:
        if library is None:
            return None
        return over(rows.figure(wide, "cpu_seconds", library), rows.figure(wide, "cpu_seconds"))

    yield Claim("fit of 10000x768: pydiffmap's CPU over ours", over_ours("pydiffmap"), 4, True,
                only)  # fmt: skip
    costs = {peer: rows.figure(wide, "cpu_seconds", peer) for peer in rows.peers(wide)}
    fastest = min(costs, key=lambda peer: costs[peer] or math.inf, default=None)
    named = f" ({fastest})".replace("_", "-") if fastest else ""
    yield Claim(f"fit of 10000x768: the fastest peer's{named} CPU over ours", over_ours(fastest),
                1.5, True, only)  # fmt: skip
    best = [rows.figure(wide, "r2", peer) or 0.0 for peer in costs]
    own = rows.figure(wide, "r2")
    short = max(best) - own if best and own is not None else None
    yield Claim("fit of 10000x768: R2 short of the best peer's", short, 5e-4, False, only)
    if rows.of(widest) or rows.of(widest, "plain"):
        share = over(rows.figure(widest, "cpu_seconds"),
                     rows.figure(widest, "cpu_seconds", "plain"))  # fmt: skip
        yield Claim("fit of 50000x768: CPU over exact neighbors and ARPACK", share, 1 / 3, False,
                    only)  # fmt: skip
    small = name.format("2000x128")
    yield Claim("fit of 2000x128: pydiffmap's CPU over ours",
                over(rows.figure(small, "cpu_seconds", "pydiffmap"),
                     rows.figure(small, "cpu_seconds")), 1, True, only)  # fmt: skip
    for size in ("2000x128", "10000x128", "10000x768"):
        case, key = name.format(size), "transform_cpu_seconds"
        ratio = over(rows.figure(case, key, "pydiffmap"), rows.figure(case, key))
        yield Claim(f"10,000 new points, fitted on {size}: pydiffmap's CPU over ours", ratio, 4,
                    True, only)  # fmt: skip
        yield Claim(f"fitted on {size}: transform of fitted rows, largest error in deviations",
                    rows.figure(case, "again_error"), 1e-4, False, only)  # fmt: skip
    yield memory(rows, name, only)


def memory(rows: Rows, name: str, only: str) -> Claim:
    """Growth of peak memory with the rows: 1 is linear, 2 quadratic."""
    pairs = [("10000x768", "50000x768"), ("2000x128", "10000x128")]
    for small, large in pairs:
        less = rows.figure(name.format(small), "peak_mib")
        more = rows.figure(name.format(large), "peak_mib")
        if less and more:
            exponent = math.log(more / less) / math.log(5)
            text = f"memory of a fit grows from {small} to {large} with the rows to the power"
            return Claim(text, exponent, 1.2, False, only)
    return Claim("memory of a fit grows with the rows to the power", None, 1.2, False, only)


def geodesics(rows: Rows) -> Iterator[Claim]:
    only = "--only geodesics"
    for case in ("sphere", "swiss roll"):
        for n, bound in ((5000, 0.01), (20000, 0.02)):
            full = f"{case}, {n}x128"
            found = rows.of(full)
            best = min(found, key=lambda r: r["median_error"], default=None)
            method = f" (method {best['method']})" if best else ""
            yield Claim(f"geodesics of {full}: median relative error{method}",
                        best and best["median_error"], bound, False, only)  # fmt: skip
            if n == 5000:
                isomap = rows.figure(full, "cpu_seconds", "scikit_learn")
                mine = best and best["cpu_seconds"] + best.get("query_cpu_seconds", 0.0)
                yield Claim(f"geodesics of {full}: CPU over Isomap's{method}",
                            over(mine, isomap), 1.0, False, only)  # fmt: skip


def dimension(rows: Rows) -> Iterator[Claim]:
    for d in (2, 5, 10):
        case = f"sphere of dimension {d}, 2000x128"
        found = rows.of(case, method="default")
        worst = max((abs(r["deviation"]) for r in found), default=None)
        only = f"--only dimension --cases {case!r}"
        yield Claim(f"{case}: largest error of the dimension", worst, 0.3, False, only)
        seconds = max((r["cpu_seconds"] for r in found), default=None)
        yield Claim(f"{case}: CPU seconds", seconds, 1.0, False, only)
