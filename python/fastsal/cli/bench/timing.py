"""Two jobs in turn, so that both see the same machine."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Job = Callable[[], object]


@dataclass
class Comparison:
    """What a case sets up: our job, the peer's, and how to read the two times.

    Attributes:
        ours: Our job.
        peer: The peer's.
        peer_name: What the peer is.
        ratio: Takes our seconds and the peer's, returns the figure.
        pairs: How many times both run.
        after: Called at the end, returns what else is to be noted.
    """

    ours: Job
    peer: Job
    peer_name: str
    ratio: Callable[[float, float], float]
    pairs: int = 5
    after: Callable[[], str] | None = None


@dataclass
class Case:
    """One line of the table.

    Attributes:
        name: What is measured.
        figure: What the ratio is.
        limit: What it should reach (`at_least`) or stay below.
        setup: Makes the comparison; raises `Skip` where a peer is missing.
    """

    name: str
    figure: str
    limit: float
    setup: Callable[[], Comparison]
    at_least: bool = True


class Skip(Exception):
    """A case cannot run here; the text says why."""


@dataclass
class Result:
    """What came out of a case; times are medians in seconds."""

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
        """Whether the limit holds; None if the case was skipped."""
        if self.ratio is None:
            return None
        return self.ratio >= self.limit if self.at_least else self.ratio <= self.limit


def run(cases: Iterator[Case]) -> Iterator[Result]:
    """Run the cases one by one."""
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
    first = _seconds(comparison.ours)
    for _ in range(comparison.pairs):
        ours.append(_seconds(comparison.ours))
        theirs.append(_seconds(comparison.peer))
    result.peer = comparison.peer_name
    result.ours, result.theirs = statistics.median(ours), statistics.median(theirs)
    result.ratios = [comparison.ratio(o, t) for o, t in zip(ours, theirs, strict=True)]
    result.ratio = statistics.median(result.ratios)
    result.note = comparison.after() if comparison.after else ""
    if first > 1.3 * result.ours and first - result.ours > 0.5:
        result.note += f"{'; ' if result.note else ''}first run {first:.2f} s"


def _seconds(job: Callable[[], Any]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed; False where there is no glibc.

    A virtual machine may give freed memory back to its host, and pay up to two seconds a gigabyte
    to have it again: that would be most of what is measured where gigabytes are needed. (Kept
    memory is seldom in huge pages, which costs the kernels a tenth.)
    """
    trim_threshold, mmap_max = -1, -4
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, -1))
    except (OSError, AttributeError):
        return False


def fresh_memory_cost() -> float:
    """Seconds that the first touch of a gigabyte takes on one thread."""
    import mmap

    import numpy as np

    size = 1 << 28
    memory = mmap.mmap(-1, size)
    array = np.frombuffer(memory, np.uint8)
    start = time.perf_counter()
    array[::4096] = 1
    return (time.perf_counter() - start) * 2**30 / size
