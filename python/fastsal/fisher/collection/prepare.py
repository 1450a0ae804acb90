"""Checks of the arguments of `collect`, and the plan of the collection."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from fastsal.data.batches import Batches, Source, check_samples
from fastsal.errors import InvalidArgument
from fastsal.fisher.block_memory import check_block_memory
from fastsal.fisher.checks import check_block_size, check_precision, check_shapes
from fastsal.fisher.collection.budget import plan_within, unlimited
from fastsal.fisher.collection.label_checks import LabelChecks
from fastsal.fisher.collection.passes import PassSettings
from fastsal.fisher.collection.work import Work
from fastsal.fisher.memory_plan import Share, Use
from fastsal.fisher.model_sums import ModelSums
from fastsal.fisher.parts import row_unit
from fastsal.fisher.sinks.gathering import step_rows
from fastsal.gradients import choose_micro_batch, select_parameters
from fastsal.gradients.feature_parameters import without_classifier
from fastsal.gradients.losses import LABEL_USE, LossFunction
from fastsal.gradients.weights_in_use import warn_if_computed
from fastsal.models.input_axis import layer_axes
from fastsal.utils.choices import CURVATURES, Curvature
from fastsal.utils.numbers import whole
from fastsal.utils.sizes import parse_bytes
from fastsal.utils.suggestions import check_choice


def prepare(
    model: nn.Module,
    batches: Batches,
    *,
    block_size: int | None = 64,
    samples: int | None = None,
    loss: str | LossFunction = "cross-entropy",
    curvature: Curvature = "empirical",
    parameters: str | Sequence[str] | None = None,
    memory_budget: int | str | None = None,
    scratch: str | os.PathLike[str] | None = None,
    scratch_budget: int | str | None = None,
    seed: int = 0,
    precision: str = "float32",
    micro_batch: int | None = None,
    autocast: torch.dtype | None = None,
    loss_scale: float | None = None,
    use: Use | None = None,
    by_rows: bool = False,
    warns: bool = True,
    needs_blocks: bool = False,
    is_dry: bool = False,
    share: Share | None = None,
    checks_labels: bool = True,
) -> Work:
    """Check the arguments of `collect`, and plan the collection.

    The other arguments are those of `collect`. `use` gives the memory requirements of what the
    statistics are for, and `share` how they are divided among processes (see `plan_within`).
    `by_rows` requires parts to end with whole groups of a pattern; `needs_blocks` tells that packed
    blocks are used, also where gradients are kept; `is_dry` requests only the plan; `checks_labels`
    allows warnings about labels and the classifier, which one process gives; `warns` allows one
    about weights that layers compute from parameters.

    Raises:
        InvalidArgument: An argument is invalid, the memory budget is too small, or a block does not
            fit in memory.
    """
    samples = check_samples(samples)
    micro_batch = None if micro_batch is None else whole("micro_batch", micro_batch, 1)
    block_size, precision = check_block_size(block_size), check_precision(precision)
    chosen = select_parameters(model, parameters)
    check_choice("curvature", curvature, CURVATURES)
    source = Source(batches, samples, LABEL_USE[curvature])
    if warns:
        warn_if_computed(model, chosen, lambda: source.first()[0])
    if curvature == "features":
        chosen = without_classifier(model, chosen, parameters, source.first()[0])
    shapes = {name: tuple(p.shape) for name, p in chosen.items()}
    check_shapes(shapes)
    sums = ModelSums.empty(shapes, block_size, precision)
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    check_block_memory(
        shapes,
        block_size,
        sums.itemsize,
        samples=samples,
        budget=budget,
        needs_blocks=needs_blocks,
    )
    checks = LabelChecks(model, loss, curvature) if checks_labels and share is None else None
    share = share or Share()
    if by_rows:
        share = replace(share, unit=row_unit(shapes, block_size, layer_axes(model, shapes)))
    size = micro_batch or choose_micro_batch(chosen)
    step = step_rows(chosen, sums.final_nbytes, size, samples)
    how = PassSettings(
        model, chosen, loss, curvature, seed, autocast, loss_scale, size, step, samples, checks
    )
    if budget is None:
        if scratch is not None or scratch_budget is not None:
            raise InvalidArgument("scratch and scratch_budget must be None without memory_budget")
        return Work(how, unlimited(how, sums, share, use.images if use else 0), sums, source)
    plan = plan_within(
        budget,
        how,
        sums,
        *source.first(),
        scratch=scratch,
        scratch_budget=None
        if scratch_budget is None
        else parse_bytes(scratch_budget, "scratch_budget"),
        use=use or Use(),
        repeats=source.repeats,
        is_dry=is_dry,
        share=share,
    )
    sums.storage.view_bytes = plan.view
    return Work(replace(how, micro_batch=plan.micro_batch), plan, sums, source)
