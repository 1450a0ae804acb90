"""What the arguments of `prune` ask of its stages: collection, recalibration, refitting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from fastsal.data.batches import has_labels
from fastsal.errors import InvalidArgument
from fastsal.pruning.arguments import Arguments
from fastsal.pruning.criteria import CRITERIA
from fastsal.pruning.process import Process
from fastsal.pruning.recalibration import tracked
from fastsal.pruning.recipe import Recipe
from fastsal.pruning.refit.stage import RefitStage
from fastsal.utils.sizes import parse_bytes


def with_curvature(given: Arguments) -> Arguments:
    """Return the arguments with a curvature: without labels that of features.

    A loss or a limit of the user needs labels.
    """
    if given.curvature is not None:
        return given
    needs_labels = given.loss != "cross-entropy" or given.has_limit
    if given.batches is None or needs_labels:
        return replace(given, curvature="empirical")
    is_labeled, batches = has_labels(given.batches)
    return replace(given, curvature="empirical" if is_labeled else "features", batches=batches)


def recalibrates_by_default(given: Arguments, recipe: Recipe) -> bool:
    """Whether images are held out anyway that can tell whether recalibration helps."""
    return (
        given.curvature == "features"
        and recipe.needs_fisher
        and recipe.is_auto
        and not given.has_limit
        and not isinstance(given.batches, Iterator)
        and bool(tracked(given.model))
    )


def refit_stage(
    given: Arguments, chosen: dict[str, nn.Parameter], images: int
) -> RefitStage | None:
    """Return how to refit the model, which is dense now; None without refitting.

    `images` is the bytes of held-out images that are kept.
    """
    if given.refit is None:
        return None
    weights = sum(p.numel() for p in chosen.values())
    scores_and_masks = (4 + 2) * weights
    return RefitStage.of(
        given.refit,
        given.model,
        autocast=given.autocast,
        progress=given.progress,
        seed=given.seed,
        budget=None if given.memory_budget is None else parse_bytes(given.memory_budget),
        kept=scores_and_masks + images,
    )


def collection_options(
    given: Arguments,
    recipe: Recipe,
    chosen: dict[str, nn.Parameter],
    process: Process,
    images: int,
) -> dict[str, Any]:
    """Return the arguments of `collect` except model, batches, samples and seed.

    `images` is the bytes of held-out images that are kept.
    """
    statistics: dict[str, Any] = {
        "block_size": recipe.block_size,
        "loss": given.loss,
        "curvature": given.curvature,
        "parameters": recipe.parameters,
        "precision": given.precision,
        "micro_batch": given.micro_batch,
        "autocast": given.autocast,
        "loss_scale": given.loss_scale,
        "progress": given.progress,
        "by_rows": given.pattern is not None,
        "warns": False,  # once, not in every round
        "needs_blocks": recipe.needs_blocks,
    }
    if given.memory_budget is None:
        if given.scratch is not None or given.scratch_budget is not None:
            raise InvalidArgument("scratch and scratch_budget must be None without memory_budget")
        return statistics
    use = process.memory_use(
        chosen,
        is_auto=recipe.is_auto,
        rounds=given.rounds,
        has_scratch=given.scratch is not None,
        needs_fisher=CRITERIA[recipe.criterion].needs_fisher,
        joins=recipe.is_auto or bool(given.recalibrate),
        images=images,
    )
    return statistics | {
        "memory_budget": given.memory_budget,
        "scratch": given.scratch,
        "scratch_budget": given.scratch_budget,
        "use": use,
    }
