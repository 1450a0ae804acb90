"""`fastsal rank`: from scores to masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastsal.cli import options
from fastsal.errors import FileFormatError, InvalidArgument

if TYPE_CHECKING:
    from torch import Tensor


@click.command(short_help="From scores to masks.")
@click.argument("scores", type=options.PATH)
@options.ranking_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
@options.out_option("FILE", "The masks, safetensors.")
def rank(scores: Path, **given: Any) -> None:
    """Keep the weights of the highest SCORES (a file of `fastsal score`) and write the masks."""
    import fastsal
    from fastsal.cli.inputs import ranking, refuse_overwrite
    from fastsal.cli.output import console, emit, kept_table
    from fastsal.utils.atomic import atomic_path

    ranked = ranking(given)
    refuse_overwrite(given["out"], given["force"])
    tensors, recipe = _read_scores(scores)
    masks = fastsal.rank(tensors, **ranked)
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
    screen.print(f"\n[bold]sparsity {masks.sparsity:.4f}[/bold]; written to {given['out']}")


def _read_scores(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InvalidArgument(f"scores: there is no file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        recipe = json.loads(metadata["fastsal.scores"])
        return tensors, dict(recipe)
    except (SafetensorError, KeyError, ValueError, TypeError):
        raise FileFormatError(f"scores: {path} is no whole file of fastsal score") from None
