"""`fastsal finetune`: train what is kept of a pruned model; what is pruned stays zero."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastsal.cli import options
from fastsal.errors import InvalidArgument, MaskError

if TYPE_CHECKING:
    from torch import nn

    from fastsal.data.image_set import ImageBatches
    from fastsal.finetuning.finetune import FinetuneResult
    from fastsal.pruning.masks.masks import Masks


@click.command(short_help="Train a pruned model; zeros stay.")
@options.model_options
@click.option(
    "--masks",
    type=options.PATH,
    metavar="FILE|DIR",
    help="The masks, or a run's folder. [default: the folder of --weights]",
)
@click.option("--data", type=options.PATH, required=True, help="Labelled images to train on.")
@click.option(
    "--samples",
    type=options.COUNT,
    help="Images to use: the first, or drawn by --seed where sorted by class. [default: all]",
)
@click.option("--epochs", type=options.COUNT, required=True, help="Passes over the images.")
@click.option("--lr", type=float, required=True, help="Learning rate to begin with.")
@click.option(
    "--optimizer", metavar="NAME", default="sgd", show_default=True, help="As timm calls it."
)
@click.option("--momentum", type=float, default=0.9, show_default=True, help="Where it has one.")
@click.option(
    "--weight-decay",
    type=float,
    default=0.0,
    show_default=True,
    help="Of weights with two axes or more.",
)
@click.option(
    "--schedule",
    type=click.Choice(["cosine", "linear", "constant"]),
    default="cosine",
    show_default=True,
    help="Of the learning rate.",
)
@click.option(
    "--held-out",
    type=options.PATH,
    help="Labelled images; the epoch of least loss on them is kept.",
)
@click.option(
    "--patience",
    type=options.COUNT,
    metavar="EPOCHS",
    help="Stop after so many without a lower held-out loss. [default: never]",
)
@click.option(
    "--frozen",
    multiple=True,
    metavar="PATTERN",
    help="Name or pattern of parameters that stay as they are; may be repeated.",
)
@click.option("--train-head", is_flag=True, help="Train the classifier too.")
@click.option(
    "--train-normalization",
    "--train-normalisation",
    "train_normalization",
    is_flag=True,
    help="Train normalization layers too.",
)
@click.option(
    "--autocast",
    type=click.Choice(["bfloat16", "float16"]),
    help="Type of the passes. [default: the model's]",
)
@click.option(
    "--checkpoint",
    type=options.PATH,
    metavar="FILE",
    help="Keep the state between epochs; the same command goes on from it.",
)
@click.option("--test", type=options.PATH, help="Labelled images to measure accuracy on.")
@options.input_options
@options.run_options
@options.out_option("DIR", "Folder for the model, its masks and the report.")
def finetune(**given: Any) -> None:
    """Train the kept weights of the pruned MODEL and write the model, its masks and a report.

    Images come in a new order each epoch. Pruned weights must be zero before, and are proven to be
    after. Head and normalisation stay as they are unless asked for.

    Example: fastsal finetune resnet18 --weights run --data images --epochs 5 --lr 0.01 --out tuned
    """
    from fastsal.cli.inputs import check_test, open_batches, open_model, set_threads
    from fastsal.cli.output import console, emit, run_summary
    from fastsal.cli.runfolder import check_target, run_facts, write_run
    from fastsal.transfer.evaluation import measure
    from fastsal.utils.clock import Clock
    from fastsal.utils.progress import reporter

    check_target(given["out"], given["force"])
    set_threads(given["threads"])
    clock = Clock()
    with clock.step("load"):
        model, spec = open_model(given)
        masks = _fitting_masks(given, model)
        batches = open_batches(
            given, model, spec, given["data"], samples=given["samples"], shuffle=True
        )
        held_out = given["held_out"] and open_batches(given, model, spec, given["held_out"])
        test = given["test"] and open_batches(given, model, spec, given["test"])
    accuracy: dict[str, Any] = {}
    if held_out:
        check_test(batches, held_out, "held_out")
    if test:
        check_test(batches, test)
        with clock.step("test"), reporter(not given["quiet"], "accuracy before") as report:
            accuracy["before"] = measure(model, test, report=report)._asdict()
    with clock.step("train"):
        done = _trained(given, model, masks, batches, held_out or None)
    if test:
        with clock.step("test"), reporter(not given["quiet"], "accuracy after") as report:
            accuracy["after"] = measure(model, test, report=report)._asdict()
    masks.verify(model)
    result = {
        **run_facts(given, masks),
        "samples": batches.samples,
        "history": done.history,
        "kept_epoch": done.kept_epoch,
        "held_out_loss_before": done.before,
        "accuracy": accuracy,
        "seconds": clock.rounded(3),
    }
    names = ("epochs", "lr", "optimizer", "momentum", "weight_decay", "schedule", "seed")
    how = {"data": str(given["data"]), **{name: given[name] for name in names}}
    recipe = {"finetuned": how}
    write_run(given["out"], model, masks, recipe, result)
    if given["as_json"]:
        emit({**result, "out": str(given["out"])})
        return
    screen = console()
    screen.print(_table(done))
    screen.print(f"\n[bold]epoch {done.kept_epoch} kept; {run_summary(result)}[/bold]")
    screen.print(f"Written to {given['out']}", soft_wrap=True)


def _fitting_masks(given: dict[str, Any], model: nn.Module) -> Masks:
    """Load `--masks`, or those of the folder of `--weights`; the model's zeros are proven."""
    import fastsal
    from fastsal.cli.runfolder import masks_file

    path = given["masks"]
    if path is None:
        path = Path(given["weights"] or "")
        if given["weights"] is None or not path.is_dir():
            raise InvalidArgument(
                "masks: are missing; give --masks, or a run's folder as --weights"
            )
    masks = fastsal.Masks.load(masks_file(path))
    try:
        masks.verify(model)
    except MaskError as error:
        raise MaskError(f"{error}; takes the weights that were pruned with these masks") from None
    return masks


def _trained(
    given: dict[str, Any],
    model: nn.Module,
    masks: Masks,
    batches: ImageBatches,
    held_out: ImageBatches | None,
) -> FinetuneResult:
    """Train `model` in place."""
    import torch

    import fastsal
    from fastsal.data.shuffled import Shuffled

    names = (
        "epochs", "lr", "optimizer", "momentum", "weight_decay", "schedule", "patience", "frozen",
        "train_head", "train_normalization", "checkpoint", "seed",
    )  # fmt: skip
    return fastsal.finetune(
        model,
        Shuffled(batches),
        masks,
        held_out=held_out,
        autocast=getattr(torch, given["autocast"]) if given["autocast"] else None,
        progress=not given["quiet"],
        **{name: given[name] for name in names},
    )


def _table(done: FinetuneResult) -> Any:
    """Table of the epochs; what came before and what was not kept is dim."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("epoch", "lr", "loss", "held-out loss", "s"):
        table.add_column(title, justify="right")
    before = "" if done.before is None else f"{done.before:.4f}"
    table.add_row("0", "", "", before, "", style=None if done.kept_epoch == 0 else "dim")
    for line in done.history:
        held_out = line["held_out_loss"]
        table.add_row(
            str(line["epoch"]),
            f"{line['lr']:g}",
            f"{line['loss']:.4f}",
            "" if held_out is None else f"{held_out:.4f}",
            f"{line['seconds']:.1f}",
            style=None if line["epoch"] == done.kept_epoch else "dim",
        )
    return table
