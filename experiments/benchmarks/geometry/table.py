"""Rows of results as text: cost beside our cost, memory, accuracy."""

from __future__ import annotations

from collections.abc import Iterator

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


def lines(rows: list[dict], known: list[dict]) -> Iterator[str]:
    """One line a row, the case before the first; times over ours on the same device.

    Ours may be of an earlier run, among the rows ``known``.
    """
    if not rows:
        return
    first = rows[0]
    seed = f", seed {first['seed']}" if first["seed"] else ""
    yield f"\n{first['section']}: {first['case']}{seed}"
    for row in rows:
        name = row["library"].replace("_", "-")
        name += "" if row["method"] == "default" else f" {row['method']}"
        name += "" if row["device"] == "cpu" else f" ({row['device']})"
        yield f"  {name:24}{described(row, ours(rows, row) or ours(known, row))}"


def ours(rows: list[dict], like: dict) -> dict:
    same = ("case", "seed", "device")
    mine = [r for r in rows if r["library"] == "ours" and cost(r)
            and all(r[name] == like[name] for name in same)]  # fmt: skip
    return mine[0] if mine else {}


def cost(row: dict) -> float:
    """CPU seconds, or wall seconds on an accelerator."""
    return float(row.get("cpu_seconds" if row["device"] == "cpu" else "wall_seconds", 0.0))


def described(row: dict, mine: dict) -> str:
    if "not_run" in row:
        return f"not run: {row['not_run']}"
    failed = f"  {row['failures']} of {row['repeats']} failed: {row['error']}" if (
        row["failures"]) else ""  # fmt: skip
    if not cost(row):
        return failed.strip()
    text = f"{cost(row):8.2f} s"
    text += f" x{cost(row) / cost(mine):<6.2f}" if mine else " " * 8
    if "cpu_seconds_max" in row:
        text += f" ({row['cpu_seconds_median']:.2f}, {row['cpu_seconds_max']:.2f})"
    memory = "peak_mib" if row["device"] == "cpu" else "peak_gpu_mib"
    text += f" {row[memory]:7.0f} MiB " if memory in row else ""
    if "transform_cpu_seconds" in row:
        text += f" transform {row['transform_cpu_seconds']:.2f} s"
        if mine.get("transform_cpu_seconds"):
            text += f" x{row['transform_cpu_seconds'] / mine['transform_cpu_seconds']:.2f}"
    if "query_cpu_seconds" in row:
        text += f" query {row['query_cpu_seconds']:.2f} s"
    quality = [form.format(row[key]) for key, form in QUALITY.items()
               if isinstance(row.get(key), float)]  # fmt: skip
    return f"{text} {', '.join(quality)}{failed}"
