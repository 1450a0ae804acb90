"""`fastsal compensate`: update kept weights to compensate for pruned ones."""

from __future__ import annotations

from typing import Any

import click

from fastsal.cli import options
from fastsal.cli.help import Command
from fastsal.utils.plain_text import counted


@click.command(cls=Command, short_help="Update kept weights to compensate for pruned ones.")
@options.model_options
@options.masks_option(is_required=True)
@options.statistics_options
@options.statistics_file_option
@options.damping_option("0.1x")
@options.input_options
@options.device_options
@options.run_options
@options.out_option("FILE", "File for the compensated weights, .safetensors.")
def compensate(**given: Any) -> None:
    """Set the pruned weights of the dense MODEL to zero and update the kept ones.

    The update minimizes the second-order estimate of the loss increase over all kept weights of a
    block jointly.

    Example: fastsal compensate resnet18 --weights pretrained --masks masks.safetensors
    --data images --out compensated.safetensors
    """
    import fastsal
    from fastsal.cli.inputs import (
        collect,
        open_model,
        refuse_overwrite,
        set_threads,
        training_batches,
    )
    from fastsal.cli.output import console, emit
    from fastsal.cli.runfolder import check_model, masks_file
    from fastsal.errors import InvalidArgument
    from fastsal.models.left_out import left_out
    from fastsal.models.weights import save_weights

    if (given["statistics"] is None) == (given["data"] is None):
        raise InvalidArgument("exactly one of --data and --statistics is required")
    if given["out"].suffix != ".safetensors":
        raise InvalidArgument(f"out must be a .safetensors file, got {given['out']}")
    refuse_overwrite(given["out"], given["force"])
    set_threads(given["threads"])
    model, spec = open_model(given)
    check_model(given["out"], model)
    masks = fastsal.Masks.load(masks_file(given["masks"]))
    if given["statistics"] is not None:
        fisher = fastsal.BlockFisher.load(given["statistics"])
    else:
        if not given["parameters"]:
            given["parameters"] = tuple(masks)
        batches = training_batches(given, model, spec)
        assert batches is not None  # --data is given
        fisher = collect(given, model, batches)
    fastsal.compensate(model, fisher, masks, damping=given["damping"])
    masks.check(model)
    save_weights(model, given["out"])
    rest = left_out(model, masks)
    result = {
        "sparsity": masks.sparsity,
        "parameters": len(masks),
        "samples": fisher.samples,
        "left_out": rest.as_dict(),
        "out": str(given["out"]),
    }
    if given["as_json"]:
        emit(result)
        return
    console().print(
        f"{counted(len(masks), 'parameter')} compensated, sparsity {masks.sparsity:.4f}; "
        f"written to {given['out']}",
        soft_wrap=True,
    )
    console().print(str(rest), soft_wrap=True)
