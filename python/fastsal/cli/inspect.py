"""`fastsal inspect`: what a run has pruned, layer by layer, and how it came about."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastsal.cli import options
from fastsal.cli.help import Command
from fastsal.cli.layer_zeros import LayerZeros, layers_of
from fastsal.cli.types import PATH
from fastsal.errors import FileFormatError, InvalidArgument

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import Tensor

    from fastsal.pruning.masks.masks import Masks


_SIZES = ("units", "parameters", "macs")  # of a run from which units were removed


@click.command(cls=Command, short_help="Show what a run has pruned, layer by layer.")
@click.argument("run", type=PATH, metavar="DIR")
@click.option(
    "--figure",
    type=PATH,
    metavar="FILE",
    help="File for a bar chart of the sparsity of the layers, such as .svg, .png or .pdf; requires "
    "matplotlib.",
)
@options.force_option
@options.json_option
def inspect(**given: Any) -> None:
    """Show the sparsity of each layer of the folder of a run, DIR, and its history.

    The table has the zeros of the mask and of the weights in use, and the outputs and inputs of a
    layer that have no weight left, which could be removed altogether. `fastsal verify` checks the
    files.

    Example: fastsal inspect run --figure layers.svg
    """
    from fastsal.cli.inputs import refuse_overwrite
    from fastsal.cli.layer_figure import draw_layers, require_matplotlib
    from fastsal.cli.output import console, emit

    folder, figure = given["run"], given["figure"]
    if figure is not None:
        require_matplotlib()
        refuse_overwrite(figure, given["force"], "figure")
    masks, state, report = _read(folder)
    layers = layers_of(masks, state, _computed(report))
    weights = sum(value.numel() for value in state.values())
    zeros = sum(int((value == 0).sum()) for value in state.values())
    if figure is not None:
        draw_layers(layers, masks.sparsity, figure)
    if given["as_json"]:
        emit(
            {
                "run": str(folder),
                "sparsity": masks.sparsity,
                "effective_sparsity": _effective(layers),
                "values": weights,
                "zeros": zeros,
                "layers": [asdict(layer) for layer in layers],
                "recipe": dict(masks.recipe),
                "history": report.get("history", []),
                "accuracy": report.get("accuracy") or {},
                "seconds": report.get("seconds", {}),
                "figure": None if figure is None else str(figure),
            }
        )
        return
    screen = console()
    screen.print(_layers_table(layers))
    history = _history_table(report.get("history") or [])
    if history is not None:
        screen.print()
        screen.print(history)
    screen.print(
        f"\n{sum(layer.kept for layer in layers):,} of "
        f"{sum(mask.numel() for mask in masks.values()):,} masked weights kept: sparsity "
        f"{masks.sparsity:.4f}, effective {_effective(layers):.4f}; {zeros:,} of all {weights:,} "
        "values are zero",
        style="bold",
        soft_wrap=True,
    )
    _print_facts(screen, masks, report)
    if figure is not None:
        screen.print(f"Written to {figure}", soft_wrap=True)


def _read(folder: Path) -> tuple[Masks, dict[str, Tensor], dict[str, Any]]:
    """Return the masks, the weights and the report of a run; the report may be absent."""
    import fastsal
    from fastsal.cli.runfolder import REPORT, masks_file, weights_file
    from fastsal.models.state_dicts import fitted
    from fastsal.models.weights import read_weights
    from fastsal.utils.json_files import read_json

    if not folder.is_dir():
        what = "which is a file" if folder.exists() else "which does not exist"
        raise InvalidArgument(f"DIR must be the folder of a run, got {folder}, {what}")
    masks = fastsal.Masks.load(masks_file(folder))
    path = weights_file(folder)
    state, _ = fitted(read_weights(path), list(masks), path)
    for name, mask in masks.items():
        if name not in state or state[name].shape != mask.shape:
            raise FileFormatError(
                f"DIR: the masks of {folder} do not fit its weights ({name!r}); see fastsal verify"
            )
    report = read_json(folder / REPORT, "DIR") if (folder / REPORT).is_file() else {}
    if not isinstance(report, dict):
        raise FileFormatError(f"DIR: {folder / REPORT} is not the report of a run")
    return masks, state, report


def _computed(report: Mapping[str, Any]) -> dict[str, float]:
    found = report.get("in_use") or {}
    return dict(found.get("computed") or {})


def _effective(layers: Sequence[LayerZeros]) -> float:
    """Return the fraction of zeros of the weights in use, over all layers."""
    sizes = [math.prod(layer.shape) for layer in layers]
    zeros = sum(layer.effective * size for layer, size in zip(layers, sizes, strict=True))
    return zeros / max(1, sum(sizes))


def _layers_table(layers: Sequence[LayerZeros]) -> Table:
    from rich.table import Table

    from fastsal.cli.output import BAR, drawn_bar

    has_effective = any(f"{s.effective:.4f}" != f"{s.sparsity:.4f}" for s in layers)
    has_empty = any(layer.empty_outputs or layer.empty_inputs for layer in layers)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("parameter", overflow="fold")
    table.add_column("shape", no_wrap=True)
    titles = ["kept", "sparsity"]
    titles += ["effective"] if has_effective else []
    titles += ["empty\nout/in"] if has_empty else []
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("pruned", no_wrap=True, min_width=BAR)
    for layer in layers:
        row = [f"{layer.kept:,}", f"{layer.sparsity:.4f}"]
        row += [f"{layer.effective:.4f}"] if has_effective else []
        if has_empty:
            counts = (layer.empty_outputs, layer.empty_inputs or 0)
            row.append("{}/{}".format(*counts) if any(counts) else "")
        shape = "x".join(map(str, layer.shape))
        table.add_row(layer.name, shape, *row, drawn_bar(layer.sparsity))
    return table


def _history_table(history: Sequence[Mapping[str, Any]]) -> Table | None:
    """Return a table of the rounds of pruning or the epochs of fine-tuning."""
    from rich.table import Table

    columns = {
        "round": "d", "epoch": "d", "sparsity": ".4f", "samples": ",", "damping": ".3g",
        "predicted_increase": ".4g", "lr": "g", "loss": ".4f", "held_out_loss": ".4f",
        "seconds": ".1f",
    }  # fmt: skip
    shown = {
        name: how
        for name, how in columns.items()
        if any(entry.get(name) is not None for entry in history)
    }
    if not shown:
        return None
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in shown:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for entry in history:
        values = {**entry}
        if isinstance(values.get("seconds"), Mapping):  # of the steps of a round
            values["seconds"] = sum(values["seconds"].values())
        table.add_row(
            *("" if values.get(name) is None else f"{values[name]:{how}}"
              for name, how in shown.items())
        )  # fmt: skip
    return table


def _print_facts(screen: Console, masks: Masks, report: Mapping[str, Any]) -> None:
    """Print the recipe, the accuracy and the command of a run."""
    found = report.get("structure")
    if isinstance(found, Mapping) and {"before", "after", "structure"} <= found.keys():
        sizes = [f"{found['before'][key]:,} -> {found['after'][key]:,} {key}" for key in _SIZES]
        screen.print(f"{found['structure']}: {', '.join(sizes)}", soft_wrap=True)
    accuracy = report.get("accuracy") or {}
    if {"before", "after"} <= accuracy.keys():
        before, after = accuracy["before"]["accuracy"], accuracy["after"]["accuracy"]
        screen.print(f"accuracy {before:.4f} -> {after:.4f}")
    plain = {k: v for k, v in masks.recipe.items() if isinstance(v, (str, int, float))}
    if plain:
        text = ", ".join(f"{name} {value}" for name, value in plain.items())
        screen.print(f"recipe: {text}", soft_wrap=True)
    if report.get("command"):
        screen.print(shlex.join(report["command"]), style="dim", soft_wrap=True)
