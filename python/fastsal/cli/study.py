"""Run a study, write its report and print a summary: shared by `fastsal sweep` and `transfer`."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastsal.cli.group import Terminated, status_of, terminable
from fastsal.utils.plain_text import counted

if TYPE_CHECKING:
    from fastsal.study.settings.schema import Study

STATUS_FAILED_CELLS = 1


def run_and_report(
    ctx: click.Context,
    study: Study,
    out: Path,
    *,
    command: str,
    retry: bool,
    quiet: bool,
    as_json: bool,
    wait: bool = True,
) -> None:
    """Run a study to its end, write its report, and print a summary of the results.

    Under `torchrun` every process takes cells, and only that of rank 0 prints.
    """
    from fastsal.cli.live import LiveTable
    from fastsal.cli.output import console, emit
    from fastsal.study.runner import run_study

    is_first = os.environ.get("RANK", "0") == "0"
    try:
        with terminable(), contextlib.ExitStack() as stack:
            shows = is_first and not quiet
            table = stack.enter_context(LiveTable()) if shows and sys.stderr.isatty() else None
            done = run_study(
                study,
                out,
                command=command,
                retry=retry,
                wait=wait,
                progress=shows and table is None,
                watch=table,
            )
    except (KeyboardInterrupt, Terminated) as stop:
        click.echo(
            "interrupted: finished cells are saved; rerun the same command to resume", err=True
        )
        ctx.exit(status_of(stop))
    page = _report(out, is_due=done.has_written)
    if not is_first:
        pass
    elif as_json:
        emit(
            {
                "study": study.name,
                "out": str(out),
                "report": None if page is None else str(page),
                "cells": done.cells,
                "done_now": done.done,
                "elsewhere": done.elsewhere,
                "failed": done.failed,
                "rows": done.rows,
                "seconds": done.seconds,
            }
        )
    else:
        screen = console()
        screen.print(_table(done.rows))
        screen.print(
            f"\n{counted(done.cells, 'cell')}, {done.done} finished in this run "
            f"({done.seconds:.0f} s); {len(done.failed)} failed",
            style="bold",
        )
        for error, count in Counter(done.failed.values()).most_common():
            screen.print(f"  {counted(count, 'cell')}: {error}", soft_wrap=True)
        if done.warned:
            first = f"cells/{done.warned[0]}.json"
            words = f"{counted(len(done.warned), 'cell')} with warnings, see {first}"
            screen.print(words, style="dim", soft_wrap=True)
        if done.elsewhere:
            screen.print(
                f"{counted(done.elsewhere, 'cell')} still computed by other processes; the last "
                f"one writes the tables and the report to {out}",
                soft_wrap=True,
            )
        else:
            screen.print(f"Written to {page or out}", soft_wrap=True)
        if page is None and not done.elsewhere:
            screen.print("To write an HTML report: pip install 'fastsal[report]'")
    if done.failed:
        ctx.exit(STATUS_FAILED_CELLS)


def _report(out: Path, *, is_due: bool) -> Path | None:
    """Write the HTML report if it is due or missing, and return its path.

    None without Jinja2, or if there are no tables yet.
    """
    from importlib.util import find_spec

    from fastsal.utils.atomic import write_text

    path = out / "report.html"
    if find_spec("jinja2") is None or not (out / "results.csv").is_file():
        return None
    if not is_due and path.is_file():
        return path
    from fastsal.study.report import html
    from fastsal.study.report.results import read_results

    write_text(path, html.page(read_results(out)))
    return path


def _table(rows: Sequence[dict[str, Any]]) -> Any:
    """Return a table of mean accuracies on source and other tasks, before and after fine-tuning."""
    from rich.table import Table

    done = [row for row in rows if row["status"] == "done"]
    has_tuned = any(row["tuned"] is not None for row in done)
    columns = ("dense", "pruned", "tuned") if has_tuned else ("dense", "pruned")
    roles = ("source", "transfer")
    names = ("model", "source", "criterion", "rounds", "sparsity")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in done:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    # A column with one value in all rows is left out.
    shown = [
        i for i, name in enumerate(names) if name == "sparsity" or len({k[i] for k in groups}) > 1
    ]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i in shown:
        is_number = names[i] in ("rounds", "sparsity")
        table.add_column(names[i], justify="right" if is_number else "left", no_wrap=is_number)
    for role in roles:
        for column in columns:
            table.add_column(f"{role}\n{column}", justify="right", no_wrap=True)
    for key, mine in groups.items():
        values = []
        for role in roles:
            for column in columns:
                some = [r[column] for r in mine if r["role"] == role and r[column] is not None]
                values.append(f"{statistics.mean(some):.3f}" if some else "")
        words = [f"{key[i]:g}" if isinstance(key[i], float) else str(key[i]) for i in shown]
        table.add_row(*words, *values)
    return table
