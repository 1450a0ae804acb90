"""`fastsal eval`: accuracy and loss of a model."""

from __future__ import annotations

from typing import Any

import click

from fastsal.cli import options


@click.command("eval", short_help="Accuracy and loss of a model.")
@options.model_options
@click.option("--data", type=options.PATH, required=True, help="Labelled images to measure on.")
@click.option(
    "--samples", type=options.COUNT, help="Images to use, drawn by --seed. [default: all]"
)
@options.input_options
@options.run_options
def evaluate(**given: Any) -> None:
    """Measure the top-1 accuracy and the mean cross-entropy of MODEL.

    --weights takes the folder of a run: its pruned model.
    """
    from fastsal.cli.inputs import open_batches, open_model, set_threads
    from fastsal.cli.output import console, emit
    from fastsal.transfer.evaluation import measure
    from fastsal.utils.progress import reporter

    set_threads(given["threads"])
    model, spec = open_model(given)
    batches = open_batches(
        given, model, spec, given["data"], samples=given["samples"], shuffle=True
    )
    with reporter(not given["quiet"], "accuracy") as report:
        result = measure(model, batches, report=report)
    if given["as_json"]:
        emit(result._asdict())
        return
    console().print(
        f"accuracy {result.accuracy:.4f}  loss {result.loss:.4f} nats  ({result.samples} images)"
    )
