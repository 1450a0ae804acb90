"""Check the arguments of `collect` and plan the collection."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from fastsal.data.batches import Batches, Source, check_samples
from fastsal.errors import InvalidArgument
from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.collection.budget import plan_within, unlimited
from fastsal.fisher.collection.passes import Gradients
from fastsal.fisher.collection.work import Work
from fastsal.fisher.memory_plan import Share, Use
from fastsal.fisher.parts import rows
from fastsal.fisher.sinks.gathering import step_rows
from fastsal.gradients import choose_micro_batch, select_parameters
from fastsal.gradients.feature_parameters import without_classifier
from fastsal.gradients.losses import LABEL_USE, LossFunction
from fastsal.utils.choices import CURVATURES, Curvature
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
    is_dry: bool = False,
    share: Share | None = None,
) -> Work:
    """Check what `collect` was given and plan it.

    `use` and `share` are as for `plan_within`; `by_rows` says that parts are to end with rows of
    axis 0, `is_dry` that the work is not to be done.
    """
    check_samples(samples)
    if micro_batch is not None and micro_batch < 1:
        raise InvalidArgument(f"micro_batch: takes 1 or more, got {micro_batch}")
    chosen = select_parameters(model, parameters)
    check_choice("curvature", curvature, CURVATURES)
    source = Source(batches, samples, LABEL_USE[curvature])
    if curvature == "features":
        chosen = without_classifier(model, chosen, parameters, source.first()[0])
    fisher = BlockFisher(
        {name: tuple(p.shape) for name, p in chosen.items()},
        block_size=block_size,
        precision=precision,
    )
    share = share or Share()
    if by_rows:
        share = replace(share, unit=rows(fisher.shapes, block_size))
    size = micro_batch or choose_micro_batch(chosen)
    step = step_rows(chosen, fisher.final_nbytes, size, samples)
    how = Gradients(model, chosen, loss, curvature, seed, autocast, loss_scale, size, step, samples)
    if memory_budget is None:
        if scratch is not None or scratch_budget is not None:
            raise InvalidArgument("scratch: is for statistics within memory_budget; give that too")
        return Work(how, unlimited(how, fisher, share), fisher, source)
    plan = plan_within(
        parse_bytes(memory_budget),
        how,
        fisher,
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
    fisher._view_bytes = plan.view
    fisher._plan = plan
    return Work(replace(how, micro_batch=plan.micro_batch), plan, fisher, source)
