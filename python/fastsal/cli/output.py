"""Output of commands: tables for a terminal, or one JSON object."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from fastsal.utils.json_files import to_json
from fastsal.utils.plain_text import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fastsal.models.left_out import LeftOut
    from fastsal.pruning.masks.in_use import InUse
    from fastsal.pruning.reconstruction_result import Reconstruction
    from fastsal.pruning.refit_result import RefitResult

BAR = 20  # characters of a full bar


def emit(value: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout."""
    click.echo(to_json(value, indent=2))


def console() -> Console:
    """Return a console on stdout; what is in brackets, as in a path or a name, is no markup."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def kept_table(kept: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> Table:
    """Return a table of the weights kept in each parameter."""
    from rich.table import Table

    table = Table(title="Weights kept", title_justify="left", title_style="bold", box=None)
    table.add_column("parameter", overflow="fold")
    table.add_column("shape", no_wrap=True)
    for name in ("kept", "of", "%"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=BAR)
    for name, shape in shapes.items():
        count = math.prod(shape)
        share = kept[name] / count
        table.add_row(
            name,
            "x".join(map(str, shape)),
            f"{kept[name]:,}",
            f"{count:,}",
            f"{100 * share:.1f}",
            drawn_bar(share),
        )
    return table


def print_selection(screen: Console, left_out: LeftOut | None, in_use: InUse | None) -> None:
    """Print a line about parameters left out, and one about weights that layers compute."""
    if left_out is not None:
        screen.print(str(left_out), soft_wrap=True)
    if in_use is not None and in_use.computed:
        screen.print(str(in_use), style="yellow", soft_wrap=True)


def macs_summary(before: int, after: int) -> str:
    """Return how many multiply-accumulates are left, and how many fewer these are."""
    return (
        f"{before / 1e6:,.1f} -> {after / 1e6:,.1f} million multiply-accumulates "
        f"({1 - after / max(1, before):.1%} fewer)"
    )


def run_summary(report: Mapping[str, Any]) -> str:
    """Return a one-line summary of the report of a run."""
    total = sum(math.prod(p["shape"]) for p in report["parameters"].values())
    kept = sum(p["kept"] for p in report["parameters"].values())
    text = f"{kept:,} of {total:,} weights kept, sparsity {report['sparsity']:.4f}"
    if (macs := report.get("macs")) is not None:
        text += f"; {macs_summary(macs['before'], macs['after'])}"
    if report["accuracy"]:
        before, after = report["accuracy"]["before"], report["accuracy"]["after"]
        text += f"; accuracy {before['accuracy']:.4f} -> {after['accuracy']:.4f}"
    seconds = sum(report["seconds"].values())
    memory = report["peak_memory_mib"]
    return text + f"; {seconds:.1f} s" + (f", peak {memory} MiB" if memory else "")


def reconstruction_summary(done: Reconstruction) -> str:
    """Return a line that says what a reconstruction did."""
    change = f"held-out loss {done.before:.4g} -> {done.after:.4g}"
    layers = counted(done.layers, "layer")
    if not done.kept:
        return f"Reconstruction of {layers} undone: {change}"
    return f"Reconstruction of {layers} on {counted(done.images, 'image')}: {change}"


def refit_summary(done: RefitResult) -> str:
    """Return a line that says what refitting did."""
    if not done.kept:
        return f"Refit: no step of {done.steps} lowered the held-out error {done.before:.4g}"
    return (
        f"Refit: held-out error {done.before:.4g} -> {done.after:.4g} after {done.kept_step} "
        f"of {counted(done.steps, 'step')}, {done.seconds:.1f} s"
    )


def drawn_bar(share: float) -> Text:
    """Return a bar with dots up to its full length."""
    from rich.text import Text

    drawn = bar(share)
    return Text.assemble((drawn, "cyan"), ("·" * (BAR - len(drawn)), "dim"))


def bar(share: float) -> str:
    """Return a bar of up to 20 characters, in eighths."""
    eighths = round(min(max(share, 0.0), 1.0) * BAR * 8)
    return "█" * (eighths // 8) + ("" if not eighths % 8 else "▏▎▍▌▋▊▉"[eighths % 8 - 1])
