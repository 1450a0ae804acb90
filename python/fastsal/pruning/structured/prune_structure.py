"""Remove whole units from a model: hidden units of MLPs, attention heads, channels of blocks.

The cost of units is that of Optimal Brain Surgeon for structures (Hassibi and Stork 1993; Kurtic et
al., ZipLM, NeurIPS 2023), with the second moment of the units' activations and their mean; what is
left makes up for what is gone by an exact fold into the next layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.data.batches import Batches, Pair, as_batches, first_images
from fastsal.data.held_out import HELD_OUT_MOST, HeldOutSamples, Repeated, require_some
from fastsal.data.unpacking import BatchRule, ruled
from fastsal.errors import InvalidArgument, UnknownParameter
from fastsal.gradients.losses import check_images
from fastsal.models.classifier import using_head
from fastsal.models.widths import widths_of
from fastsal.models.wrappers import unwrapped
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.reconstruction_result import Reconstruction
from fastsal.pruning.refit.refit import refit as refit_model
from fastsal.pruning.refit.settings import Refit
from fastsal.pruning.structured.budget import Sizes, candidate_widths, choose_widths
from fastsal.pruning.structured.find import Units, find
from fastsal.pruning.structured.groups import cut, restored
from fastsal.pruning.structured.judging import Choice, Cuts, Judge, room_for
from fastsal.pruning.structured.latency import Segment, measure_segments
from fastsal.pruning.structured.result import Size, StructureResult
from fastsal.pruning.structured.settings import Settings
from fastsal.pruning.structured.trace import IS_OUTPUT
from fastsal.pruning.structured.work import Work, applied
from fastsal.utils.choices import (
    STRUCTURES,
    Budget,
    Structure,
    StructureCriterion,
    StructureScope,
    Weighting,
)
from fastsal.utils.clock import Clock
from fastsal.utils.progress import Report
from fastsal.utils.sizes import gib
from fastsal.utils.suggestions import did_you_mean, listed


def prune_structure(
    model: nn.Module,
    batches: Batches,
    sparsity: float,
    *,
    structure: Structure = "mlp",
    budget: Budget = "units",
    scope: StructureScope = "auto",
    floor: float = 0.1,
    multiple: int | None = None,
    criterion: StructureCriterion = "joint",
    weighting: Weighting = "features",
    compensate: bool = True,
    reconstruct: bool | None = None,
    damping: float = 1e-3,
    layers: str | Sequence[str] | None = None,
    samples: int | None = None,
    latency_batch: int = 1,
    memory_budget: int | str | None = None,
    head: str | Sequence[str] | None = None,
    batch: BatchRule | None = None,
    refit: str | Sequence[str] | Refit | None = None,
    progress: bool | Report = False,
    seed: int = 0,
) -> StructureResult:
    """Remove whole units from a model, in place, so that it is smaller and faster.

    Units are found by a trace of one forward pass, and proven: a model without half of them must
    compute what it does with zeros for them. What cannot be proven is listed in the result and left
    as it is. Names in the state dict are unchanged, shapes are smaller.

    Args:
        model: Any module, or a wrapper of it. It runs in evaluation mode; its modes are restored.
        batches: Images `[n, ...]`, or pairs `(images, anything)`; labels are not used. One image in
            eight, at most 1,024, is held out for the choices that are made by held-out features;
            with fewer than eight images none is, and widths follow from the costs alone.
            The images of an iterator are kept in memory, unless `refit` or `memory_budget` is set.
        sparsity: Fraction of `budget` to remove, in `[0, 1)`.
        structure: `"mlp"`: hidden units of MLPs; `"heads"`: attention heads; `"channels"`: channels
            of convolutions that are not added to a residual stream.
        budget: What `sparsity` is a fraction of: the `"units"` of this structure, or the
            `"parameters"` or `"macs"` (multiply-accumulates of linear layers and convolutions) of
            the whole model, or the `"latency"` of a forward pass on its device, which is measured
            at several widths. Units are compared by their cost for what they save.
        scope: `"global"`: the cheapest units of all layers go; `"layer"`: the same fraction of
            each layer; `"auto"`: these or what is between them, by held-out features.
        floor: Least fraction of the units of a layer to keep, in `[0, 1]`.
        multiple: Widths that change become multiples of it. None is 8 for layers of at least 64
            units, else 1; heads are not rounded.
        criterion: `"joint"`: the squared error of the next layer's outputs after the best fold, one
            unit at a time; `"magnitude"`: the product of the norms of the weights that make and
            that use a unit; `"variance"`: of its activations; `"random"`.
        weighting: How errors of layers are compared by `"joint"`: `"features"`: by what they change
            of the model's features, from gradients on up to 256 images; `"relative"`: relative to
            the mean squared output of the layer.
        compensate: Whether the weights that use the kept units, and the bias, are updated to make
            up for the removed ones, by least squares.
        reconstruct: Whether all layers are then solved for again, one after the other, as by
            `fastsal.reconstruct`; undone unless it lowers the error of held-out features. None does
            so with `compensate`, and where `memory_budget` leaves room.
        damping: `λ` on the change of the weights, as a multiple of the mean variance of the units.
        layers: Names or `fnmatch` patterns of the layers that produce the units, or of attentions;
            a leading `!` excludes. None for all.
        samples: Number of images; None for all.
        latency_batch: Images of the forward pass that `budget="latency"` measures.
        memory_budget: Bytes for statistics, or text such as `"2GiB"`; layers are then processed in
            several passes over the images. None for no limit.
        head: Name of the classifier's layer, or several; None finds it. Its inputs are the
            features, which are kept.
        batch: Function from a batch to `(images, anything)`, for batches of another form.
        refit: After it, train all weights to match the outputs of the original model, on these
            images: `"blocks"`, other windows or a `fastsal.Refit`; see `fastsal.refit`.
        progress: Whether a progress bar is shown, or a function `(done, total)` that is called.
        seed: Seed of all random numbers.

    Returns:
        Widths before and after, the removed units, sizes, and what was left out.

    Raises:
        InvalidArgument: An argument is invalid, no units are found, or so much cannot be removed.
        UnknownParameter: A pattern of `layers` matches nothing.
        DataError: Images are invalid, or too few.
        UnsupportedLayer: The model has no features.

        If an error is raised, the model is as it was.
    """
    how = Settings(
        structure, budget, scope, floor, multiple, criterion, weighting, compensate, reconstruct,
        damping, samples, latency_batch, memory_budget, seed, progress,
    ).checked()  # fmt: skip
    refits = None if refit is None else Refit.of(refit)
    batches = ruled(batches, batch)
    if isinstance(batches, Iterator):
        if refits is not None or how.memory_budget is not None:
            raise InvalidArgument(
                "batches must be iterable several times (a list or a DataLoader) with refit or "
                "memory_budget, got an iterator"
            )
        batches = list(as_batches(batches, how.samples, "ignored"))
    model, clock = unwrapped(model), Clock()
    if next(model.parameters(), None) is None:
        raise InvalidArgument(f"model must have parameters, got {type(model).__name__} without any")
    images, batches = first_images(batches)
    check_images(images)
    with using_head(model, head), restored(model, on_error_only=True):
        units = _chosen(find(model, images, structure), layers, structure)
        segments = _segments(model, units, images, how)
        sizes = Sizes(model, units, segments)
        before = _size(sizes)
        dense = None if refits is None else copy.deepcopy(model)
        source, judge = _apart(model, batches, how)
        clock.lap("find")
        work = Work(model, units, replace(how, samples=None), source)
        work.score()
        clock.lap("statistics and scores")
        choose = partial(
            choose_widths, units.groups, work.costs, sizes, how.sparsity_of(sparsity),
            what=budget, multiple=how.multiple,
        )  # fmt: skip
        candidates = candidate_widths(units.groups, choose, how.scope, how.floor)
        if judge is None or (len(candidates) == 1 and not how.reconstructs):
            chosen = Choice(candidates[0], work.fold(candidates[0]), None)
        else:
            chosen = judge.best(work, candidates)
        cuts = work.cuts(chosen.widths)
        clock.lap("widths and fold")
        rebuilt = None
        if judge is not None and chosen.loss is not None and cuts:
            rebuilt = _reconstructed(model, judge, cuts, chosen, source, how)
            clock.lap("reconstruction")
        if rebuilt is None or not rebuilt.kept:
            applied(chosen.changes)
        cut(model, cuts)
        masks = _all_kept(model, units, {"sparsity": sparsity, **how.recipe()})
        refitted = None
        if refits is not None and dense is not None:
            refitted = refit_model(
                model, dense, batches, masks, refits,
                samples=samples, progress=progress, seed=how.seed,
            )  # fmt: skip
            clock.lap("refit")
        return StructureResult(
            structure,
            {group.name: (group.units, chosen.widths[group.name]) for group in units.groups},
            work.removed(chosen.widths),
            work.costs,
            before,
            _size(sizes, chosen.widths),
            units.left_out,
            masks,
            widths_of(model),
            work.samples,
            clock.seconds,
            chosen.loss,
            rebuilt,
            refitted,
        )


def _apart(
    model: nn.Module, batches: Batches, how: Settings
) -> tuple[Iterable[Pair], Judge | None]:
    """Return images for statistics, and a judge if something is decided by held-out images."""
    source = Repeated(lambda: as_batches(batches, how.samples, "ignored"))
    if how.scope != "auto" and not how.reconstructs:
        return source, None
    held = HeldOutSamples(source.__iter__, seed=how.seed, most=HELD_OUT_MOST)
    if how.reconstruct:
        require_some(held)
    return (held.others, Judge(model, list(held))) if held.samples else (source, None)


def _reconstructed(
    model: nn.Module,
    judge: Judge,
    cuts: Cuts,
    chosen: Choice,
    source: Iterable[Pair],
    how: Settings,
) -> Reconstruction | None:
    """Reconstruct where that is asked for, or possible and not ruled out.

    Raises:
        InvalidArgument: It is asked for, and `memory_budget` is too small.
    """
    if not how.reconstructs:
        return None
    room = None
    if how.memory_budget is not None:
        assert not isinstance(how.memory_budget, str)
        room = room_for(model, how.memory_budget)
        if room is None and how.reconstruct:
            raise InvalidArgument(
                f"memory_budget is too small for reconstruct, got {gib(how.memory_budget)}; set "
                "reconstruct=False"
            )
        if room is None:
            return None
    return judge.reconstruct(cuts, chosen, source, how.seed, room)


def _chosen(units: Units, layers: str | Sequence[str] | None, structure: str) -> Units:
    """Return the groups that `layers` selects.

    Raises:
        InvalidArgument: There are none.
        UnknownParameter: A pattern matches nothing.
    """
    known = [group.name for group in units.groups]
    if not known:
        # That some layers are outputs is no reason why the others are not units.
        reasons = sorted(units.left_out.items(), key=lambda each: each[1] == IS_OUTPUT)
        why = next(iter(reasons), None)
        reason = "" if why is None else f" ({why[0]}: {why[1]})"
        raise InvalidArgument(
            f"structure: the model has no units that can be removed as {structure!r}{reason}; "
            f"the structures are {', '.join(STRUCTURES)}"
        )
    if layers is None:
        return units
    given: Any = layers
    is_one = isinstance(given, str) or not isinstance(given, Iterable)
    patterns: list[str] = [given] if is_one else list(given)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise InvalidArgument(f"layers must be names or patterns of layers, got {layers!r:.80}")
    wanted: set[str] = set()
    if all(pattern.startswith("!") for pattern in patterns):
        wanted = set(known)
    for pattern in sorted(patterns, key=lambda p: p.startswith("!")):
        found = {name for name in known if fnmatchcase(name, pattern.removeprefix("!"))}
        if not found:
            raise UnknownParameter(
                f"layers: {pattern!r} matches none of {listed(known)}{did_you_mean(pattern, known)}"
            )
        wanted = wanted - found if pattern.startswith("!") else wanted | found
    groups = [group for group in units.groups if group.name in wanted]
    if not groups:
        raise InvalidArgument(f"layers must select at least one layer, got {layers!r:.80}")
    others = {name: "not selected by layers" for name in known if name not in wanted}
    return Units(groups, {**units.left_out, **others}, units.macs, units.normalization)


def _segments(model: nn.Module, units: Units, images: Tensor, how: Settings) -> list[Segment]:
    """Return the latency of the parts of the model, if the budget is one of latency."""
    if how.budget != "latency":
        return []
    repeats = math.ceil(how.latency_batch / len(images))
    some = torch.cat([images] * repeats)[: how.latency_batch]
    return measure_segments(model, units.groups, some)


def _size(sizes: Sizes, kept: dict[str, int] | None = None) -> Size:
    units, parameters, macs = (
        round(sizes.total(what, kept)) for what in ("units", "parameters", "macs")
    )
    return Size(units, parameters, macs, sizes.total("latency", kept) or None)


def _all_kept(model: nn.Module, units: Units, recipe: dict[str, Any]) -> Masks:
    """Return masks of the weights of all groups, True everywhere."""
    names = {p.name for group in units.groups for p in group.slices if p.tensor == "weight"}
    shapes = {n: p.shape for n, p in model.named_parameters() if n in names and p.dim() > 1}
    masks = {
        name: torch.ones(shape, dtype=torch.bool, device="cpu") for name, shape in shapes.items()
    }
    return Masks(masks, recipe, copy=False)
