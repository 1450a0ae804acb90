"""`fastsal prune --structure`: remove whole units, so that the model is smaller."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from fastsal.cli import options
from fastsal.cli.types import COUNT, choice
from fastsal.errors import InvalidArgument
from fastsal.utils.choices import BUDGETS, STRUCTURE_CRITERIA, STRUCTURE_SCOPES, STRUCTURES

if TYPE_CHECKING:
    from rich.table import Table

    from fastsal.pruning.structured.result import StructureResult

F = TypeVar("F", bound=Callable[..., Any])

structure_options: Callable[[F], F] = options.together(
    click.option(
        "--structure",
        type=choice(STRUCTURES),
        show_default="single weights",
        help="Remove whole units instead of single weights, so that the model is smaller: hidden "
        "units of MLPs (mlp), attention heads (heads), or channels inside blocks (channels).",
    ),
    click.option(
        "--budget",
        type=choice(BUDGETS),
        show_default="units with --structure, else the number of weights",
        help="What --sparsity is a fraction of: the multiply-accumulates (macs) or, with "
        "--structure, the units of that structure, or the parameters or measured latency of the "
        "model.",
    ),
    click.option(
        "--latency-batch",
        type=COUNT,
        default=1,
        show_default=True,
        help="With --budget latency: images of the forward pass whose latency is measured.",
    ),
    click.option(
        "--unit-criterion",
        type=choice(STRUCTURE_CRITERIA),
        default="joint",
        show_default=True,
        help="With --structure: score of a unit, the error that is left after the best update of "
        "the other weights (joint), its weights (magnitude), its activations (variance), or none.",
    ),
    click.option(
        "--multiple",
        type=COUNT,
        show_default="8 for layers of at least 64 units",
        help="With --structure: number that widths are rounded to multiples of.",
    ),
    click.option(
        "--layers",
        multiple=True,
        metavar="PATTERN",
        show_default="all",
        help="With --structure: name or wildcard pattern of layers whose units are removed; a "
        "leading ! excludes; may be repeated.",
    ),
)

# Options of pruning single weights.
_OTHERS = (
    "pattern", "target", "criterion", "rounds", "checkpoint", "recalibrate",
    "max_accuracy_drop", "max_loss_increase", "loss_cap", "confidence", "held_out",
    "micro_batch", "block_size", "parameters", "precision", "scratch", "scratch_budget",
    "curvature", "autocast",
)  # fmt: skip
_ONLY = ("latency_batch", "unit_criterion", "multiple", "layers")


def check_options(given: dict[str, Any]) -> None:
    """Check that options of single weights and of units are not mixed.

    Raises:
        InvalidArgument: They are, or one that is needed is missing.
    """
    context = click.get_current_context()
    is_structured = given["structure"] is not None
    for name in _OTHERS if is_structured else _ONLY:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = "--" + {"autocast": "amp"}.get(name, name.replace("_", "-"))
            what = "must not be given with" if is_structured else "requires"
            raise InvalidArgument(f"{option} {what} --structure")
    if not is_structured:
        if given["budget"] not in (None, "macs"):
            raise InvalidArgument(f"--budget {given['budget']} requires --structure")
        return
    given["budget"] = given["budget"] or "units"
    for name in ("sparsity", "data"):
        if given[name] is None:
            raise InvalidArgument(f"--{name} is required with --structure")
    if isinstance(given["sparsity"], dict):
        raise InvalidArgument(
            f"sparsity must be a number with --structure, got {given['sparsity']}; --layers names "
            "the layers"
        )
    if context.get_parameter_source("scope") is ParameterSource.DEFAULT:
        given["scope"] = "auto"
    if given["scope"] not in STRUCTURE_SCOPES:
        raise InvalidArgument(
            f"scope must be one of {', '.join(STRUCTURE_SCOPES)} with --structure, got "
            f"{given['scope']!r}"
        )


def prune_units(given: dict[str, Any]) -> None:
    """Prune as the options say and write the folder."""
    import fastsal
    from fastsal.cli.accuracy import MeasuredAccuracy
    from fastsal.cli.inputs import (
        check_test,
        image_size,
        open_batches,
        open_model,
        refit_settings,
        set_threads,
    )
    from fastsal.cli.output import console, emit, reconstruction_summary, refit_summary
    from fastsal.cli.runfolder import check_model, check_target, run_facts, write_run
    from fastsal.cli.torchrun import world_size
    from fastsal.utils.clock import Clock

    if world_size() > 1:
        raise InvalidArgument("--structure runs in one process, not under torchrun")
    check_target(given["out"], given["force"])
    set_threads(given["threads"])
    clock = Clock()
    with clock.step("load"):
        model, spec = open_model(given)
        check_model(given["out"], model)
        batches = open_batches(
            given, model, spec, given["data"], samples=given["samples"], shuffle=True, labeled=False
        )
        test = given["test"] and open_batches(given, model, spec, given["test"])
    if test:
        check_test(batches, test)
    accuracy = MeasuredAccuracy(given, model, test, clock)
    accuracy.measure("before", "dense accuracy", checks_labels=True)
    with clock.step("prune"):
        floor = given["floor"]
        done = fastsal.prune_structure(
            model,
            batches,
            given["sparsity"],
            structure=given["structure"],
            budget=given["budget"],
            scope=given["scope"],
            floor=0.1 if floor is None else floor,
            multiple=given["multiple"],
            criterion=given["unit_criterion"],
            compensate=given["compensate"] is not False,
            reconstruct=given["reconstruct"],
            damping=_damping(given["damping"]),
            layers=list(given["layers"]) or None,
            samples=batches.samples,
            latency_batch=given["latency_batch"],
            memory_budget=given["memory_budget"],
            head=given["head"],
            refit=refit_settings(given),
            progress=not given["quiet"],
            seed=given["seed"],
        )
    accuracy.measure("after", "pruned accuracy")
    result = {
        **run_facts(given, done.masks),
        "image_size": image_size(spec, batches),
        "samples": done.samples,
        "structure": done.as_dict(),
        "accuracy": accuracy.found,
        "seconds": clock.rounded(3),
    }
    write_run(given["out"], model, done.masks, {"model": given["model"]}, result)
    if given["as_json"]:
        emit({**result, "out": str(given["out"])})
        return
    screen = console()
    screen.print(_table(done))
    if done.reconstruction is not None:
        screen.print(f"\n{reconstruction_summary(done.reconstruction)}", soft_wrap=True)
    if done.refit is not None:
        screen.print(f"\n{refit_summary(done.refit)}", soft_wrap=True)
    screen.print(f"\n{_summary(done, accuracy.found)}", style="bold", soft_wrap=True)
    for reason, count in Counter(done.left_out.values()).most_common(5):
        layers = "layer" if count == 1 else "layers"
        screen.print(f"left out: {count} {layers}: {reason}", soft_wrap=True)
    screen.print(f"Written to {given['out']}", soft_wrap=True)


def _damping(value: float | str) -> float:
    """Return the multiple of the mean variance that `--damping` gives."""
    if value == "auto":
        return 1e-3
    if isinstance(value, str):
        return float(value.rstrip("xX×"))
    raise InvalidArgument(
        f"damping must be a multiple such as '0.001x' with --structure, got {value}"
    )


def _summary(done: StructureResult, accuracy: dict[str, Any]) -> str:
    from fastsal.cli.output import macs_summary

    before, after = done.before, done.after
    text = (
        f"{before.parameters:,} -> {after.parameters:,} parameters "
        f"({1 - after.parameters / before.parameters:.1%} fewer), "
        f"{macs_summary(before.macs, after.macs)}"
    )
    if before.latency is not None and after.latency is not None:
        text += (
            f"; {1e3 * before.latency:.3g} ms -> {1e3 * after.latency:.3g} ms predicted "
            f"({1 - after.latency / before.latency:.1%} less)"
        )
    if accuracy:
        both = [accuracy[name]["accuracy"] for name in ("before", "after")]
        text += f"; accuracy {both[0]:.4f} -> {both[1]:.4f}"
    return text


def _table(done: StructureResult) -> Table:
    from rich.table import Table

    from fastsal.cli.output import BAR, drawn_bar

    table = Table(title="Units kept", title_justify="left", title_style="bold", box=None)
    table.add_column("layer", overflow="fold")
    for name in ("kept", "of", "%"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=BAR)
    for name, (before, after) in done.widths.items():
        table.add_row(
            name,
            f"{after:,}",
            f"{before:,}",
            f"{100 * after / before:.1f}",
            drawn_bar(after / before),
        )
    return table
