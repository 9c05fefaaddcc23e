"""Figures in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print columns, the first to the left, the others to the right."""
    cells = [[_cell(value) for value in row] for row in [columns, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        line = [row[0].ljust(widths[0])]
        line += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(line))


def figure(value: float | None) -> str:
    """Four digits; nothing for None."""
    return "" if value is None else f"{value:.4f}"


def _cell(value: Any) -> str:
    return figure(value) if value is None or isinstance(value, float) else str(value)
