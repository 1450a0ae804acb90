"""Live table of a sweep on a terminal: cells, remaining time, and the best criterion so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console, RenderableType

    from fastsal.study.status import Status

_SHOWN = 3  # cells of other processes that are named


class LiveTable:
    """A table on stderr that follows the status of a study, inside a `with` block.

    Args:
        screen: Console to draw on; None uses stderr.
        clock: Seconds of a clock that only advances.
    """

    def __init__(
        self, screen: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from rich.console import Console
        from rich.live import Live

        self._clock = clock
        self._start = clock()
        self._status: Status | None = None
        # The table of results follows on stdout.
        self._live = Live(
            get_renderable=self.render,
            console=screen or Console(stderr=True),
            refresh_per_second=2,
            transient=True,
        )

    def __enter__(self) -> LiveTable:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def __call__(self, status: Status) -> None:
        """Show a status."""
        self._status = status

    def render(self) -> RenderableType:
        """Return what is shown at this moment."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        status = self._status
        if status is None:
            return Text("opening images and models")
        table = Table(box=None, pad_edge=False, header_style="bold")
        best = status.best()
        several = len({each.model for each in best}) > 1
        if several:
            table.add_column("model")
        table.add_column("sparsity", justify="right", no_wrap=True)
        table.add_column("cells", justify="right", no_wrap=True)
        table.add_column("best so far")
        for name in ("source", "unseen"):
            table.add_column(name, justify="right", no_wrap=True)
        for each in best:
            row = [f"{each.sparsity:g}", f"{each.done}/{each.cells}", each.criterion or ""]
            row += ["" if v is None else f"{v:.3f}" for v in (each.source, each.unseen)]
            table.add_row(*([each.model] if several else []), *row)
        lines = [Text(self._summary(status), style="bold"), Text(_now(status), style="dim")]
        return Group(*lines, table)

    def _summary(self, status: Status) -> str:
        from fastsal.utils.progress import clock_time

        done = len(status.cells) - status.left
        seconds = self._clock() - self._start
        text = f"{status.name}: {done}/{len(status.cells)} cells, {clock_time(seconds)}"
        computed = status.todo - status.left
        if computed > 0 and status.left:
            text += f", {clock_time(seconds / computed * status.left)} left"
        return text + (f", {status.failed} failed" if status.failed else "")


def _now(status: Status) -> str:
    """Return what this process and others compute."""
    cell = status.here
    if cell is not None:
        text = (
            f"now: {cell.model.name}, {cell.source.name}, {cell.criterion.name}, seed {cell.seed}, "
            f"sparsity {cell.sparsity:g}"
        )
    else:
        text = "waiting for other processes" if status.others else ""
    if not status.others:
        return text
    named = [f"{key} ({process})" for key, process in list(status.others.items())[:_SHOWN]]
    more = f" and {len(status.others) - _SHOWN} more" if len(status.others) > _SHOWN else ""
    return f"{text}; others: {', '.join(named)}{more}"
