"""Remove whole units from a model: hidden units of MLPs, attention heads, channels of blocks.

The cost of units is that of Optimal Brain Surgeon for structures (Hassibi and Stork 1993; Kurtic et
al., ZipLM, NeurIPS 2023), with the second moment of the units' activations and their mean; what is
left makes up for what is gone by an exact fold into the next layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from fastsal.data.batches import Batches, first_images
from fastsal.data.unpacking import BatchRule, ruled
from fastsal.errors import InvalidArgument, UnknownParameter
from fastsal.models.classifier import using_head
from fastsal.models.widths import widths_of
from fastsal.models.wrappers import unwrapped
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.refit.refit import refit as refit_model
from fastsal.pruning.refit.settings import Refit
from fastsal.pruning.structured.budget import Sizes, choose_widths
from fastsal.pruning.structured.find import Units, find
from fastsal.pruning.structured.groups import cut, restored
from fastsal.pruning.structured.result import Size, StructureResult
from fastsal.pruning.structured.settings import Settings
from fastsal.pruning.structured.work import Work
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
from fastsal.utils.suggestions import did_you_mean, listed


def prune_structure(
    model: nn.Module,
    batches: Batches,
    sparsity: float,
    *,
    structure: Structure = "mlp",
    budget: Budget = "units",
    scope: StructureScope = "global",
    floor: float = 0.1,
    multiple: int | None = None,
    criterion: StructureCriterion = "joint",
    weighting: Weighting = "features",
    compensate: bool = True,
    damping: float = 1e-3,
    layers: str | Sequence[str] | None = None,
    samples: int | None = None,
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
        batches: Images `[n, ...]`, or pairs `(images, anything)`; labels are not used. An iterator
            is enough without `refit` and `memory_budget`.
        sparsity: Fraction of `budget` to remove, in `[0, 1)`.
        structure: `"mlp"`: hidden units of MLPs; `"heads"`: attention heads; `"channels"`: channels
            of convolutions that are not added to a residual stream.
        budget: What `sparsity` is a fraction of: the `"units"` of this structure, or the
            `"parameters"` or `"macs"` (multiply-accumulates of linear layers and convolutions) of
            the whole model. Units are compared by their cost for what they save.
        scope: `"global"`: the cheapest units of all layers go; `"layer"`: the same fraction of
            each layer.
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
        damping: `λ` on the change of the weights, as a multiple of the mean variance of the units.
        layers: Names or `fnmatch` patterns of the layers that produce the units, or of attentions;
            a leading `!` excludes. None for all.
        samples: Number of images; None for all.
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
        structure, budget, scope, floor, multiple, criterion, weighting, compensate, damping,
        samples, memory_budget, seed, progress,
    ).checked()  # fmt: skip
    refits = None if refit is None else Refit.of(refit)
    batches = ruled(batches, batch)
    if isinstance(batches, Iterator) and (refits is not None or how.memory_budget is not None):
        raise InvalidArgument(
            "batches must be iterable several times (a list or a DataLoader) with refit or "
            "memory_budget, got an iterator"
        )
    model, clock = unwrapped(model), Clock()
    images, batches = first_images(batches)
    with using_head(model, head), restored(model, on_error_only=True):
        units = _chosen(find(model, images, structure), layers, structure)
        sizes = Sizes(model, units)
        before = _size(sizes)
        dense = None if refits is None else copy.deepcopy(model)
        clock.lap("find")
        work = Work(model, units, how, batches)
        work.score()
        clock.lap("statistics and scores")
        widths = choose_widths(
            units.groups, work.costs, sizes, how.sparsity_of(sparsity),
            what=budget, scope=scope, floor=how.floor, multiple=how.multiple,
        )  # fmt: skip
        cuts = work.cuts(widths)
        if compensate and cuts:
            work.fold(cuts)
        cut(model, cuts)
        clock.lap("fold")
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
        {group.name: (group.units, widths[group.name]) for group in units.groups},
        work.removed(widths),
        work.costs,
        before,
        _size(sizes, widths),
        units.left_out,
        masks,
        widths_of(model),
        work.samples,
        clock.seconds,
        refitted,
    )


def _chosen(units: Units, layers: str | Sequence[str] | None, structure: str) -> Units:
    """Return the groups that `layers` selects.

    Raises:
        InvalidArgument: There are none.
        UnknownParameter: A pattern matches nothing.
    """
    known = [group.name for group in units.groups]
    if not known:
        why = next(iter(units.left_out.items()), None)
        reason = "" if why is None else f" ({why[0]}: {why[1]})"
        raise InvalidArgument(
            f"structure: the model has no units that can be removed as {structure!r}{reason}; "
            f"the structures are {', '.join(STRUCTURES)}"
        )
    if layers is None:
        return units
    patterns = [layers] if isinstance(layers, str) else list(layers)
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
    return Units(groups, {**units.left_out, **others}, units.positions, units.normalization)


def _size(sizes: Sizes, kept: dict[str, int] | None = None) -> Size:
    return Size(*(round(sizes.total(what, kept)) for what in ("units", "parameters", "macs")))


def _all_kept(model: nn.Module, units: Units, recipe: dict[str, Any]) -> Masks:
    """Return masks of the weights of all groups, True everywhere."""
    names = {p.name for group in units.groups for p in group.slices if p.tensor == "weight"}
    shapes = {n: p.shape for n, p in model.named_parameters() if n in names and p.dim() > 1}
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    return Masks(masks, recipe, copy=False)
