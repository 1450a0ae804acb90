"""`fastsal measure`: size, latency and throughput of the model of a run, beside its original."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from fastsal.cli import options
from fastsal.cli.help import Command
from fastsal.cli.types import COUNT, NUMBER, PATH, choice
from fastsal.utils.choices import RUNTIMES

if TYPE_CHECKING:
    from rich.table import Table

    from fastsal.deploy.meter import Measurement


@click.command(cls=Command, short_help="Measure size and speed of a run beside its original.")
@click.argument("run", type=PATH, metavar="DIR")
@click.option(
    "--runtime",
    type=choice(RUNTIMES),
    default="torch",
    show_default=True,
    help="Library that runs the models; onnxruntime requires the extra export, openvino the extra "
    "openvino, torch-2:4 a GPU of CUDA, on which both models run in float16 and weights with 2:4 "
    "zeros are compressed.",
)
@click.option(
    "--batch",
    "batches",
    type=COUNT,
    multiple=True,
    show_default="1 and 16",
    help="Number of images of a run: 1 measures latency, more measure throughput; may be repeated.",
)
@click.option(
    "--seconds",
    type=NUMBER,
    default=5.0,
    show_default=True,
    help="Time to spend on each number of images.",
)
@click.option(
    "--data",
    type=PATH,
    show_default="random images",
    help="Images that the models run on.",
)
@click.option(
    "--save",
    is_flag=True,
    help="Write the measurement into DIR too, for `fastsal report` on the folder of several runs.",
)
@options.run_size_option
@options.model_spec_option
@options.device_option("cpu")
@options.threads_option
@options.json_option
def measure(**given: Any) -> None:
    """Measure the model of the run in DIR beside its original, in turn in one process.

    Parameters, zeros, multiply-accumulates, sizes of files, latency and throughput with their
    spread. Nothing is calculated from a sparsity: a model that is not faster here is said not to
    be.

    Example: fastsal measure run --batch 1 --batch 32
    """
    import fastsal
    from fastsal.cli.export import run_images
    from fastsal.cli.inputs import set_threads
    from fastsal.cli.output import console, emit
    from fastsal.deploy.meter import measure_against
    from fastsal.deploy.runs import original_of
    from fastsal.study.report.run_results import MEASUREMENT_FILE
    from fastsal.utils.atomic import check_writable, write_text

    if given["save"]:
        check_writable(given["run"], "DIR")
    set_threads(given["threads"])
    pruned = fastsal.load_run(given["run"], spec=given["model"], device=given["device"])
    dense = original_of(given["run"], spec=given["model"], device=given["device"])
    batches = list(given["batches"]) or [1, 16]
    found = measure_against(
        dense,
        pruned,
        run_images(given, pruned, max(2, *batches)),
        batches=batches,
        runtime=given["runtime"],
        seconds=given["seconds"],
    )
    if given["save"]:
        text = json.dumps(found.as_dict(), indent=2, allow_nan=False)
        write_text(given["run"] / MEASUREMENT_FILE, text + "\n")
    if given["as_json"]:
        emit({"run": str(given["run"]), **found.as_dict()})
        return
    screen = console()
    screen.print(_sizes(found))
    screen.print()
    screen.print(_times(found))
    for timing in found.timings:
        images = "image" if timing.batch == 1 else "images"
        verdict = f"{timing.batch} {images}: {timing.verdict}"
        screen.print(verdict, style="bold", soft_wrap=True)
    screen.print(found.zeros, soft_wrap=True)
    facts = found.machine
    threads = f"{facts['threads']} thread{'s' if facts['threads'] != 1 else ''}"
    device = "" if given["device"] == "cpu" else f", {given['device']}"
    if "gpu" in facts:
        device = f", {facts['gpu']}"
    screen.print(
        f"{facts['processor']}, {threads}{device}, {found.runtime}, torch "
        f"{facts['versions']['torch']}",
        style="dim",
        soft_wrap=True,
    )


def _sizes(found: Measurement) -> Table:
    from rich.table import Table

    from fastsal.utils.sizes import gib

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, title in enumerate(("", "original", "pruned", "ratio")):
        table.add_column(title, justify="right" if number else "left")
    rows: list[tuple[str, str, Any]] = [
        ("parameters", "parameters", "{:,}".format),
        ("multiply-accumulates", "macs", "{:,}".format),
        ("file, dense", "dense_bytes", gib),
    ]
    for label, name, shown in rows:
        before, after = getattr(found.dense, name), getattr(found.pruned, name)
        table.add_row(label, shown(before), shown(after), f"{after / max(1, before):.3f}")
    # The run has the values of the pruned model alone.
    counted = found.pruned.nonzeros, found.dense.parameters
    for label, size, whole, shown, what in (
        ("non-zero parameters", *counted, "{:,}".format, "parameters"),
        ("file, zipped", found.pruned.zipped_bytes, found.dense.dense_bytes, gib, "dense file"),
        ("file, packed", found.pruned.packed_bytes, found.dense.dense_bytes, gib, "dense file"),
    ):
        if size is not None:
            table.add_row(label, "", shown(size), f"{size / max(1, whole):.3f} of the {what}")
    return table


def _times(found: Measurement) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = ("images", "original, ms", "quartiles", "pruned, ms", "quartiles", "images/s", "pairs")
    for title in titles:
        table.add_column(title, justify="right")
    for timing in found.timings:
        cells = [str(timing.batch)]
        for middle, low, high in (timing.dense, timing.pruned):
            cells += [f"{1000 * middle:.2f}", f"{1000 * low:.2f} to {1000 * high:.2f}"]
        speed = f"{timing.batch / timing.dense[0]:.1f} -> {timing.batch / timing.pruned[0]:.1f}"
        table.add_row(*cells, speed, str(timing.rounds))
    return table
