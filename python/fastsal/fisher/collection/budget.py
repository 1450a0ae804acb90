"""What statistics within a memory budget will take, and how: micro-batch, passes, place.

In this order: the micro-batch is made as small as it must be; then the statistics stay in memory
if they fit; else the images are gone over several times, each time for a group of parameters. What
was summed goes to a file of the scratch folder, if one is given; else it is scored and forgotten,
and collected again when it is needed again.

Axes: d weights, B weights of a block, n samples of a micro-batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from fastsal.errors import InvalidArgument
from fastsal.fisher.block_fisher import VIEW_BYTES, BlockFisher
from fastsal.fisher.collection.pass_memory import OVERHEAD_BYTES, PassMemory, measure
from fastsal.fisher.collection.passes import Gradients
from fastsal.fisher.parts import Part, Unit, blocks, cut, packed_bytes, whole
from fastsal.gradients.precision import row_dtype
from fastsal.utils.mapped_files import check_folder
from fastsal.utils.sizes import gib

# Of a budget, what is planned with: the rest is for what no plan sees.
_PLANNED = 0.94
# Of the sums that are worked on at a time: they, what is made of them, and a margin.
_VIEWS = 3
# Of the planned, what activations may take before the micro-batch is halved.
_ACTIVATIONS = 0.4
# A larger share is taken before micro-batches are so small that kernels change with them, and with
# the kernels the last bits of gradients.
_SMALL, _ACTIVATIONS_OF_SMALL = 4, 0.8
# Of what is left for statistics, what they may take where more samples are to join.
_JOINED = 0.85
# Rows of a part from all ranks, at most, on their way to its sums, and how often they are there.
_IN_FLIGHT, _COPIES = 2**27, 3


@dataclass(frozen=True)
class Use:
    """What statistics are for, as far as memory goes.

    Attributes:
        kept: Bytes that are held beside them while weights are scored and moved.
        kept_collecting: Bytes that are held while sums are made.
        joins: Whether more samples join later, for whose sums there must be room.
        again: Whether sums may be collected again whenever they are used, as the model has the
            weights that they are of.
    """

    kept: int = 0
    kept_collecting: int = 0
    joins: bool = False
    again: bool = False


@dataclass(frozen=True)
class Share:
    """What one of several processes takes of the statistics.

    Attributes:
        ranks: Number of processes, which share sums out.
        sums_first: Whether each sums whole groups over its own samples before they are shared out.
        unit: What of a parameter stays together; None is a block.
        agree: What all processes plan with, from what each has measured.
    """

    ranks: int = 1
    sums_first: bool = False
    unit: Unit | None = None
    agree: Callable[[PassMemory], PassMemory] = lambda memory: memory

    def of(self, nbytes: int, part: Part, block_size: int | None) -> int:
        """Bytes that a process has of those of a part, which is shared out in units."""
        unit = (self.unit or blocks(block_size))(part)
        least = -(-nbytes * min(unit, len(part)) // len(part))
        return max(-(-nbytes // self.ranks), least)

    def rows(self, micro_batch: int) -> int:
        """Rows of all processes at a time."""
        return micro_batch * self.ranks

    def longest(self, micro_batch: int, block_size: int | None, budget: int | None) -> int | None:
        """Weights of what is sent at a time, at most; None for one process, which sends nothing."""
        if self.ranks == 1:
            return None
        packed = ((block_size or 64) + 1) // 2 + 1
        return max(1, _in_flight(budget) // (4 * max(self.rows(micro_batch), packed)))

    def sent(self, budget: int | None) -> int:
        """Bytes for what is on its way."""
        return 0 if self.ranks == 1 else _COPIES * _in_flight(budget)


def _in_flight(budget: int | None) -> int:
    return _IN_FLIGHT if budget is None else min(_IN_FLIGHT, budget // 32)


@dataclass(frozen=True)
class MemoryPlan:
    """How statistics are collected within a memory budget. Bytes are those that are added.

    Attributes:
        budget: Bytes that may be added to the process; None for no limit.
        micro_batch: Samples of one forward and backward pass.
        step: Samples that are gathered before they are added to the statistics.
        groups: Parts of the model that one pass over the images collects, one group a pass.
        place: Where the statistics are kept: `"memory"`, a `"file"` of the scratch folder, or
            `"nowhere"`: they are collected again, in all these passes, for each use.
        statistics: Bytes of all packed blocks and sums.
        group: Bytes of the sums of the largest group.
        rows: Bytes of the rows that are gathered for it.
        activations: Bytes of a forward and backward pass, with what kernels need.
        kept: Bytes that are held beside sums while weights are scored and moved: scores, masks,
            copies of weights.
        kept_collecting: Bytes that are held while sums are made.
        view: Bytes of sums that are worked on at a time.
        spare: Bytes that are left for the sums of samples that join later.
        scratch: The scratch folder, if one is used.
        ranks: Processes that share the work out; all else is of one of them.
        sent: What one sends to the others to bytes; empty where it is not planned for several.
        seconds: Name of a step to its estimated time; empty without calibration.
    """

    budget: int | None
    micro_batch: int
    step: int
    groups: list[list[Part]]
    place: str
    statistics: int
    group: int
    rows: int
    activations: int
    kept: int
    kept_collecting: int
    view: int
    spare: int = 0
    scratch: str | None = None
    ranks: int = 1
    sent: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def passes(self) -> int:
        """Times that the images are gone over."""
        return len(self.groups)

    @property
    def memory(self) -> int:
        """The most bytes that are added to the process."""
        collecting = self.kept_collecting + self.group + self.rows + self.activations
        held = {"memory": self.statistics, "file": 0, "nowhere": self.group}[self.place]
        return max(collecting, self.kept + held + _VIEWS * self.view)

    @property
    def disk(self) -> int:
        """Bytes in the scratch folder."""
        return self.statistics if self.place == "file" else 0

    def as_dict(self) -> dict[str, object]:
        """Values for JSON."""
        return {
            "memory_budget": self.budget,
            "memory": self.memory,
            "disk": self.disk,
            "passes": self.passes,
            "micro_batch": self.micro_batch,
            "rows_a_step": self.step,
            "place": self.place,
            "statistics": self.statistics,
            "statistics_of_a_pass": self.group,
            "rows": self.rows,
            "activations": self.activations,
            "kept": self.kept,
            "kept_collecting": self.kept_collecting,
            "ranks": self.ranks,
            "sent_bytes": self.sent,
            "seconds": self.seconds,
        }


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


def use_by_pruning(
    chosen: Mapping[str, nn.Parameter],
    *,
    is_auto: bool,
    rounds: int,
    has_scratch: bool,
    needs_fisher: bool = True,
    joins: bool = False,
    ranks: int = 1,
    gathered: int = 0,
) -> Use:
    """What pruning keeps beside statistics.

    Scores and two masks; weights to go back to and those that compensation finds, and the best try
    where a damping is chosen. With a scratch folder copies of weights and of scores lie there.
    While sums are made there are the masks of the round before, or of the best try. Several `ranks`
    share out what is scored by statistics and moved; `gathered` is the memory of weights that lie
    on other processes else.
    """
    weights = sum(p.numel() for p in chosen.values())
    copies = sum(p.numel() * p.element_size() for p in chosen.values())
    own = -(-weights // ranks)
    kept, collecting = 4 * (own if needs_fisher else weights) + 2 * weights, 0
    if is_auto:
        kept += weights
    if is_auto or rounds > 1:
        collecting += 2 * weights
    if not has_scratch:
        tries = 2 * copies + 4 * own if is_auto else 0
        kept += copies + 4 * own + tries
        collecting += copies + tries
    return Use(kept + gathered, collecting + gathered, joins=joins, again=not has_scratch)
