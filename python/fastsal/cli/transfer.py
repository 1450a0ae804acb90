"""`fastsal transfer`: run a transfer study of one model, described by options."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from fastsal.cli import options
from fastsal.cli.help import Command
from fastsal.cli.types import COUNT, NUMBER, PATH, Integer, Registered, choice, parse_numbers
from fastsal.errors import InvalidArgument
from fastsal.utils.choices import CRITERION_NAMES, HEAD_KINDS, SAVED


@click.command(cls=Command, short_help="Prune on one task and measure on tasks unseen by pruning.")
@options.model_options
@click.option(
    "--task",
    "tasks",
    multiple=True,
    required=True,
    metavar="NAME=DATA",
    help="Task and its labeled images: a folder, an .npz file, torchvision:NAME?root=..., hf:NAME "
    "or sklearn:digits; may be repeated.",
)
@click.option(
    "--test",
    "tests",
    multiple=True,
    metavar="NAME=DATA",
    show_default="split from the task's data",
    help="Separate test images of a task; may be repeated.",
)
@click.option(
    "--classes",
    multiple=True,
    metavar="NAME=A,B,...",
    show_default="all",
    help="Classes of a task to use, by name or number; may be repeated.",
)
@click.option(
    "--class-map",
    "class_maps",
    multiple=True,
    metavar="NAME=FILE|imagenet|natural",
    show_default="classes in their order",
    help="For --head own: which output of the model each class of a task belongs to: a FILE with "
    "the name and the index of each class, imagenet for WordNet ids, or natural order; may be "
    "repeated.",
)
@click.option(
    "--source",
    "sources",
    multiple=True,
    required=True,
    metavar="NAME",
    help="Name of the task to prune on; may be repeated.",
)
@click.option(
    "--criterion",
    "criteria",
    multiple=True,
    type=Registered(list(CRITERION_NAMES)),
    default=("obs-greedy", "magnitude"),
    show_default=True,
    help="Saliency criterion to compare, or one that the file of MODEL registers; may be repeated.",
)
@click.option(
    "--sparsity",
    "sparsities",
    metavar="NUMBERS",
    callback=parse_numbers,
    default="0.5,0.7,0.9",
    show_default=True,
    help="Fractions of weights to prune, each in [0, 1], separated by commas.",
)
@options.rounds_option
@click.option(
    "--seeds",
    type=COUNT,
    default=1,
    show_default=True,
    help="Number of repetitions, each with another random draw of the images.",
)
@click.option(
    "--samples",
    type=COUNT,
    show_default="all, at most 1024",
    help="Number of images from which statistics are collected.",
)
@click.option(
    "--block-size",
    type=COUNT,
    default=64,
    show_default=True,
    help="Number of weights in a block of the Fisher matrix.",
)
@click.option(
    "--head",
    type=choice(HEAD_KINDS),
    default="ridge",
    show_default=True,
    help="Classifier fitted to the features of each task: ridge regression, nearest neighbors "
    "(knn), logistic regression (probe), or the model's own classifier (own).",
)
@click.option(
    "--epochs",
    type=Integer(least=0),
    default=0,
    show_default=True,
    help="Number of epochs of fine-tuning on the source task; 0 for none.",
)
@click.option(
    "--lr",
    type=NUMBER,
    default=0.01,
    show_default=True,
    help="Initial learning rate of fine-tuning.",
)
@click.option(
    "--diagnostics",
    is_flag=True,
    help="Also measure the loss on lines between weights and the overlap of Fisher matrices.",
)
@click.option(
    "--size",
    type=COUNT,
    show_default="the model's own",
    help="Size that images are resized to, in pixels.",
)
@options.crop_options
@click.option("--batch-size", type=COUNT, default=64, show_default=True, help="Images per batch.")
@click.option(
    "--save",
    type=choice(SAVED),
    default="none",
    show_default=True,
    help="Files to save for each cell besides its numbers.",
)
@click.option("--retry-failed", is_flag=True, help="Rerun cells that failed before.")
@options.device_options
@options.threads_option
@options.json_option
@options.quiet_option
@click.option(
    "--out",
    type=PATH,
    required=True,
    metavar="DIR",
    help="Folder for the results; rerun the same command to resume.",
)
@click.pass_context
def transfer(ctx: click.Context, /, **given: Any) -> None:
    """Prune MODEL on a source task; measure it there and on tasks unseen by pruning.

    For each task a head is fitted on dense features and then frozen. With --epochs the pruned model
    is also fine-tuned on the source task and measured again. Tables and a report are written to
    --out. A cell is one combination of source, criterion, seed and sparsity.

    Example: fastsal transfer resnet50 --weights pretrained --task pets=data/pets
    --task cars=data/cars --source pets --out study
    """
    from fastsal.cli.inputs import set_threads
    from fastsal.cli.study import run_and_report
    from fastsal.study.settings.fields import Reader
    from fastsal.study.settings.reading import study_of

    set_threads(given["threads"])
    study = study_of(Reader(_settings(given), file="transfer"), Path.cwd())
    run_and_report(
        ctx,
        study,
        given["out"],
        command=shlex.join(["fastsal", *sys.argv[1:]]),
        retry=given["retry_failed"],
        quiet=given["quiet"],
        as_json=given["as_json"],
    )


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options as the table of a study file."""
    from fastsal.cli.inputs import crop_arguments

    data = _pairs(given["tasks"], "task")
    tests, classes = _pairs(given["tests"], "test"), _pairs(given["classes"], "classes")
    class_maps = _pairs(given["class_maps"], "class-map")
    for option, pairs in (("test", tests), ("classes", classes), ("class-map", class_maps)):
        for name in pairs:
            if name not in data:
                raise InvalidArgument(
                    f"{option} must name one of the tasks {', '.join(data)}, got {name!r}"
                )
    tasks: list[dict[str, Any]] = []
    for name, path in data.items():
        tasks.append({"name": name, "data": path})
        if name in tests:
            tasks[-1]["test"] = tests[name]
        if name in class_maps:
            tasks[-1]["class_map"] = class_maps[name]
        if name in classes:
            # Names or numbers: folders may be called 0, 1, 10.
            tasks[-1]["classes"] = [c for c in classes[name].split(",") if c]
    model = {"name": Path(given["model"].rpartition(":")[0] or given["model"]).stem}
    names = ("model", "weights", "weights_key", "num_classes", "in_chans", "size")
    model |= {k: given[k] for k in (*names, "interpolation")} | crop_arguments(given)
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
        **{k: given[k] for k in ("block_size", "batch_size", "head", "save", "device")},
    }
    if given["autocast"]:
        table["autocast"] = given["autocast"]
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
            raise InvalidArgument(f"{option} must be NAME=VALUE, got {value!r}")
        if name in found:
            raise InvalidArgument(f"{option}: {name!r} is duplicated")
        found[name] = rest
    return found
