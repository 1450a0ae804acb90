"""Timing of two alternating jobs, so that both run under the same conditions."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Job = Callable[[], object]


class Seconds(float):
    """The time of a job that measured it itself, such as that of a part of a new process."""


@dataclass
class Comparison:
    """Two jobs to compare, and the ratio of their times.

    Attributes:
        ours: Our job.
        peer: The job of the peer.
        peer_name: Name of the peer in the table.
        ratio: Function of our seconds and the peer's seconds that returns the figure.
        pairs: Number of times that both jobs run.
        after: Called at the end; returns a note for the table.
        warm_up: Whether our job runs once before it is timed.
    """

    ours: Job
    peer: Job
    peer_name: str
    ratio: Callable[[float, float], float]
    pairs: int = 5
    after: Callable[[], str] | None = None
    warm_up: bool = True


@dataclass
class Case:
    """One row of the table.

    Attributes:
        name: Description of the measurement.
        figure: Unit of the ratio, for example "times as fast".
        limit: Target of the ratio: a lower bound if `at_least`, else an upper bound.
        setup: Creates the comparison; raises `Skip` if a peer is missing.
    """

    name: str
    figure: str
    limit: float
    setup: Callable[[], Comparison]
    at_least: bool = True


class Skip(Exception):
    """Raised if a case cannot run here; the message gives the reason."""


@dataclass
class Result:
    """Result of a case; times are medians in seconds."""

    name: str
    figure: str
    limit: float
    at_least: bool
    peer: str = ""
    ratio: float | None = None
    ours: float | None = None
    theirs: float | None = None
    ratios: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if the case was skipped."""
        if self.ratio is None:
            return None
        return self.ratio >= self.limit if self.at_least else self.ratio <= self.limit


def run(cases: Iterator[Case]) -> Iterator[Result]:
    """Run the cases one after the other and yield their results."""
    for case in cases:
        result = Result(case.name, case.figure, case.limit, case.at_least)
        try:
            comparison = case.setup()
        except Skip as reason:
            result.note = f"skipped: {reason}"
            yield result
            continue
        _measure(comparison, result)
        del comparison
        gc.collect()
        yield result


def _measure(comparison: Comparison, result: Result) -> None:
    ours, theirs = [], []
    first = seconds_of(comparison.ours) if comparison.warm_up else 0.0
    for _ in range(comparison.pairs):
        ours.append(seconds_of(comparison.ours))
        theirs.append(seconds_of(comparison.peer))
    result.peer = comparison.peer_name
    result.ours, result.theirs = statistics.median(ours), statistics.median(theirs)
    result.ratios = [comparison.ratio(o, t) for o, t in zip(ours, theirs, strict=True)]
    result.ratio = statistics.median(result.ratios)
    result.note = comparison.after() if comparison.after else ""
    if first > 1.3 * result.ours and first - result.ours > 0.5:
        result.note += f"{'; ' if result.note else ''}first run {first:.2f} s"


def seconds_of(job: Callable[[], Any]) -> float:
    """Return the time of a job: the `Seconds` that it returns, otherwise its wall-clock time."""
    start = time.perf_counter()
    found = job()
    return found if isinstance(found, Seconds) else time.perf_counter() - start


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory; return False if there is no glibc.

    A virtual machine may return freed memory to its host, and allocating it again may cost up to
    two seconds per gigabyte, which would dominate the measured time of large cases. (Kept memory is
    rarely in huge pages, which slows the kernels down by a tenth.)
    """
    trim_threshold, mmap_max = -1, -4
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, -1))
    except (OSError, AttributeError):
        return False


def fresh_memory_cost() -> float:
    """Return the seconds of the first access to a gigabyte of fresh memory on one thread."""
    import mmap

    import numpy as np

    size = 1 << 28
    memory = mmap.mmap(-1, size)
    array = np.frombuffer(memory, np.uint8)
    start = time.perf_counter()
    array[::4096] = 1
    return (time.perf_counter() - start) * 2**30 / size
