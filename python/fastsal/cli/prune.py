"""`fastsal prune`: from a model and images to a folder with the pruned model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fastsal.cli import options

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from fastsal.data.image_set import Batches
    from fastsal.pruning.limits.limit import SafetyReport
    from fastsal.pruning.masks.masks import Masks


@click.command(short_help="Prune a model into a folder.")
@options.model_options
@options.ranking_options
@options.criterion_option("obs-greedy")
@options.damping_option("auto")
@options.statistics_options
@options.budget_options
@click.option("--test", type=options.PATH, help="Labelled images to measure accuracy on.")
@click.option("--rounds", type=options.COUNT, default=1, show_default=True, help="Pruning steps.")
@click.option(
    "--compensate/--no-compensate",
    "compensate",
    default=None,
    help="Move the kept weights so as to make up for the pruned. [default: with --data]",
)
@click.option(
    "--checkpoint",
    type=options.PATH,
    metavar="FILE",
    help="Keep the state between rounds; the same command goes on from it.",
)
@click.option(
    "--recalibrate",
    is_flag=True,
    help="Average batch normalisation's moments again, where held-out loss is lower for it.",
)
@click.option(
    "--max-accuracy-drop",
    type=float,
    metavar="FRACTION",
    help="Instead of --sparsity: the highest that keeps top-1 on held-out images this close.",
)
@click.option("--max-loss-increase", type=float, metavar="LOSS", help="The same for the mean loss.")
@click.option(
    "--confidence",
    type=float,
    default=0.95,
    show_default=True,
    help="Of the promise that the limit is kept.",
)
@click.option(
    "--held-out",
    type=options.PATH,
    help="Labelled images to test the limit on. [default: one in four of --data]",
)
@options.input_options
@options.run_options
@options.out_option("DIR", "Folder for the model, its masks and the report.")
def prune(**given: Any) -> None:
    """Prune MODEL and write the pruned model, its masks and a report.

    Example: fastsal prune resnet18 --weights pretrained --data images --sparsity 0.7 --out run

    Under torchrun every process works on its part of the images and holds its part of the sums:
    torchrun --nproc-per-node 4 -m fastsal prune ...
    """
    from fastsal.cli.ranks import joined

    with joined() as rank:
        _prune(given, rank)


def _prune(given: dict[str, Any], rank: int) -> None:
    """Do it; rank 0 writes."""
    from fastsal.cli.inputs import (
        Clock,
        check_test,
        open_batches,
        open_model,
        ranking,
        set_threads,
        training_batches,
    )
    from fastsal.cli.output import console, emit, kept_table, run_summary
    from fastsal.cli.runfolder import check_target, run_facts, write_run
    from fastsal.pruning.limits.limit import summary
    from fastsal.transfer.evaluation import measure
    from fastsal.utils.progress import reporter

    is_limited = given["max_accuracy_drop"] is not None or given["max_loss_increase"] is not None
    ranked = ranking(given, finds_sparsity=is_limited)
    check_target(given["out"], given["force"])
    set_threads(given["threads"])
    clock = Clock()
    with clock.step("load"):
        model, spec = open_model(given)
        batches = training_batches(given, model, spec)
        if given["compensate"] is None:
            given["compensate"] = batches is not None
        test = given["test"] and open_batches(given, model, spec, given["test"])
        held_out = given["held_out"] and open_batches(given, model, spec, given["held_out"])
    accuracy: dict[str, Any] = {}
    if test:
        check_test(batches, test)
        with clock.step("test"), reporter(not given["quiet"], "dense accuracy") as report:
            accuracy["before"] = measure(model, test, report=report)._asdict()
    with clock.step("prune"):
        masks, history, safety = _pruned(given, ranked, model, batches, held_out)
    if test:
        with clock.step("test"), reporter(not given["quiet"], "pruned accuracy") as report:
            accuracy["after"] = measure(model, test, report=report)._asdict()
    masks.verify(model)
    if rank:
        return
    result = {
        **run_facts(given, masks),
        "samples": batches.samples if batches else 0,
        "history": history,
        "safety": safety.as_dict() if safety else None,
        "accuracy": accuracy,
        "seconds": clock.seconds,
    }
    recipe = {"model": given["model"], **ranked}
    write_run(given["out"], model, masks, recipe, result)
    has_picture = safety is not None and _draw(safety, given["out"])
    if given["as_json"]:
        emit({**result, "out": str(given["out"])})
        return
    screen = console()
    screen.print(kept_table(masks.kept, masks.shapes))
    if safety:
        screen.print()
        screen.print(_curve(safety))
        screen.print(f"\n{summary(safety)}", soft_wrap=True)
        if safety.trusted_until is not None:
            screen.print(
                f"prediction and measurement agree up to sparsity {safety.trusted_until:g}"
            )
        if not has_picture:
            screen.print("for a picture of it: pip install 'fastsal[report]'")
    screen.print(f"\n[bold]{run_summary(result)}[/bold]")
    screen.print(f"Written to {given['out']}", soft_wrap=True)


def _pruned(
    given: dict[str, Any],
    ranked: dict[str, Any],
    model: nn.Module,
    batches: Batches | None,
    held_out: Batches | None,
) -> tuple[Masks, list[dict[str, Any]], SafetyReport | None]:
    """Prune `model` in place."""
    import fastsal
    from fastsal.cli.inputs import collect_options
    from fastsal.cli.ranks import world_size

    call: Any = fastsal.prune
    if world_size() > 1:
        from fastsal.distributed import prune as call
    result = call(
        model,
        batches,
        criterion=given["criterion"],
        damping=given["damping"],
        compensate=given["compensate"],
        samples=batches.samples if batches is not None else None,
        rounds=given["rounds"],
        max_accuracy_drop=given["max_accuracy_drop"],
        max_loss_increase=given["max_loss_increase"],
        confidence=given["confidence"],
        held_out=held_out or None,
        recalibrate=given["recalibrate"],
        checkpoint=given["checkpoint"],
        **ranked,
        **collect_options(given),
    )
    return result.masks, [entry.as_dict() for entry in result.history], result.safety


def _draw(safety: SafetyReport, folder: Path) -> bool:
    """Draw what was tested into the run's folder, if matplotlib is here."""
    from fastsal.cli.safety_figure import draw

    try:
        draw(safety, folder / "safety.svg")
    except ImportError:
        return False
    return True


def _curve(safety: SafetyReport) -> Any:
    """Table of what was tested."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    measured = "accuracy drop" if safety.limit.kind == "accuracy" else "capped loss rise"
    bound = f"bound at {safety.limit.confidence:g}"
    for title in ("sparsity", measured, bound, "loss rise", "predicted"):
        table.add_column(title, justify="right")
    for point in safety.curve:
        predicted = point["predicted"]
        table.add_row(
            f"{point['sparsity']:g}",
            f"{point['increase']:.4f}",
            f"{point['upper']:.4f}",
            f"{point['loss_increase']:.4f}",
            "" if predicted is None else f"{predicted:.4f}",
            style=None if point["sparsity"] <= safety.sparsity else "dim",
        )
    return table
