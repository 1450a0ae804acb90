"""The command `fastsal`: one file per command; torch is imported only when a command runs."""

from __future__ import annotations

import click

from fastsal.cli.bench.command import bench as bench_command
from fastsal.cli.compensate import compensate as compensate_command
from fastsal.cli.demo.command import demo as demo_command
from fastsal.cli.evaluate import evaluate as evaluate_command
from fastsal.cli.export import export as export_command
from fastsal.cli.finetune import finetune as finetune_command
from fastsal.cli.group import Group
from fastsal.cli.inspect import inspect as inspect_command
from fastsal.cli.measure import measure as measure_command
from fastsal.cli.plan import plan as plan_command
from fastsal.cli.prune import prune as prune_command
from fastsal.cli.rank import rank as rank_command
from fastsal.cli.report import report as report_command
from fastsal.cli.score import score as score_command
from fastsal.cli.sweep import sweep as sweep_command
from fastsal.cli.transfer import transfer as transfer_command
from fastsal.cli.verify import verify as verify_command
from fastsal.utils.machine import fastsal_version

__all__ = ["main"]


# Help pages are at most this wide.
_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=Group, context_settings=_SETTINGS)
@click.version_option(version=fastsal_version(), prog_name="fastsal")
@click.option(
    "--debug", is_flag=True, envvar="FASTSAL_DEBUG", help="Show the traceback of an error."
)
def main(debug: bool) -> None:
    """Second-order saliency and pruning of pre-trained vision models.

    MODEL is the name of a timm model, or file.py:function, a function that returns a module. Images
    are a folder with one folder per class, or an .npz file with x (uint8, [n, h, w] or [n, h, w,
    c]) and y (integer, [n]). Invalid input exits with status 2 and a one-line message.
    """


# Imported under other names: `fastsal.cli.prune` is the module.
_COMMANDS = (
    prune_command, plan_command, score_command, rank_command, compensate_command,
    finetune_command, evaluate_command, verify_command, inspect_command, transfer_command,
    export_command, measure_command, sweep_command, report_command, bench_command, demo_command,
)  # fmt: skip
for _command in _COMMANDS:
    main.add_command(_command)
