"""`fastsal score`: compute a saliency score for every weight."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from fastsal.cli import options
from fastsal.cli.help import Command
from fastsal.cli.types import PATH
from fastsal.errors import InvalidArgument

if TYPE_CHECKING:
    from fastsal.models.input_axis import WithAxes


@click.command(cls=Command, short_help="Score every weight and write the scores to a file.")
@options.model_options
@options.criterion_option("block-fisher")
@options.damping_option("0.1x")
@options.statistics_options
@options.budget_options
@options.statistics_file_option
@click.option(
    "--save-statistics",
    type=PATH,
    metavar="FILE",
    help="File to which the statistics are written, for use with other criteria.",
)
@options.input_options
@options.device_options
@options.run_options
@options.out_option("FILE", "File for the scores, .safetensors.")
def score(**given: Any) -> None:
    """Score the weights of MODEL and write the scores to a file.

    The file has one float32 tensor for each parameter, under the parameter's name. Weights with low
    scores are pruned first. Statistics are blocks of the Fisher matrix, collected from the
    gradients of the images in --data.

    Example: fastsal score resnet18 --weights pretrained --data images --out scores.safetensors
    """
    from safetensors.torch import save_file

    import fastsal
    from fastsal.cli.inputs import (
        check_apart,
        collect,
        open_model,
        refuse_overwrite,
        set_threads,
        training_batches,
    )
    from fastsal.cli.output import console, emit
    from fastsal.models.left_out import left_out
    from fastsal.pruning.damping import resolve_damping
    from fastsal.utils.atomic import atomic_path, check_writable
    from fastsal.utils.clock import Clock
    from fastsal.utils.plain_text import counted

    if given["statistics"] is not None and given["data"] is not None:
        raise InvalidArgument("--statistics and --data are mutually exclusive")
    check_apart(given, "save_statistics")
    for name in ("out", "save_statistics"):
        if given[name] is not None:
            refuse_overwrite(given[name], given["force"], name)
    set_threads(given["threads"])
    clock = Clock()
    with clock.step("load"):
        model, spec = open_model(given)
        check_writable(given["out"], "out", 4 * sum(p.numel() for p in model.parameters()))
    fisher = None
    with clock.step("statistics"):
        if given["statistics"] is not None:
            fisher = fastsal.BlockFisher.load(given["statistics"])
        else:
            batches = training_batches(given, model, spec)
            fisher = collect(given, model, batches) if batches is not None else None
    with clock.step("score"):
        extra: dict[str, Any] = {}
        if fisher is None:
            extra["seed"] = given["seed"]
            if given["parameters"]:
                extra["parameters"] = list(given["parameters"])
        damping = given["damping"]
        if fisher is not None:
            damping = resolve_damping(damping, fisher)
        scores = fastsal.score(
            model, fisher, criterion=given["criterion"], damping=damping, **extra
        )
    recipe = {
        "model": given["model"],
        "criterion": given["criterion"],
        "damping": damping,
        "samples": fisher.samples if fisher is not None else 0,
        **_axes(scores),
    }
    with atomic_path(given["out"]) as temporary:
        tensors = {name: value.contiguous() for name, value in scores.items()}
        save_file(tensors, str(temporary), metadata={"fastsal.scores": json.dumps(recipe)})
    if given["save_statistics"] is not None and fisher is not None:
        with atomic_path(given["save_statistics"]) as temporary:
            fisher.save(temporary)
    count = sum(value.numel() for value in scores.values())
    rest = left_out(model, scores)
    result = {
        **recipe,
        "parameters": {name: list(value.shape) for name, value in scores.items()},
        "weights": count,
        "left_out": rest.as_dict(),
        "seconds": clock.rounded(3),
        "out": str(given["out"]),
    }
    if given["as_json"]:
        emit(result)
        return
    console().print(
        f"{count:,} weights of {counted(len(scores), 'parameter')} scored by {given['criterion']} "
        f"in {sum(clock.seconds.values()):.1f} s; written to {given['out']}\n{rest}",
        soft_wrap=True,
    )


def _axes(scores: WithAxes) -> dict[str, Any]:
    """Return the entry of a file with the axes of parameters whose input axis is not axis 1."""
    from fastsal.models.input_axis import input_axes

    found = {name: scores.axes.get(name) for name in scores}
    others = {n: a for n, a in found.items() if a != input_axes(scores[n].shape)}
    return {"input_axes": others} if others else {}
