"""The run that a user would pick: the fastest or smallest one that keeps the accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastsal.study.report.run_results import RunPoint
from fastsal.study.report.wording import number


@dataclass(frozen=True)
class Pick:
    """A run that is best in one respect.

    Attributes:
        point: The run.
        text: Why, in a sentence.
    """

    point: RunPoint
    text: str


def picks(points: Sequence[RunPoint], margin: float) -> list[Pick]:
    """Return the fastest and the smallest of the runs that keep the accuracy.

    A run keeps the accuracy if it loses at most `margin` percentage points. Only a run that was
    faster in three pairs of runs of four counts as faster. If both are the same run, it is returned
    once.

    Args:
        points: Runs of one model.
        margin: Percentage points.
    """
    keeping = [p for p in points if 100 * (p.dense_accuracy - p.accuracy) <= margin + 1e-9]
    fast = [p for p in keeping if p.latencies and p.latencies[0].speedup[1] > 1]
    small = [p for p in keeping if _ratio(p) < 1]
    fastest = max(fast, key=lambda p: p.latencies[0].speedup[0], default=None)
    smallest = min(small, key=_ratio, default=None)
    if fastest is not None and fastest is smallest:
        return [Pick(fastest, f"{_speed(fastest)}, and {_size(fastest)}: {_kept(fastest)}")]
    found = []
    if fastest is not None:
        found.append(Pick(fastest, f"{_speed(fastest)}: {_kept(fastest)}"))
    if smallest is not None:
        found.append(Pick(smallest, f"{_size(smallest)}: {_kept(smallest)}"))
    return found


def nothing_kept(points: Sequence[RunPoint], margin: float) -> str:
    """Say why there is no pick."""
    limit = f"{margin:g} {'point' if margin == 1 else 'points'}"
    if all(100 * (p.dense_accuracy - p.accuracy) > margin + 1e-9 for p in points):
        best = max(points, key=lambda p: p.accuracy - p.dense_accuracy)
        return (
            f"No run loses {limit} or less; {best.name} loses "
            f"{100 * (best.dense_accuracy - best.accuracy):.1f}."
        )
    return (
        f"Of the runs that lose {limit} or less none was measured to be faster or "
        "smaller (fastsal measure RUN --save)."
    )


def _ratio(point: RunPoint) -> float:
    return math.inf if point.file_ratio is None else point.file_ratio


def _speed(point: RunPoint) -> str:
    latency = point.latencies[0]
    return f"{latency.verdict} for {number(latency.batch, 'image')}"


def _size(point: RunPoint) -> str:
    return f"{_ratio(point):.2f} of the file"


def _kept(point: RunPoint) -> str:
    return f"accuracy {100 * point.accuracy:.1f} after {100 * point.dense_accuracy:.1f} %"
