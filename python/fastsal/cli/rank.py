"""`fastsal rank`: turn scores into masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastsal.cli import options
from fastsal.cli.help import Command
from fastsal.cli.ranking import ranking_arguments, ranking_options
from fastsal.cli.types import PATH
from fastsal.errors import FileFormatError, InvalidArgument

if TYPE_CHECKING:
    from torch import Tensor


@click.command(cls=Command, short_help="Turn scores into masks.")
@click.argument("scores", type=PATH)
@ranking_options
@options.json_option
@options.out_option("FILE", "File for the masks, .safetensors.")
def rank(scores: Path, **given: Any) -> None:
    """Write the masks that keep the weights with the highest SCORES.

    SCORES is a file written by `fastsal score`.

    Example: fastsal rank scores.safetensors --sparsity 0.7 --out masks.safetensors
    """
    from rich.text import Text

    import fastsal
    from fastsal.cli.inputs import refuse_overwrite
    from fastsal.cli.output import console, emit, kept_table
    from fastsal.models.input_axis import Axes, WithAxes, input_axes
    from fastsal.utils.atomic import atomic_path

    ranked = ranking_arguments(given)
    refuse_overwrite(given["out"], given["force"])
    tensors, recipe = _read_scores(scores)
    axes = {name: input_axes(values.shape) for name, values in tensors.items()}
    for name, noted in recipe.pop("input_axes", {}).items():
        del axes[name]
        if noted is not None:  # the layer says its input axis
            axes[name] = Axes(*noted)
    masks = fastsal.rank(WithAxes(tensors, axes), **ranked)
    with atomic_path(given["out"]) as temporary:
        masks.save(temporary, {**recipe, **ranked})
    if given["as_json"]:
        emit(
            {
                **recipe,
                **ranked,
                "sparsity": masks.sparsity,
                "kept": masks.kept,
                "out": str(given["out"]),
            }
        )
        return
    screen = console()
    screen.print(kept_table(masks.kept, masks.shapes))
    words = (f"\nsparsity {masks.sparsity:.4f}", "bold"), f"; written to {given['out']}"
    screen.print(Text.assemble(*words), soft_wrap=True)


def _read_scores(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InvalidArgument(f"scores: no such file: {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        recipe = json.loads(metadata["fastsal.scores"])
        return tensors, dict(recipe)
    except (SafetensorError, KeyError, ValueError, TypeError):
        raise FileFormatError(
            f"scores: {path} is truncated or was not written by fastsal score"
        ) from None
