"""The command `fastsal`. One file a command; torch is imported only when a command runs."""

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


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version=fastsal_version(), prog_name="fastsal")
@click.option("--debug", is_flag=True, envvar="FASTSAL_DEBUG", help="Show tracebacks of errors.")
def main(debug: bool) -> None:
    """Second-order saliency and pruning of pre-trained vision models.

    MODEL is a timm name or file.py:function. DATA is a folder with one folder of images per
    class, or an .npz file with x (uint8 [n, h, w] or [n, h, w, c]) and y.
    """


_COMMANDS = (
    prune, plan, score, rank, compensate, finetune, evaluate, verify,
    transfer, sweep, report, bench, demo,
)  # fmt: skip
for _command in _COMMANDS:
    main.add_command(_command)
