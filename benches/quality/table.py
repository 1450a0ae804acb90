"""Tables of the results: mean and standard deviation over draws."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

DROPS = (0.01, 0.05)  # of the first measure, for the highest sparsity within it

Rows = Sequence[dict[str, Any]]


def tables(rows: Rows) -> str:
    """Return one table for each subject, number of samples and measure, and one of sparsities."""
    return "\n\n".join("\n".join(lines) for lines in _tables(rows))


def _tables(rows: Rows) -> Iterator[list[str]]:
    for subject in dict.fromkeys(row["subject"] for row in rows):
        of_subject = [row for row in rows if row["subject"] == subject]
        dense = next((row for row in of_subject if row["method"] == "dense"), None)
        cells = [row for row in of_subject if row["method"] != "dense"]
        for samples in sorted({row["samples"] for row in cells}):
            some = [row for row in cells if row["samples"] == samples]
            title = f"{subject}, {samples} images"
            for name in some[0]["measures"]:
                head = f"{title}: {name}"
                if dense is not None:
                    head += f", dense {dense['measures'][name]:.3f}"
                yield _table(head, name, some)
            if dense is not None and any(isinstance(row["sparsity"], float) for row in some):
                yield _highest(title, dense["measures"], some)


def _table(head: str, measure: str, rows: Rows) -> list[str]:
    goals = sorted({row["sparsity"] for row in rows}, key=_order)
    lines = [
        f"| {head} | " + " | ".join(map(str, goals)) + " |",
        "|---" * (1 + len(goals)) + "|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for goal in goals:
            values = _values(rows, method, goal, measure)
            text = f"{statistics.mean(values):.3f}" if values else ""
            if len(values) > 1:
                text += f" ± {statistics.stdev(values):.3f}"
            cells.append(text if len(values) != 1 else text + " (one draw)")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def _order(goal: float | str) -> tuple[bool, float | str]:
    """Sparsities come before patterns."""
    return isinstance(goal, str), goal


def _highest(title: str, dense: dict[str, float], rows: Rows) -> list[str]:
    """Return a table of the highest sparsities at which little of the first measure is lost."""
    measure = next(iter(dense))
    lines = [
        f"| {title}: highest sparsity within | "
        + " | ".join(f"{drop:g} of the {measure}" for drop in DROPS)
        + " |",
        "|---" * (1 + len(DROPS)) + "|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        goals = {row["sparsity"] for row in rows if row["method"] == method}
        curve = [
            (goal, statistics.mean(_values(rows, method, goal, measure)))
            for goal in sorted(goal for goal in goals if isinstance(goal, float))
        ]
        if curve:
            cells = [_crossing(curve, dense[measure] - drop) for drop in DROPS]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def _crossing(curve: Sequence[tuple[float, float]], least: float) -> str:
    """Return where a curve falls below a value, by linear interpolation."""
    before: tuple[float, float] | None = None
    for sparsity, value in curve:
        if value < least:
            if before is None:
                return f"< {sparsity:g}"
            part = (before[1] - least) / (before[1] - value)
            return f"{before[0] + part * (sparsity - before[0]):.2f}"
        before = sparsity, value
    return f"≥ {curve[-1][0]:g}"


def _values(rows: Rows, method: str, goal: float | str, measure: str) -> list[float]:
    return [
        row["measures"][measure]
        for row in rows
        if row["method"] == method and row["sparsity"] == goal
    ]
