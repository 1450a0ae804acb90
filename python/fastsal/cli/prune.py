"""`fastsal prune`: prune a model and write it to a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fastsal.cli import options
from fastsal.cli.help import Command
from fastsal.cli.ranking import ranking_arguments, ranking_options
from fastsal.cli.structure import check_options, prune_units, structure_options
from fastsal.cli.types import COUNT, NUMBER, PATH, choice
from fastsal.utils.choices import REFIT_WINDOWS, TARGETS
from fastsal.utils.warn import warn_user

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from fastsal.data.image_set import ImageBatches
    from fastsal.pruning.limits.limit import SafetyReport
    from fastsal.pruning.prune_result import PruneResult


@click.command(cls=Command, short_help="Prune a model and write it to a folder.")
@options.model_options
@ranking_options
@click.option(
    "--target",
    type=choice(TARGETS),
    help="Runtime that the model is for: prune only the layers whose zeros it uses, in the pattern "
    "that it needs (2:4 for tensorrt and torch), and refuse sparsities that do not pay there.",
)
@structure_options
@options.criterion_option("obs-greedy")
@options.damping_option("auto")
@options.statistics_options
@options.budget_options
@options.test_option
@options.rounds_option
@click.option(
    "--compensate/--no-compensate",
    "compensate",
    default=None,
    show_default="compensate if --data is given",
    help="Update kept weights to compensate for pruned ones.",
)
@click.option(
    "--checkpoint",
    type=PATH,
    metavar="FILE",
    help="File for the state after each round and within --refit; rerun the same command to resume "
    "from it.",
)
@click.option(
    "--recalibrate/--no-recalibrate",
    "recalibrate",
    default=None,
    show_default="recalibrate with --curvature features and --damping auto",
    help="Recompute the running statistics of batch normalization after pruning if that lowers "
    "the held-out loss.",
)
@click.option(
    "--reconstruct/--no-reconstruct",
    "reconstruct",
    default=None,
    show_default="reconstruct with --curvature features and --damping auto",
    help="After each round, solve for the kept weights of each layer so that it restores its "
    "outputs in the dense model, if that lowers the held-out loss.",
)
@click.option(
    "--refit",
    type=choice(REFIT_WINDOWS),
    help="After pruning, train the kept weights without labels to match the dense model: the "
    "outputs of all blocks and the features (blocks), or the features alone (whole).",
)
@click.option(
    "--refit-steps",
    type=COUNT,
    show_default="two passes over the images",
    help="With --refit: number of steps of up to 32 images.",
)
@click.option(
    "--max-accuracy-drop",
    type=NUMBER,
    metavar="FRACTION",
    help="Instead of --sparsity: find the highest sparsity whose drop in top-1 accuracy on "
    "held-out images is at most this fraction.",
)
@click.option(
    "--max-loss-increase",
    type=NUMBER,
    metavar="LOSS",
    help="Instead of --sparsity: find the highest sparsity whose increase in mean loss on held-out "
    "images, capped at --loss-cap, is at most this much.",
)
@click.option(
    "--loss-cap",
    type=NUMBER,
    metavar="LOSS",
    show_default="log of the number of classes, the loss of guessing",
    help="With --max-loss-increase: upper cap of the loss of an image.",
)
@click.option(
    "--confidence",
    type=NUMBER,
    default=0.95,
    show_default=True,
    help="Confidence of the guarantee that the accuracy or loss limit is met.",
)
@click.option(
    "--held-out",
    type=PATH,
    show_default="one in four images of --data",
    help="Labeled images on which the accuracy or loss limit is tested.",
)
@options.input_options
@options.device_options
@options.run_options
@options.out_option("DIR", "Folder for the pruned model, its masks and the report.")
def prune(**given: Any) -> None:
    """Prune MODEL and write the pruned model, its masks and a report.

    Criteria use statistics, blocks of the Fisher matrix, which are collected from the gradients of
    the images in --data.

    Example: fastsal prune resnet18 --weights pretrained --data images --sparsity 0.7 --out run

    Under torchrun each process computes gradients of a share of the images and holds a share of
    the statistics: torchrun --nproc-per-node 4 -m fastsal prune ...
    """
    check_options(given)
    if given["structure"] is not None:
        prune_units(given)
        return
    from fastsal.cli.torchrun import joined

    with joined(given["device"]) as rank:
        _prune(given, rank)


def _prune(given: dict[str, Any], rank: int) -> None:
    """Prune as the options say; rank 0 writes the folder."""
    from fastsal.cli.accuracy import MeasuredAccuracy
    from fastsal.cli.inputs import (
        check_apart,
        check_test,
        image_size,
        open_batches,
        open_model,
        set_threads,
        training_batches,
    )
    from fastsal.cli.output import console, emit
    from fastsal.cli.runfolder import (
        check_model,
        check_target,
        run_facts,
        selection_facts,
        write_run,
    )
    from fastsal.utils.clock import Clock

    is_limited = given["max_accuracy_drop"] is not None or given["max_loss_increase"] is not None
    if given["target"] is not None:
        _check_target_runtime(given)
    ranked = ranking_arguments(given, finds_sparsity=is_limited)
    check_target(given["out"], given["force"])
    check_apart(given, "checkpoint")
    set_threads(given["threads"])
    clock = Clock()
    with clock.step("load"):
        model, spec = open_model(given)
        check_model(given["out"], model)
        if given["target"] is not None:
            from fastsal.pruning.targets import target_parameters

            given["parameters"] = target_parameters(given["target"], model)
        batches = training_batches(given, model, spec)
        if given["compensate"] is None:
            given["compensate"] = batches is not None
        test = given["test"] and open_batches(given, model, spec, given["test"])
        held_out = given["held_out"] and open_batches(given, model, spec, given["held_out"])
    if test:
        check_test(batches, test)
    accuracy = MeasuredAccuracy(given, model, test, clock)
    accuracy.measure("before", "dense accuracy", checks_labels=True)
    with clock.step("prune"):
        done = _pruned(given, ranked, model, batches, held_out)
    masks, safety = done.masks, done.safety
    accuracy.measure("after", "pruned accuracy")
    masks.check(model)
    if rank:
        return
    result = {
        **run_facts(given, masks),
        "image_size": image_size(spec, batches, test),
        "samples": batches.samples if batches else 0,
        "history": [entry.as_dict() for entry in done.history],
        "safety": safety.as_dict() if safety else None,
        **selection_facts(done.left_out, done.in_use),
        **_macs(done),
        "accuracy": accuracy.found,
        "seconds": clock.rounded(3),
    }
    picture = _Picture(safety)
    recipe = {"model": given["model"], **ranked}
    write_run(given["out"], model, masks, recipe, result, picture.draw)
    if given["as_json"]:
        emit({**result, "out": str(given["out"])})
        return
    _show(done, result, has_picture=picture.is_drawn)
    console().print(f"Written to {given['out']}", soft_wrap=True)


def _macs(done: PruneResult) -> dict[str, Any]:
    """Return the multiply-accumulates before and after, where they were the budget."""
    from fastsal.pruning.masks.costs import cost_of

    masks = done.masks
    costs = masks.recipe.get("costs")
    if costs is None:
        return {}
    sizes = {name: mask.numel() for name, mask in masks.items()}
    found = {"before": cost_of(sizes, costs), "after": cost_of(masks.kept, costs)}
    return {"macs": {name: int(value) for name, value in found.items()}}


def _check_target_runtime(given: dict[str, Any]) -> None:
    """Replace the sparsity and the pattern by those of the target; refuse a choice of layers."""
    from fastsal.errors import InvalidArgument
    from fastsal.pruning.targets import target_ranking

    if given["parameters"]:
        raise InvalidArgument("--parameters must not be given with --target")
    given["sparsity"], given["pattern"] = target_ranking(
        given["target"], given["sparsity"], given["pattern"]
    )


def _show(done: PruneResult, result: dict[str, Any], *, has_picture: bool) -> None:
    """Print a result."""
    from fastsal.cli.output import (
        console,
        kept_table,
        print_selection,
        reconstruction_summary,
        refit_summary,
        run_summary,
    )
    from fastsal.pruning.limits.limit import summary

    masks, safety = done.masks, done.safety
    screen = console()
    screen.print(kept_table(masks.kept, masks.shapes))
    if safety:
        screen.print()
        screen.print(_curve(safety))
        screen.print(f"\n{summary(safety)}", soft_wrap=True)
        if safety.trusted_until is not None:
            screen.print(
                f"Prediction and measurement agree up to sparsity {safety.trusted_until:g}"
            )
        if not has_picture:
            screen.print("To draw this curve: pip install 'fastsal[report]'")
    for entry in done.history:
        if entry.reconstruction is not None:
            screen.print(f"\n{reconstruction_summary(entry.reconstruction)}", soft_wrap=True)
        if entry.refit is not None:
            screen.print(f"\n{refit_summary(entry.refit)}", soft_wrap=True)
    screen.print(f"\n{run_summary(result)}", style="bold")
    print_selection(screen, done.left_out, done.in_use)


def _pruned(
    given: dict[str, Any],
    ranked: dict[str, Any],
    model: nn.Module,
    batches: ImageBatches | None,
    held_out: ImageBatches | None,
) -> PruneResult:
    """Prune `model` in place."""
    import fastsal
    from fastsal.cli.inputs import collect_options, refit_settings
    from fastsal.cli.torchrun import world_size

    call: Any = fastsal.prune
    if world_size() > 1:
        from fastsal.distributed import prune as call
    result: PruneResult = call(
        model,
        batches,
        criterion=given["criterion"],
        damping=given["damping"],
        compensate=given["compensate"],
        samples=batches.samples if batches is not None else None,
        rounds=given["rounds"],
        max_accuracy_drop=given["max_accuracy_drop"],
        max_loss_increase=given["max_loss_increase"],
        loss_cap=given["loss_cap"],
        confidence=given["confidence"],
        held_out=held_out or None,
        recalibrate=given["recalibrate"],
        reconstruct=given["reconstruct"],
        checkpoint=given["checkpoint"],
        refit=refit_settings(given),
        budget=given["budget"] or "weights",
        **ranked,
        **collect_options(given),
    )
    return result


class _Picture:
    """The figure of the tested sparsities, where a limit was tested and matplotlib is installed."""

    def __init__(self, safety: SafetyReport | None) -> None:
        self._safety = safety
        self.is_drawn = False

    def draw(self, path: Path) -> None:
        """Draw it; a figure that fails is a warning, as it is not worth the run."""
        if self._safety is None:
            return
        from fastsal.cli.safety_figure import draw

        try:
            draw(self._safety, path)
        except ImportError:
            return
        except Exception as error:
            path.unlink(missing_ok=True)
            warn_user(f"the figure cannot be drawn ({type(error).__name__}: {error})")
            return
        self.is_drawn = True


def _curve(safety: SafetyReport) -> Any:
    """Return a table of the tested sparsities."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    measured = "accuracy drop"
    if safety.capped_at is not None:
        measured = f"increase of the loss capped at {safety.capped_at:.4g}"
    bound = f"bound, confidence {safety.limit.confidence:g}"
    for title in ("sparsity", measured, bound, "loss increase", "predicted"):
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
