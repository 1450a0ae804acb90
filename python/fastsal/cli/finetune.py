"""`fastsal finetune`: fine-tune a pruned model; pruned weights remain zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fastsal.cli import options
from fastsal.cli.help import Command
from fastsal.cli.types import COUNT, NUMBER, PATH, choice
from fastsal.errors import InvalidArgument, MaskError
from fastsal.utils.choices import SCHEDULES
from fastsal.utils.paths import user_path

if TYPE_CHECKING:
    from torch import nn

    from fastsal.data.image_set import ImageBatches
    from fastsal.finetuning.finetune import FinetuneResult
    from fastsal.pruning.masks.masks import Masks


@click.command(cls=Command, short_help="Fine-tune a pruned model, keeping its masks.")
@options.model_options
@options.masks_option(default="those in the folder of --weights")
@click.option("--data", type=PATH, required=True, help="Labeled images to train on.")
@options.samples_option()
@click.option("--epochs", type=COUNT, required=True, help="Number of passes over the images.")
@click.option("--lr", type=NUMBER, required=True, help="Initial learning rate.")
@click.option(
    "--optimizer",
    metavar="NAME",
    default="sgd",
    show_default=True,
    help="Name of the optimizer in timm, for example sgd or adamw.",
)
@click.option(
    "--momentum",
    type=NUMBER,
    default=0.9,
    show_default=True,
    help="Momentum of the optimizer, if it has one.",
)
@click.option(
    "--weight-decay",
    type=NUMBER,
    default=0.0,
    show_default=True,
    help="Weight decay; parameters with fewer than two axes are exempt.",
)
@click.option(
    "--schedule",
    type=choice(SCHEDULES),
    default="cosine",
    show_default=True,
    help="Schedule of the learning rate; cosine and linear end at zero.",
)
@click.option(
    "--held-out",
    type=PATH,
    help="Labeled held-out images; the weights of the epoch with the lowest loss on them are kept.",
)
@click.option(
    "--patience",
    type=COUNT,
    metavar="EPOCHS",
    show_default="no early stop",
    help="Number of epochs without a lower held-out loss after which training stops.",
)
@click.option(
    "--frozen",
    multiple=True,
    metavar="PATTERN",
    help="Name or wildcard pattern of parameters to freeze; may be repeated.",
)
@click.option("--train-head", is_flag=True, help="Also train the classifier; frozen by default.")
@click.option(
    "--head",
    metavar="NAME",
    show_default="found",
    help="Name of the layer that is the classifier.",
)
@click.option(
    "--train-normalization",
    is_flag=True,
    help="Also train the normalization layers; frozen by default.",
)
@click.option(
    "--checkpoint",
    type=PATH,
    metavar="FILE",
    help="File for the state after each epoch; rerun the same command to resume from it.",
)
@options.test_option
@options.input_options
@options.device_options
@options.run_options
@options.out_option("DIR", "Folder for the fine-tuned model, its masks and the report.")
def finetune(**given: Any) -> None:
    """Fine-tune the kept weights of the pruned MODEL and write the model, its masks and a report.

    Pruned weights must be zero at the start, and are verified to be zero at the end. The images are
    shuffled in every epoch. The classifier and the normalization layers are frozen by default.

    Example: fastsal finetune resnet18 --weights run --data images --epochs 5 --lr 0.01 --out tuned
    """
    from fastsal.cli.accuracy import MeasuredAccuracy
    from fastsal.cli.inputs import (
        check_apart,
        check_test,
        image_size,
        open_batches,
        open_model,
        set_threads,
    )
    from fastsal.cli.output import console, emit, print_selection, run_summary
    from fastsal.cli.runfolder import (
        check_model,
        check_target,
        run_facts,
        selection_facts,
        write_run,
    )
    from fastsal.models.left_out import left_out
    from fastsal.utils.clock import Clock

    check_target(given["out"], given["force"])
    check_apart(given, "checkpoint")
    set_threads(given["threads"])
    clock = Clock()
    with clock.step("load"):
        model, spec = open_model(given)
        check_model(given["out"], model)
        masks = _fitting_masks(given, model)
        batches = open_batches(
            given, model, spec, given["data"], samples=given["samples"], shuffle=True
        )
        held_out = given["held_out"] and open_batches(given, model, spec, given["held_out"])
        test = given["test"] and open_batches(given, model, spec, given["test"])
    if held_out:
        check_test(batches, held_out, "held_out")
    if test:
        check_test(batches, test)
    accuracy = MeasuredAccuracy(given, model, test, clock)
    accuracy.measure("before", "accuracy before")
    with clock.step("train"):
        done = _trained(given, model, masks, batches, held_out or None)
    accuracy.measure("after", "accuracy after")
    masks.check(model)
    rest, in_use = left_out(model, masks), masks.in_use(model)
    result = {
        **run_facts(given, masks),
        "image_size": image_size(spec, batches),
        "samples": batches.samples,
        "history": done.history,
        "kept_epoch": done.kept_epoch,
        "held_out_loss_before": done.before,
        "accuracy": accuracy.found,
        **selection_facts(rest, in_use),
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
    screen.print(f"\nepoch {done.kept_epoch} kept; {run_summary(result)}", style="bold")
    print_selection(screen, rest, in_use)
    screen.print(f"Written to {given['out']}", soft_wrap=True)


def _fitting_masks(given: dict[str, Any], model: nn.Module) -> Masks:
    """Load `--masks`, or those in the folder of `--weights`, and verify the model's zeros."""
    import fastsal
    from fastsal.cli.runfolder import masks_file

    path = given["masks"]
    if path is None:
        path = user_path(given["weights"] or "")
        if given["weights"] is None or not path.is_dir():
            raise InvalidArgument("--masks is required unless --weights is the folder of a run")
    masks = fastsal.Masks.load(masks_file(path))
    try:
        masks.check(model)
    except MaskError as error:
        raise MaskError(
            f"{error}; the weights must be those that were pruned with these masks"
        ) from None
    return masks


def _trained(
    given: dict[str, Any],
    model: nn.Module,
    masks: Masks,
    batches: ImageBatches,
    held_out: ImageBatches | None,
) -> FinetuneResult:
    """Train `model` in place."""
    import fastsal
    from fastsal.cli.inputs import autocast_type
    from fastsal.data.shuffled import Shuffled

    names = (
        "epochs", "lr", "optimizer", "momentum", "weight_decay", "schedule", "patience", "frozen",
        "train_head", "train_normalization", "head", "checkpoint", "seed",
    )  # fmt: skip
    return fastsal.finetune(
        model,
        Shuffled(batches),
        masks,
        held_out=held_out,
        autocast=autocast_type(given),
        progress=not given["quiet"],
        **{name: given[name] for name in names},
    )


def _table(done: FinetuneResult) -> Any:
    """Return a table of the epochs; all but the kept epoch are dim."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("epoch", "learning rate", "loss", "held-out loss", "seconds"):
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
