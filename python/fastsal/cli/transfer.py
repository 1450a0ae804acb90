"""`fastsal transfer`: the transfer study of one model, from options."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from fastsal.cli import options
from fastsal.errors import InvalidArgument


@click.command(short_help="Prune on one task, measure on tasks it never saw.")
@options.model_options
@click.option(
    "--task",
    "tasks",
    multiple=True,
    required=True,
    metavar="NAME=DATA",
    help="A task: a folder, an .npz, torchvision:NAME?root=..., hf:NAME, sklearn:digits; "
    "may be repeated.",
)
@click.option(
    "--test",
    "tests",
    multiple=True,
    metavar="NAME=DATA",
    help="Images of its own to test a task on. [default: cut from its data]",
)
@click.option(
    "--classes",
    multiple=True,
    metavar="NAME=A,B,...",
    help="Classes of a task, by name or number. [default: all]",
)
@click.option(
    "--source", "sources", multiple=True, required=True, metavar="NAME", help="Task to prune on."
)
@click.option(
    "--criterion",
    "criteria",
    multiple=True,
    default=("obs-greedy", "magnitude"),
    show_default=True,
    help=options.CRITERIA_HELP,
)
@click.option(
    "--sparsity",
    "sparsities",
    metavar="NUMBERS",
    callback=options.floats,
    default="0.5,0.7,0.9",
    show_default=True,
    help="Shares of weights to prune.",
)
@click.option("--rounds", type=options.COUNT, default=1, show_default=True, help="Pruning steps.")
@click.option(
    "--seeds", type=options.COUNT, default=1, show_default=True, help="Draws of the images."
)
@click.option(
    "--samples",
    type=options.COUNT,
    help="Images of the statistics. [default: what there is, at most 1024]",
)
@click.option("--block-size", type=options.COUNT, default=64, show_default=True, help="Weights.")
@click.option(
    "--head",
    type=click.Choice(["ridge", "knn", "probe", "own"]),
    default="ridge",
    show_default=True,
    help="Through which tasks are measured; own is the model's classifier.",
)
@click.option(
    "--epochs", type=click.IntRange(min=0), default=0, show_default=True, help="Of fine-tuning."
)
@click.option("--lr", type=float, default=0.01, show_default=True, help="Learning rate of it.")
@click.option("--diagnostics", is_flag=True, help="Measure loss lines and Fisher overlaps.")
@click.option("--size", type=options.COUNT, help="Of the images. [default: the model's]")
@click.option("--batch-size", type=options.COUNT, default=64, show_default=True, help="A pass.")
@click.option(
    "--save",
    type=click.Choice(["none", "masks", "models"]),
    default="none",
    show_default=True,
    help="What is kept of every cell.",
)
@click.option("--retry-failed", is_flag=True, help="Try cells again that failed before.")
@click.option("--threads", type=options.COUNT, help="Threads to compute with. [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option(
    "--out", type=options.PATH, required=True, metavar="DIR", help="Folder of the results."
)
@click.pass_context
def transfer(ctx: click.Context, /, **given: Any) -> None:
    """Prune MODEL on a task, and measure it there and on tasks that pruning never saw.

    Every task gets a head on the dense features, which then stays; with --epochs the pruned model
    is fine-tuned on its source, and measured again. Tables and a page are written to --out.

    Example: fastsal transfer resnet50 --weights pretrained --task pets=data/pets
    --task cars=data/cars --source pets --out study
    """
    from fastsal.cli.inputs import set_threads
    from fastsal.cli.study import run_and_report
    from fastsal.study.settings.fields import Reader
    from fastsal.study.settings.reading import study_of

    set_threads(given["threads"])
    study = study_of(Reader(_table(given), file="transfer"), Path.cwd())
    run_and_report(
        ctx,
        study,
        given["out"],
        command=shlex.join(["fastsal", *sys.argv[1:]]),
        retry=given["retry_failed"],
        quiet=given["quiet"],
        as_json=given["as_json"],
    )


def _table(given: dict[str, Any]) -> dict[str, Any]:
    """Write options as the table of a study's file would be."""
    data = _pairs(given["tasks"], "task")
    tests, classes = _pairs(given["tests"], "test"), _pairs(given["classes"], "classes")
    for option, pairs in (("test", tests), ("classes", classes)):
        for name in pairs:
            if name not in data:
                raise InvalidArgument(
                    f"{option}: there is no task {name!r}; takes {', '.join(data)}"
                )
    tasks: list[dict[str, Any]] = []
    for name, path in data.items():
        tasks.append({"name": name, "data": path})
        if name in tests:
            tasks[-1]["test"] = tests[name]
        if name in classes:
            tasks[-1]["classes"] = [
                int(c) if c.isdigit() else c for c in classes[name].split(",") if c
            ]
    model = {"name": Path(given["model"].rpartition(":")[0] or given["model"]).stem}
    model |= {k: given[k] for k in ("model", "weights", "num_classes", "in_chans", "size")}
    table: dict[str, Any] = {
        "name": model["name"],
        "models": [{k: v for k, v in model.items() if v is not None}],
        "tasks": tasks,
        "sources": [{"name": name, "tasks": [name]} for name in given["sources"]],
        "criteria": [{"criterion": name} for name in given["criteria"]],
        "sparsities": given["sparsities"],
        "seeds": list(range(given["seeds"])),
        "rounds": [given["rounds"]],
        **({} if given["samples"] is None else {"samples": given["samples"]}),
        **{k: given[k] for k in ("block_size", "batch_size", "head", "save")},
    }
    if given["epochs"]:
        table["finetune"] = {"epochs": given["epochs"], "lr": given["lr"]}
    if given["diagnostics"]:
        table["diagnostics"] = {}
    return table


def _pairs(values: tuple[str, ...], option: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not equals or not name or not rest:
            raise InvalidArgument(f"{option}: got {value!r}; takes NAME=VALUE")
        if name in found:
            raise InvalidArgument(f"{option}: {name!r} stands twice")
        found[name] = rest
    return found
