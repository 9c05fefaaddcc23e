"""Rows of results as text: cost beside our cost, memory, accuracy.

``python experiments/benchmarks/geometry/table.py RESULTS.json`` prints them as Markdown.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

QUALITY = {
    "gflops": "{:.1f} GFLOP/s",
    "recall": "recall {:.4f}",
    "r2_first": "R2 {:.5f}",
    "r2_second": "{:.5f}",
    "ratio_error": "ratio off {:.2%}",
    "r2": "R2 {:.5f}",
    "r2_new": "new {:.5f}",
    "again_error": "again off {:.1e}",
    "median_error": "median error {:.2%}",
    "bias": "bias {:+.2%}",
    "p95_error": "p95 {:.2%}",
    "dimension": "dimension {:.3f}",
}


def cost(row: dict) -> float:
    """CPU seconds, or wall seconds on an accelerator."""
    return float(row.get("cpu_seconds" if row["device"] == "cpu" else "wall_seconds", 0.0))


def ours(rows: list[dict], like: dict) -> dict:
    """Our row of the same case, seed and device as ``like``; empty if there is none."""
    same = ("case", "seed", "device")
    mine = [r for r in rows if r["library"] == "ours" and cost(r)
            and all(r[name] == like[name] for name in same)]  # fmt: skip
    return mine[0] if mine else {}


def name_of(row: dict) -> str:
    name = row["library"].replace("_", "-")
    name += "" if row["method"] == "default" else f" {row['method']}"
    return name if row["device"] == "cpu" else f"{name} ({row['device']})"


def title_of(row: dict) -> str:
    seed = f", seed {row['seed']}" if row["seed"] else ""
    return f"{row['section']}: {row['case']}{seed}"


def cells(row: dict, mine: dict) -> tuple[str, str, str, str]:
    """Seconds, times over ours, memory, and all else."""
    if "not_run" in row:
        return "", "", "", f"not run: {row['not_run']}"
    failed = f"{row['failures']} of {row['repeats']} failed: {row.get('error')}"
    if not cost(row):
        return "", "", "", failed
    seconds = f"{cost(row):.2f} s"
    if "cpu_seconds_max" in row:
        seconds += f" ({row['cpu_seconds_median']:.2f}, {row['cpu_seconds_max']:.2f})"
    memory = row.get("peak_mib" if row["device"] == "cpu" else "peak_gpu_mib")
    rest = []
    if "transform_cpu_seconds" in row:
        rest.append(f"transform {row['transform_cpu_seconds']:.2f} s")
        if mine.get("transform_cpu_seconds"):
            times = row["transform_cpu_seconds"] / mine["transform_cpu_seconds"]
            rest[-1] += f" x{times:.2f}"
    if "query_cpu_seconds" in row:
        rest.append(f"query {row['query_cpu_seconds']:.2f} s")
    rest += [form.format(row[key]) for key, form in QUALITY.items()
             if isinstance(row.get(key), float)]  # fmt: skip
    rest += [failed] if row["failures"] else []
    times = f"x{cost(row) / cost(mine):.2f}" if mine else ""
    return seconds, times, "" if memory is None else f"{memory:.0f} MiB", ", ".join(rest)


def lines(rows: list[dict], known: list[dict]) -> Iterator[str]:
    """One line a row, the case before the first; times over ours on the same device.

    Ours may be of an earlier run, among the rows ``known``.
    """
    for title, group in groupby(rows, title_of):
        yield f"\n{title}"
        for row in group:
            seconds, times, memory, rest = cells(row, ours(rows, row) or ours(known, row))
            yield f"  {name_of(row):22} {seconds:22} {times:7} {memory:>9}  {rest}".rstrip()


def markdown(result: dict) -> Iterator[str]:
    """A table a case, and one of the claims."""
    rows = sorted(result["rows"], key=lambda r: (list_of_sections(result).index(r["section"]),
                                                 r["case"], r["seed"]))  # fmt: skip
    for title, group in groupby(rows, title_of):
        yield f"\n### {title}\n\n| library | CPU (median, largest) | over ours | memory | |"
        yield "|---|---|---|---|---|"
        for row in group:
            yield f"| {name_of(row)} | {' | '.join(cells(row, ours(rows, row)))} |"
    yield "\n### Claims\n\n| claim | value | target | |\n|---|---|---|---|"
    for claim in result["claims"]:
        value = "not run" if claim["value"] is None else f"{claim['value']:.4g}"
        word = "" if claim["value"] is None else "holds" if claim["holds"] else "**does not hold**"
        yield f"| {claim['claim']} | {value} | {claim['target']} | {word} |"


def list_of_sections(result: dict) -> list[str]:
    return list(dict.fromkeys(row["section"] for row in result["rows"]))


if __name__ == "__main__":
    for line in markdown(json.loads(Path(sys.argv[1]).read_text())):
        print(line)
