"""`fastsal compensate`: move the kept weights so as to make up for the pruned ones."""

from __future__ import annotations

from typing import Any

import click

from fastsal.cli import options


@click.command(short_help="Make up for pruned weights.")
@options.model_options
@click.option("--masks", type=options.PATH, required=True, help="The masks, or a run's folder.")
@options.statistics_options
@click.option(
    "--statistics", type=options.PATH, metavar="FILE", help="Use these instead of --data."
)
@options.damping_option("0.1x")
@options.input_options
@options.run_options
@options.out_option("FILE", "The compensated weights, safetensors.")
def compensate(**given: Any) -> None:
    """Set the pruned weights of the dense MODEL to zero and move the kept ones to the optimum."""
    import fastsal
    from fastsal.cli.inputs import (
        collect,
        open_model,
        refuse_overwrite,
        set_threads,
        training_batches,
    )
    from fastsal.cli.output import console, emit
    from fastsal.cli.runfolder import masks_file
    from fastsal.errors import InvalidArgument
    from fastsal.models.weights import save_weights

    if (given["statistics"] is None) == (given["data"] is None):
        raise InvalidArgument("data: takes one of --data and --statistics")
    if given["out"].suffix != ".safetensors":
        raise InvalidArgument(f"out: got {given['out']}; takes a .safetensors file")
    refuse_overwrite(given["out"], given["force"])
    set_threads(given["threads"])
    model, spec = open_model(given)
    masks = fastsal.Masks.load(masks_file(given["masks"]))
    if given["statistics"] is not None:
        fisher = fastsal.BlockFisher.load(given["statistics"])
    else:
        if not given["parameters"]:
            given["parameters"] = tuple(masks)
        batches = training_batches(given, model, spec)
        assert batches is not None  # --data is given
        fisher = collect(given, model, batches)
    report = fastsal.compensate(model, fisher, masks, damping=given["damping"])
    masks.verify(model)
    save_weights(model, given["out"])
    result = {
        "sparsity": masks.sparsity,
        "parameters": len(masks),
        "samples": fisher.samples,
        "damping": report.damping,
        "out": str(given["out"]),
    }
    if given["as_json"]:
        emit(result)
        return
    console().print(
        f"{len(masks)} parameters compensated, sparsity {masks.sparsity:.4f}; written to "
        f"{given['out']}",
        soft_wrap=True,
    )
