"""`fastsal sweep`: a whole study from its file, cell by cell."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from fastsal.cli import options


@click.command(short_help="Run a study: prune, evaluate, fine-tune, over a grid.")
@click.argument("study", type=options.PATH)
@click.option(
    "--out", type=options.PATH, metavar="DIR", help="Folder of the results. [default: results/NAME]"
)
@click.option(
    "--root",
    type=options.PATH,
    metavar="DIR",
    help="Folder that data and weights are below. [default: the file's own root]",
)
@click.option("--retry-failed", is_flag=True, help="Try cells again that failed before.")
@click.option("--dry-run", is_flag=True, help="List the cells and which are done; run nothing.")
@click.option("--threads", type=options.COUNT, help="Threads to compute with. [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.pass_context
def sweep(ctx: click.Context, /, **given: Any) -> None:
    """Run the study that the file STUDY describes, and write its tables and report.

    A cell is one model, source, criterion, number of rounds, seed and sparsity. Each is written
    when it is done: a sweep that was cut off goes on by the same command, to the same table. Cells
    that fail are recorded and do not stop the others; the status is then 1.

    Example: fastsal sweep studies/cifar.toml --out results/cifar
    """
    from fastsal.cli.inputs import set_threads
    from fastsal.cli.study import print_cells, run_and_report
    from fastsal.study.settings.reading import load_study

    set_threads(given["threads"])
    study = load_study(given["study"], root=given["root"])
    out = given["out"] or Path("results") / study.name
    if given["dry_run"]:
        print_cells(study, out, as_json=given["as_json"])
        return
    words = ["fastsal", "sweep", str(given["study"])]
    if given["root"] is not None:
        words += ["--root", str(given["root"])]
    run_and_report(
        ctx,
        study,
        out,
        command=shlex.join([*words, "--out", str(out)]),
        retry=given["retry_failed"],
        quiet=given["quiet"],
        as_json=given["as_json"],
    )
