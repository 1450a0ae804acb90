"""`fastsal bench`: time the core and the gradient engine against their alternatives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fastsal.cli import options
from fastsal.cli.help import Command
from fastsal.cli.types import PATH

if TYPE_CHECKING:
    from fastsal.cli.bench.timing import Result


@click.command(cls=Command, short_help="Time the core and the gradient engine against their peers.")
@click.option(
    "--full",
    is_flag=True,
    help="Use the sizes of the published figures (half an hour).",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    show_default="resnet18",
    help="Name of a timm model for the cases of statistics collection; may be repeated.",
)
@click.option("--only", metavar="TEXT", help="Run only the cases whose name contains TEXT.")
@options.threads_option
@click.option("--out", type=PATH, metavar="FILE", help="File for the results, as JSON.")
@options.json_option
def bench(**given: Any) -> None:
    """Time the core and the gradient engine, each alternating with its peer.

    Ratios of median times are printed. SparseML is a peer if it is installed (pip install --no-deps
    sparseml==1.8.0). No other program should run at the same time.
    """
    import os

    # Otherwise idle threads of one side spin on the cores that the other side uses.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from dataclasses import replace

    import torch

    import fastsal._core as _core
    from fastsal.cli.bench.cases import cases_of
    from fastsal.cli.bench.conditions import describe, refuse_debug_build
    from fastsal.cli.bench.sizes import BenchSize
    from fastsal.cli.bench.timing import run
    from fastsal.cli.output import console, emit
    from fastsal.utils.json_files import write_json

    refuse_debug_build()
    if given["threads"]:
        torch.set_num_threads(given["threads"])
        _core.set_num_threads(given["threads"])
    size = BenchSize.full() if given["full"] else BenchSize()
    if given["models"]:
        size = replace(size, models=given["models"])
    wanted = (c for c in cases_of(size) if not given["only"] or given["only"] in c.name)
    machine, results = describe(), []
    screen = console()
    for result in run(wanted):
        results.append(result)
        if not given["as_json"]:
            # Progress on stderr: a run lasts minutes.
            click.echo(_line(result), err=True)
    record = {
        "machine": machine,
        "results": [{**vars(r), "met": r.met} for r in results],
    }
    if given["out"]:
        write_json(given["out"], record)
    if given["as_json"]:
        emit(record)
        return
    screen.print(_table(results))
    screen.print(
        f"{machine['processor']}, {machine['instructions']}, {machine['threads']} threads; "
        f"torch {machine['torch']}, NumPy {machine['numpy']}; fresh memory "
        f"{machine['first touch of fresh memory, s/GiB']} s/GiB",
        soft_wrap=True,
    )


def _line(result: Result) -> str:
    if result.ratio is None:
        return f"{result.name}: {result.note}"
    return f"{result.name}: {result.ratio:.2f} {result.figure}"


def _table(results: list[Result]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, justify in (
        ("case", "left"),
        ("ours", "right"),
        ("peer", "right"),
        ("ratio", "right"),
    ):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    table.add_column("aim", justify="right")
    table.add_column("against")
    for r in results:
        if r.ratio is None:
            table.add_row(r.name, "", "", "", "", Text(r.note, "dim"))
            continue
        table.add_row(
            r.name,
            f"{r.ours:.3g} s",
            f"{r.theirs:.3g} s",
            Text(f"{r.ratio:.2f}", style="green" if r.met else "yellow"),
            f"{'≥' if r.at_least else '≤'} {r.limit:g}",
            Text.assemble(r.peer, (f"\n{r.note}" if r.note else "", "dim")),
        )
    return table
