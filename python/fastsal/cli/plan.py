"""`fastsal plan`: an estimate of memory, disk, passes and time of `fastsal prune`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fastsal.cli import options
from fastsal.cli.help import Command
from fastsal.cli.types import COUNT
from fastsal.errors import InvalidArgument

if TYPE_CHECKING:
    from fastsal.fisher.memory_plan import MemoryPlan


@click.command(cls=Command, short_help="Estimate memory, disk, passes and time of pruning.")
@options.model_options
@options.criterion_option("obs-greedy")
@options.damping_option("auto")
@options.statistics_options
@options.budget_options
@options.rounds_option
@click.option(
    "--compensate/--no-compensate",
    "compensate",
    default=True,
    show_default=True,
    help="Update kept weights to compensate for pruned ones.",
)
@click.option(
    "--meta",
    is_flag=True,
    help="Build the model on the meta device, without memory for its weights.",
)
@click.option(
    "--tokens",
    type=COUNT,
    help="Sequence length of a model of tokens; requires --meta.",
)
@click.option(
    "--ranks",
    type=COUNT,
    default=1,
    show_default=True,
    help="Number of processes under torchrun; the estimate is for one of them.",
)
@click.option("--no-time", is_flag=True, help="Skip the trial passes that estimate the time.")
@options.input_options
@options.device_options
@options.run_options
def plan(**given: Any) -> None:
    """Estimate memory, disk, passes and time of `fastsal prune` with the same options.

    Memory is what pruning adds to the process, and `fastsal prune` follows this estimate. Time is
    extrapolated from a trial of a few passes, which runs for ten seconds for ViT-B and half a
    minute for ViT-L on two cores. Without --data, random images are used.

    Example: fastsal plan vit_large_patch16_224 --samples 1024 --memory-budget 8GiB --scratch /tmp
    """
    from rich.text import Text

    from fastsal.cli.inputs import collect_options, open_model, set_threads, training_batches
    from fastsal.cli.output import console, emit
    from fastsal.gradients import select_parameters
    from fastsal.models.left_out import left_out
    from fastsal.pruning.forecast import plan_memory

    if given["tokens"] is not None and not given["meta"]:
        raise InvalidArgument(
            "tokens requires --meta: the loss of a model of tokens is not known to this command; "
            "for a loss of your own call fastsal.plan_memory(..., loss=...)"
        )
    set_threads(given["threads"])
    model, spec = open_model(given)
    batches: Any
    if given["data"] is not None:
        batches = training_batches(given, model, spec)
        samples = batches.samples
    else:
        batches, samples = _noise(given, spec), given["samples"] or 1024
    chosen = collect_options(given)
    chosen.pop("progress")
    found = plan_memory(
        model,
        batches,
        samples=samples,
        criterion=given["criterion"],
        damping=given["damping"],
        compensate=given["compensate"],
        rounds=given["rounds"],
        ranks=given["ranks"],
        calibrate=not given["no_time"],
        **chosen,
    )
    pruned = select_parameters(model, chosen.get("parameters"))
    weights = sum(p.numel() for p in pruned.values())
    rest = left_out(model, pruned)
    if given["as_json"]:
        facts = {"model": given["model"], "weights": weights, "left_out": rest.as_dict()}
        emit({**facts, "samples": samples, **found.as_dict()})
        return
    screen = console()
    counts = f": {weights:,} weights in {len(pruned)} parameters, {samples:,} samples"
    screen.print(Text.assemble((given["model"], "bold"), counts), soft_wrap=True)
    screen.print(str(rest), soft_wrap=True)
    screen.print(_table(found))


def _noise(given: dict[str, Any], spec: Any) -> list[Any]:
    """Return one batch of random images, or of zeros as token ids."""
    import torch

    if given["tokens"] is not None:
        return [(torch.zeros(8, given["tokens"], dtype=torch.int64), torch.zeros(8))]
    height, width = spec.size or (224, 224)
    generator = torch.Generator().manual_seed(given["seed"])
    images = torch.randn(8, spec.channels, height, width, generator=generator)
    return [(images, torch.zeros(8, dtype=torch.int64))]


def _table(plan: MemoryPlan) -> Any:
    from rich.table import Table
    from rich.text import Text

    from fastsal.utils.sizes import gib

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    where = {
        "memory": "in memory",
        "file": "in a file of the scratch folder",
        "recomputed": "recomputed on each use; --scratch DIR is faster",
    }[plan.place]
    if plan.ranks > 1:
        table.add_row("ranks", str(plan.ranks), "the figures below are for one of them")
    table.add_row("statistics", gib(plan.statistics), where)
    how = "" if plan.passes == 1 else "each for a subset of the parameters"
    if plan.place == "recomputed":
        how += ", on each use"
    table.add_row("passes over the images", str(plan.passes), how)
    table.add_row(
        "samples per micro-batch", str(plan.micro_batch), f"accumulated {plan.step} at a time"
    )
    limit = "no limit" if plan.budget is None else f"of {gib(plan.budget)}"
    memory = Text(gib(plan.memory), "bold")
    table.add_row(Text("memory added", "bold"), memory, limit)
    table.add_row("  statistics of one pass", gib(plan.group))
    table.add_row("  gathered gradients", gib(plan.rows) if plan.rows else "none")
    if plan.activations:
        table.add_row("  forward and backward", gib(plan.activations))
    else:
        table.add_row("  forward and backward", "?", "only measured with --memory-budget")
    table.add_row("  scores, masks, copies", gib(plan.kept))
    if plan.images:
        table.add_row("  held-out images", gib(plan.images))
    disk = Text(gib(plan.disk), "bold") if plan.disk else "none"
    lacks = "give --scratch DIR" if plan.disk and plan.scratch is None else ""
    table.add_row(Text("scratch file", "bold"), disk, Text(lacks, "yellow"))
    for what, nbytes in plan.sent.items():
        table.add_row(f"sent, {what}", gib(nbytes), f"by each of {plan.ranks} ranks")
    for name, seconds in plan.seconds.items():
        sends = "without communication" if plan.ranks > 1 and name == "total" else ""
        table.add_row(f"time, {name}", duration(seconds), sends)
    return table


def duration(seconds: float) -> str:
    """Format seconds in seconds, minutes, hours or days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 90:
        return f"{minutes:.0f} min"
    hours = minutes / 60
    return f"{hours:.1f} h" if hours < 100 else f"{hours / 24:.1f} days"
