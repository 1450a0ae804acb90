"""Progress of a long loop: a bar, plain lines, a callback, or nothing."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec

from fastsal.errors import InvalidArgument
from fastsal.utils.machine import peak_memory

Report = Callable[[int, int | None], None]  # report(done, total or None)
_LINE_EVERY = 10.0  # seconds between two plain lines


@contextlib.contextmanager
def reporter(progress: bool | Report, description: str, unit: str = "samples") -> Iterator[Report]:
    """Yield a function `report(done, total)` to call during a loop.

    Args:
        progress: True shows a bar on stderr, one of tqdm in a notebook, or a line every few seconds
            elsewhere; False shows nothing; a function is called as `progress(done, total)`.
        description: Name of the task, one or two words.
        unit: Unit of `done` and `total`.

    Yields:
        `report(done, total)` with the number of units done and in total, or None if unknown.

    Raises:
        InvalidArgument: `progress` is neither a Boolean nor a function.
    """
    if callable(progress):
        yield progress
    elif progress is False:
        yield _nothing
    elif progress is True:
        show = _notebook_bar if in_notebook() else _bar if sys.stderr.isatty() else _lines
        with show(description, unit) as report:
            yield report
    else:
        raise InvalidArgument(
            f"progress must be True, False or a function of (done, total), got {progress!r:.80}"
        )


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook (Jupyter, Colab, VS Code)."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None and find_spec("tqdm") is not None


def _nothing(done: int, total: int | None) -> None:
    """Report nothing."""


@contextlib.contextmanager
def _lines(description: str, unit: str) -> Iterator[Report]:
    """Write a line to stderr every few seconds, and at the end if any line was written."""
    start = last = time.monotonic()
    state: tuple[int, int | None] = (0, None)
    written = False

    def write() -> None:
        nonlocal written
        done, total = state
        seconds = time.monotonic() - start
        rate = done / seconds if seconds > 0 else 0.0
        left = (
            f", {clock_time((total - done) / rate)} left" if total and rate and done < total else ""
        )
        of = f"/{total}" if total else ""
        speed = _rate(rate, unit)
        text = f"{description}: {done}{of} {unit}, {speed}, {clock_time(seconds)}{left}{_peak()}"
        print(text, file=sys.stderr, flush=True)
        written = True

    def report(done: int, total: int | None) -> None:
        nonlocal last, state
        state = (done, total)
        now = time.monotonic()
        if now - last >= _LINE_EVERY:
            last = now
            write()

    yield report
    if written:
        write()


@contextlib.contextmanager
def _bar(description: str, unit: str) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[rate]}", style="cyan"),
        TimeElapsedColumn(),
        TextColumn("left"),
        Remaining(),
        TextColumn("{task.fields[peak]}", style="dim"),
        console=Console(stderr=True),
    )
    start = time.monotonic()
    with bar:
        task = bar.add_task(description, total=None, count="", rate="", peak="")

        def report(done: int, total: int | None) -> None:
            seconds = max(time.monotonic() - start, 1e-9)
            bar.update(
                task,
                completed=done,
                total=total,
                count=f"{done}/{total}" if total else f"{done}",
                rate=_rate(done / seconds, unit),
                peak=_peak().removeprefix(", "),
            )

        yield report


@contextlib.contextmanager
def _notebook_bar(description: str, unit: str) -> Iterator[Report]:
    """Show the widget of tqdm if the notebook has ipywidgets, else its bar of text."""
    from tqdm.auto import tqdm

    with tqdm(desc=description, unit=f" {unit}") as bar:

        def report(done: int, total: int | None) -> None:
            if total != bar.total:
                bar.reset(total)
            bar.update(done - bar.n)

        yield report


def _rate(rate: float, unit: str) -> str:
    """Format a rate per second, or per minute if it is below one per second."""
    if 0 < rate < 1:
        return f"{60 * rate:.1f} {unit}/min"
    return f"{rate:.{0 if rate >= 10 or rate == 0 else 1}f} {unit}/s"


def clock_time(seconds: float) -> str:
    """Format seconds as minutes and seconds, or as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _peak() -> str:
    most = peak_memory()
    return f", peak {most / 2**20:.0f} MiB" if most else ""
