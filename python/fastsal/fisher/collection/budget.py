"""What statistics within a memory budget will take, and how: micro-batch, passes, place.

In this order: the micro-batch is made as small as it must be; then the statistics stay in memory
if they fit; else the images are gone over several times, each time for a group of parameters. What
was summed goes to a file of the scratch folder, if one is given; else it is scored and forgotten,
and collected again when it is needed again.

Axes: d weights, B weights of a block, n samples of a micro-batch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from torch import Tensor

from fastsal.errors import InvalidArgument
from fastsal.fisher.block_fisher import VIEW_BYTES, BlockFisher
from fastsal.fisher.collection.pass_memory import measure
from fastsal.fisher.collection.passes import Gradients
from fastsal.fisher.memory_plan import _VIEWS, OVERHEAD_BYTES, MemoryPlan, PassMemory, Share, Use
from fastsal.fisher.parts import Part, blocks, cut, packed_bytes, whole
from fastsal.gradients.precision import row_dtype
from fastsal.utils.mapped_files import check_folder
from fastsal.utils.sizes import gib

# Of a budget, what is planned with: the rest is for what no plan sees.
_PLANNED = 0.94
# Of the planned, what activations may take before the micro-batch is halved.
_ACTIVATIONS = 0.4
# A larger share is taken before micro-batches are so small that kernels change with them, and with
# the kernels the last bits of gradients.
_SMALL, _ACTIVATIONS_OF_SMALL = 4, 0.8
# Of what is left for statistics, what they may take where more samples are to join.
_JOINED = 0.85


def unlimited(how: Gradients, fisher: BlockFisher, share: Share) -> MemoryPlan:
    """The plan without a budget: everything in memory, in one pass; nothing is measured."""
    parts = whole(fisher.shapes)
    costs = _Costs(how, fisher, how.micro_batch, share)
    statistics = sum(map(costs.kept, parts)) if share.ranks > 1 else fisher.final_nbytes
    return MemoryPlan(
        budget=None,
        micro_batch=how.micro_batch,
        step=how.step,
        groups=[parts],
        place="memory",
        statistics=statistics,
        group=statistics,
        rows=sum(map(costs.rows, parts)),
        activations=0,
        kept=0,
        kept_collecting=0,
        view=VIEW_BYTES,
        ranks=costs.share.ranks,
    )


def plan_within(
    budget: int,
    how: Gradients,
    fisher: BlockFisher,
    images: Tensor,
    labels: Tensor | None,
    *,
    use: Use,
    share: Share,
    scratch: str | os.PathLike[str] | None = None,
    scratch_budget: int | None = None,
    repeats: bool = True,
    is_dry: bool = False,
) -> MemoryPlan:
    """Plan statistics within a budget; passes of one and two samples are run for it.

    Args:
        budget: Bytes that may be added to the process.
        how: How gradients are formed, with the micro-batch of a run without a budget.
        fisher: Empty statistics of the model.
        images: A few samples.
        labels: Their labels.
        use: What statistics are for.
        share: What this process takes of them.
        scratch: Folder for statistics that do not fit into memory.
        scratch_budget: Bytes that they may take there.
        repeats: Whether the images can be gone over several times.
        is_dry: Whether only a plan is wanted: the scratch folder need not be there.

    Raises:
        InvalidArgument: The budget is too small, or needs a scratch folder, or more room in it.
    """
    total = round(_PLANNED * budget)
    view = min(VIEW_BYTES, budget // 16)
    # In memory the sums are still there when weights are scored; sums that are nowhere are
    # collected meanwhile.
    scoring = use.kept + _VIEWS * view
    has_file = scratch is not None or not use.again
    kept_collecting = use.kept_collecting if has_file else max(use.kept, use.kept_collecting)
    planned = total - kept_collecting - share.sent(budget)
    costs = _Costs(how, fisher, how.micro_batch, share)
    trial = costs.groups(max(planned // 2, 2**20)) or [whole(fisher.shapes)]
    memory = share.agree(measure(how, {part.name for part in trial[0]}, images, labels))
    size = _micro_batch(memory, how.micro_batch, planned)
    costs = replace(costs, micro_batch=size)
    activations = memory.of(size) + share.sent(budget)
    joined = _JOINED if use.joins else 1.0
    room = total - use.kept_collecting - activations
    inside = round(joined * min(room, total - scoring))
    groups = costs.groups(inside) if inside > 0 else None
    place = "memory"
    if groups is None or len(groups) > 1:
        place = "file" if has_file else "nowhere"
        room = total - kept_collecting - activations
        if place == "nowhere":
            # The sums of samples that join are made beside those that are there.
            joined = 0.5 if use.joins else 1.0
            room = min(room, total - scoring)
        groups = costs.groups(round(joined * room)) if room > 0 else None
    if groups is None or scoring > total:
        block = costs.of(costs.first_unit())
        least = max(kept_collecting + activations + block, scoring) / _PLANNED
        hint = "; less with scratch=FOLDER (--scratch)" if place == "nowhere" else ""
        raise InvalidArgument(
            f"memory_budget: got {gib(budget)}; takes at least {gib(least)}: {gib(activations)} "
            f"for a pass of {max(size, 2)} samples, {gib(block)} for one block"
            + _and_kept(use.kept)
            + hint
        )
    plan = MemoryPlan(
        budget=budget,
        micro_batch=size,
        step=how.step,
        groups=groups,
        place=place,
        statistics=sum(map(costs.kept, whole(fisher.shapes))),
        group=max(sum(map(costs.sums, group)) for group in groups),
        rows=max(sum(map(costs.rows, group)) for group in groups),
        activations=activations,
        kept=use.kept,
        kept_collecting=use.kept_collecting if place == "memory" else kept_collecting,
        view=view,
        ranks=share.ranks,
    )
    if place == "memory":
        return replace(plan, spare=max(0, room - plan.statistics))
    if place == "file":
        plan = _in_file(replace(plan, spare=room), room, scratch, scratch_budget, is_dry=is_dry)
    if not repeats and not is_dry:
        raise InvalidArgument(
            "batches: is an iterator, which gives its images once, and within memory_budget they "
            f"are gone over {plan.passes} times; takes a list, a DataLoader or anything else that "
            "can be iterated again"
        )
    return plan


def _in_file(
    plan: MemoryPlan,
    room: int,
    scratch: str | os.PathLike[str] | None,
    most: int | None,
    *,
    is_dry: bool,
) -> MemoryPlan:
    """Check that the statistics have room in a scratch folder."""
    if scratch is None and not is_dry:
        raise InvalidArgument(
            f"memory_budget: the statistics take {gib(plan.statistics)}, and {gib(room)} of "
            f"{gib(plan.budget or 0)} are left for them; give scratch=FOLDER to keep them in a "
            "file (--scratch), fewer parameters, or a smaller block_size"
        )
    if most is not None and plan.disk > most:
        raise InvalidArgument(
            f"scratch_budget: got {gib(most)}; the statistics take {gib(plan.disk)}"
        )
    if scratch is not None and not is_dry:
        check_folder(scratch, plan.disk)
    return replace(plan, scratch=None if scratch is None else os.fspath(scratch))


@dataclass(frozen=True)
class _Costs:
    """What statistics of parts cost a process, in bytes.

    Attributes:
        how: How gradients are formed.
        fisher: Empty statistics of the model.
        micro_batch: Samples of a pass.
        share: What the process takes of them.
    """

    how: Gradients
    fisher: BlockFisher
    micro_batch: int
    share: Share

    def groups(self, room: int) -> list[list[Part]] | None:
        """The model in as few groups as fit a room each; None if a unit does not."""
        size = self.fisher.block_size
        return cut(self.fisher.shapes, size, self.of, room, unit=self.share.unit)

    def of(self, part: Part) -> int:
        """Sums and gathered rows."""
        return self.sums(part) + self.rows(part)

    def sums(self, part: Part) -> int:
        """Sums while they are collected."""
        first = sums_nbytes(self.fisher, part, self.how.samples) if self.share.sums_first else 0
        return self.kept(part) + first

    def kept(self, part: Part) -> int:
        """Sums that stay."""
        nbytes = sums_nbytes(self.fisher, part, self.how.samples)
        return self.share.of(nbytes, part, self.fisher.block_size)

    def rows(self, part: Part) -> int:
        """Rows that wait to be added."""
        if self.share.sums_first or self.share.ranks == 1:
            return 0 if self.micro_batch >= self.how.step else rows_nbytes(self.how, part)
        if self.share.rows(self.micro_batch) % self.how.step == 0:
            return 0
        return self.share.of(rows_nbytes(self.how, part), part, self.fisher.block_size)

    def first_unit(self) -> Part:
        """The largest unit there is."""
        unit = self.share.unit or blocks(self.fisher.block_size)
        part = max(whole(self.fisher.shapes), key=unit)
        return Part(part.name, 0, unit(part), part.size)


def sums_nbytes(fisher: BlockFisher, part: Part, samples: int | None) -> int:
    """Bytes of the statistics of a part while they are collected."""
    size = fisher._itemsize
    limit = (min(fisher.block_size or part.size, part.size) + 1) // 2
    if samples is not None and samples <= limit:
        return size * len(part) * (samples + 1)  # the gradients themselves are kept
    return packed_bytes(part, fisher.block_size, size)


def rows_nbytes(how: Gradients, part: Part) -> int:
    """Bytes of the rows of a part that are gathered for a step."""
    return how.step * len(part) * row_dtype(how.chosen[part.name]).itemsize


def groups_within(room: int, how: Gradients, fisher: BlockFisher) -> list[list[Part]]:
    """Groups of parts whose sums and rows fit a memory; single parameters where nothing does."""
    found = _Costs(how, fisher, how.micro_batch, Share()).groups(room)
    return found or [[part] for part in whole(fisher.shapes)]


def _micro_batch(memory: PassMemory, most: int, planned: int) -> int:
    """The largest of `most`, its half, ..., whose tensors take a share of what is planned."""
    size = most
    usable = planned - OVERHEAD_BYTES
    while size > 2:  # the probe takes two samples anyway
        tensors = memory.of(size) - OVERHEAD_BYTES
        share = _ACTIVATIONS_OF_SMALL if size <= _SMALL else _ACTIVATIONS
        if tensors <= share * usable:
            break
        size //= 2
    return size


def _and_kept(kept: int) -> str:
    return f", {gib(kept)} for scores, masks and copies of weights" if kept else ""
