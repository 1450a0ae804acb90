"""Tables of the results: mean and standard deviation over draws."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Return one table for each subject, number of samples and measure."""
    found: list[str] = []
    for subject in dict.fromkeys(row["subject"] for row in rows):
        of_subject = [row for row in rows if row["subject"] == subject]
        dense = next((row for row in of_subject if row["method"] == "dense"), None)
        cells = [row for row in of_subject if row["method"] != "dense"]
        for samples in sorted({row["samples"] for row in cells}):
            some = [row for row in cells if row["samples"] == samples]
            found += [_table(subject, samples, name, some, dense) for name in some[0]["measures"]]
    return "\n\n".join(found)


def _table(
    subject: str,
    samples: int,
    measure: str,
    rows: Sequence[dict[str, Any]],
    dense: dict[str, Any] | None,
) -> str:
    sparsities = sorted({row["sparsity"] for row in rows})
    head = f"{subject}, {samples} images: {measure}"
    if dense is not None:
        head += f", dense {dense['measures'][measure]:.3f}"
    lines = [
        f"| {head} | " + " | ".join(map(str, sparsities)) + " |",
        "|---" * (1 + len(sparsities)) + "|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for sparsity in sparsities:
            values = [
                row["measures"][measure]
                for row in rows
                if row["method"] == method and row["sparsity"] == sparsity
            ]
            text = f"{statistics.mean(values):.3f}" if values else ""
            if len(values) > 1:
                text += f" ± {statistics.stdev(values):.3f}"
            cells.append(text if len(values) != 1 else text + " (one draw)")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
