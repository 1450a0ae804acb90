"""`fastsal sweep`: run a study described by a file, cell by cell."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from fastsal.cli import options
from fastsal.cli.help import Command
from fastsal.cli.types import PATH


@click.command(cls=Command, short_help="Run a study: prune, evaluate and fine-tune over a grid.")
@click.argument("study", type=PATH)
@click.option(
    "--out",
    type=PATH,
    metavar="DIR",
    show_default="results/NAME",
    help="Folder for the results; rerun the same command to resume.",
)
@click.option(
    "--root",
    type=PATH,
    metavar="DIR",
    show_default="the root in STUDY",
    help="Folder that paths of data and weights are relative to.",
)
@click.option("--retry-failed", is_flag=True, help="Rerun cells that failed before.")
@click.option(
    "--no-wait",
    is_flag=True,
    help="Exit when no cell is left to start, instead of waiting for those of other processes.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Do not run STUDY; print its cells, images, time and memory, and the files it lacks.",
)
@click.option("--no-time", is_flag=True, help="Skip the trial passes of --dry-run.")
@options.device_option(None)
@options.threads_option
@options.json_option
@options.quiet_option
@click.pass_context
def sweep(ctx: click.Context, /, **given: Any) -> None:
    """Run the study described by the TOML file STUDY, and write its tables and report.

    A cell is one combination of model, source, criterion, number of rounds, seed and sparsity. Each
    cell is saved when it is finished: rerun the same command to resume an interrupted sweep. A
    failed cell is recorded and does not stop the others; the exit status is then 1.

    The same command in other terminals, jobs or machines that share the folder joins in: cells are
    shared out, a cell of a killed process is computed by another one, and the last process to
    finish writes the tables and the report.

    With --dry-run the exit status is 1 if files are missing.

    Example: fastsal sweep studies/cifar.toml --out results/cifar
    """
    from fastsal.cli.dry_run import print_needs
    from fastsal.cli.inputs import set_threads
    from fastsal.cli.study import run_and_report
    from fastsal.study.settings.reading import load_study

    set_threads(given["threads"])
    study = load_study(given["study"], root=given["root"])
    if given["device"] is not None:
        study = replace(study, device=given["device"])
    out = given["out"] or Path("results") / study.name
    if given["dry_run"]:
        print_needs(ctx, study, out, as_json=given["as_json"], calibrates=not given["no_time"])
        return
    words = ["fastsal", "sweep", str(given["study"])]
    if given["root"] is not None:
        words += ["--root", str(given["root"])]
    if given["device"] is not None:
        words += ["--device", given["device"]]
    run_and_report(
        ctx,
        study,
        out,
        command=shlex.join([*words, "--out", str(out)]),
        retry=given["retry_failed"],
        quiet=given["quiet"],
        as_json=given["as_json"],
        wait=not given["no_wait"],
    )
