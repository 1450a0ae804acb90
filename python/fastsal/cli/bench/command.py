"""`fastsal bench`: how fast is it on this machine, against what one would use instead?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fastsal.cli import options

if TYPE_CHECKING:
    from fastsal.cli.bench import Result


@click.command(short_help="Time the parts against their peers.")
@click.option("--full", is_flag=True, help="The sizes of the published figures: half an hour.")
@click.option("--model", "models", multiple=True, metavar="NAME", help="timm models to collect.")
@click.option("--only", metavar="TEXT", help="Cases whose name contains TEXT.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the core and of PyTorch.")
@click.option("--out", type=options.PATH, metavar="FILE", help="Write the results as JSON.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
def bench(**given: Any) -> None:
    """Time the core and the gradient engine, each beside its peer in the same run.

    Prints ratios of medians. SparseML is compared where it is installed
    (pip install --no-deps sparseml==1.8.0). Nothing else should run at the same time.
    """
    import os

    # Idle threads of one side would otherwise spin on the cores of the other for a while.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from dataclasses import replace

    import torch

    import fastsal._core as _core
    from fastsal.cli.bench import Size, cases, describe, refuse_debug_build, run
    from fastsal.cli.output import console, emit
    from fastsal.utils.json_files import write_json

    refuse_debug_build()
    if given["threads"]:
        torch.set_num_threads(given["threads"])
        _core.set_num_threads(given["threads"])
    size = Size.full() if given["full"] else Size()
    if given["models"]:
        size = replace(size, models=given["models"])
    wanted = (c for c in cases(size) if not given["only"] or given["only"] in c.name)
    machine, results = describe(), []
    screen = console()
    for result in run(wanted):
        results.append(result)
        if not given["as_json"]:
            # Progress on the other stream: a run takes minutes.
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
            table.add_row(r.name, "", "", "", "", f"[dim]{r.note}[/dim]")
            continue
        colour = "green" if r.met else "yellow"
        table.add_row(
            r.name,
            f"{r.ours:.3g} s",
            f"{r.theirs:.3g} s",
            f"[{colour}]{r.ratio:.2f}[/{colour}]",
            f"{'≥' if r.at_least else '≤'} {r.limit:g}",
            r.peer + (f"\n[dim]{r.note}[/dim]" if r.note else ""),
        )
    return table
