"""`fastsal eval`: measure the accuracy and loss of a model."""

from __future__ import annotations

from typing import Any

import click

from fastsal.cli import options
from fastsal.cli.help import Command
from fastsal.cli.types import PATH
from fastsal.utils.plain_text import counted


@click.command("eval", cls=Command, short_help="Measure the accuracy and loss of a model.")
@options.model_options
@click.option("--data", type=PATH, required=True, help="Labeled images to evaluate on.")
@options.samples_option("a random draw by --seed")
@options.input_options
@options.device_options
@options.run_options
def evaluate(**given: Any) -> None:
    """Measure the top-1 accuracy and the mean cross-entropy of MODEL.

    To evaluate a pruned model, give the folder of its run as --weights. Image files are
    preprocessed as in timm's evaluation, at the size at which timm tests the model.

    Example: fastsal eval resnet18 --weights run --data images
    """
    from fastsal.cli.inputs import autocast_type, open_batches, open_model, set_threads
    from fastsal.cli.output import console, emit
    from fastsal.models.inputs import input_spec
    from fastsal.transfer.evaluation import measure
    from fastsal.utils.progress import reporter

    set_threads(given["threads"])
    model, spec = open_model({**given, "size": given["size"] or "test"})
    train = input_spec(model).size
    if given["size"] is None and spec.size is not None and spec.size != train:
        click.echo(
            f"note: images have {spec.size[0]}x{spec.size[1]} pixels, the test size of the model; "
            "--size train uses that of its training",
            err=True,
        )
    batches = open_batches(
        given, model, spec, given["data"], samples=given["samples"], shuffle=True
    )
    with reporter(not given["quiet"], "accuracy") as report:
        result = measure(
            model, batches, report=report, checks_labels=True, autocast=autocast_type(given)
        )
    if given["as_json"]:
        emit(result._asdict())
        return
    console().print(
        f"accuracy {result.accuracy:.4f}  loss {result.loss:.4f} nats  "
        f"({counted(result.samples, 'image')})"
    )
