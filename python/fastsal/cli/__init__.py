"""The command `fastsal`: one file per command; torch is imported only when a command runs."""

from __future__ import annotations

import click

from fastsal.cli.bench.command import bench
from fastsal.cli.compensate import compensate
from fastsal.cli.demo.command import demo
from fastsal.cli.evaluate import evaluate
from fastsal.cli.finetune import finetune
from fastsal.cli.group import Group
from fastsal.cli.plan import plan
from fastsal.cli.prune import prune
from fastsal.cli.rank import rank
from fastsal.cli.report import report
from fastsal.cli.score import score
from fastsal.cli.sweep import sweep
from fastsal.cli.transfer import transfer
from fastsal.cli.verify import verify
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


_COMMANDS = (
    prune, plan, score, rank, compensate, finetune, evaluate, verify,
    transfer, sweep, report, bench, demo,
)  # fmt: skip
for _command in _COMMANDS:
    main.add_command(_command)
