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
from fastsal.pruning.reconstruction.passes import moment_bytes
from fastsal.pruning.reconstruction.stage import ReconstructionStage
from fastsal.pruning.refit.stage import RefitStage
from fastsal.pruning.shelf import weight_bytes
from fastsal.utils.sizes import gib, parse_bytes


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


def holds_out_by_default(given: Arguments, recipe: Recipe) -> bool:
    """Whether images are held out anyway that can tell whether a further stage helps."""
    return (
        given.curvature == "features"
        and recipe.needs_fisher
        and recipe.is_auto
        and not given.has_limit
        and not isinstance(given.batches, Iterator)
    )


def recalibrates_by_default(given: Arguments, recipe: Recipe) -> bool:
    """Whether recalibration is tested on images that are held out anyway."""
    return holds_out_by_default(given, recipe) and bool(tracked(given.model))


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


def reconstruction_stage(
    given: Arguments, chosen: dict[str, nn.Parameter], images: int, *, is_asked: bool
) -> ReconstructionStage | None:
    """Return how to solve for the kept weights of the layers; None without it.

    Args:
        given: The arguments of `prune`.
        chosen: Name to parameter to be pruned.
        images: Bytes of held-out images that are kept.
        is_asked: Whether the caller asked for it; else it is left out where there is no room.

    Raises:
        InvalidArgument: A memory budget does not leave room for it.
    """
    if not given.reconstruct:
        return None
    room = None
    if given.memory_budget is not None:
        budget = parse_bytes(given.memory_budget)
        weights = sum(p.numel() for p in chosen.values())
        # Copies of the weights: dense, before it, and pruned; scores and masks.
        needed = 3 * weight_bytes(given.model) + (4 + 2) * weights + images
        room = budget - needed
        least = moment_bytes(chosen.values())
        if room <= least and not is_asked:
            return None
        if room <= least:
            raise InvalidArgument(
                f"memory_budget must be more than {gib(needed + least)} with reconstruct, got "
                f"{gib(budget)}; set reconstruct=False"
            )
    return ReconstructionStage(given.autocast, given.seed, room)


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
    images += _further_copies(given, chosen)
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


def _further_copies(given: Arguments, chosen: dict[str, nn.Parameter]) -> int:
    """Return the bytes of copies of weights that further stages keep during collection."""
    every = weight_bytes(given.model)
    needs_dense = given.refit is not None or (given.reconstruct and given.rounds > 1)
    copied = every if needs_dense else 0
    if given.refit is not None or given.reconstruct:
        # The copy that undoes everything has all tensors then, not only those to prune.
        copied += every - sum(p.nbytes for p in chosen.values())
    return copied
