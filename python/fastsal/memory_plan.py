"""What statistics within a memory budget will take, and how: micro-batch, passes, place.

In this order: the micro-batch is made as small as it must be; then the statistics stay in memory
if they fit; else the images are gone over several times, each time for a group of parameters; and
what was summed goes to a file of a scratch folder.

Axes: d weights, B weights of a block, n samples of a micro-batch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fastsal.errors import InvalidArgument
from fastsal.file_arrays import check_folder, trim_heap
from fastsal.fisher import VIEW_BYTES, BlockFisher
from fastsal.gradients.precision import row_dtype
from fastsal.live_memory import LiveMemory
from fastsal.parts import Part, cut, packed_bytes, whole
from fastsal.passes import Gradients
from fastsal.sizes import gib

# Of a budget, what is planned with: the rest is for what no plan sees.
_PLANNED = 0.94
# Of the sums that are worked on at a time: they, what is made of them, and a margin.
_VIEWS = 3
# Of the planned, what activations may take before the micro-batch is halved.
_ACTIVATIONS = 0.4
# A larger share is taken before micro-batches are so small that kernels change with them, and with
# the kernels the last bits of gradients.
_SMALL, _ACTIVATIONS_OF_SMALL = 4, 0.6
# What a process takes beside the tensors of a pass: buffers inside of kernels, free lists.
_OVERHEAD, _OVERHEAD_BYTES = 1.1, 80 * 2**20

# Of what is left for statistics, what they may take where more samples are to join.
_JOINED = 0.85


@dataclass(frozen=True)
class PassMemory:
    """What one forward and backward pass takes, besides the statistics.

    Attributes:
        fixed: Bytes whatever the samples.
        sample: Bytes a sample.
    """

    fixed: float
    sample: float

    def of(self, n: int) -> int:
        """Bytes of the process for `n` samples; the probe always takes two."""
        return round(_OVERHEAD * (self.fixed + self.sample * max(n, 2)) + _OVERHEAD_BYTES)


@dataclass(frozen=True)
class MemoryPlan:
    """How statistics are collected within a memory budget. Bytes are those that are added.

    Attributes:
        budget: Bytes that may be added to the process; None for no limit.
        micro_batch: Samples of one forward and backward pass.
        step: Samples that are gathered before they are added to the statistics.
        groups: Parts of the model that one pass over the images collects, one group a pass.
        place: Where the statistics are kept: `"memory"`, or a `"file"` of the scratch folder.
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
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def passes(self) -> int:
        """Times that the images are gone over."""
        return len(self.groups)

    @property
    def memory(self) -> int:
        """The most bytes that are added to the process."""
        collecting = self.kept_collecting + self.group + self.rows + self.activations
        held = self.statistics if self.place == "memory" else 0
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
            "seconds": self.seconds,
        }


def unlimited(how: Gradients, fisher: BlockFisher) -> MemoryPlan:
    """The plan without a budget: everything in memory, in one pass; nothing is measured."""
    parts = whole(fisher.shapes)
    return MemoryPlan(
        budget=None,
        micro_batch=how.micro_batch,
        step=how.step,
        groups=[parts],
        place="memory",
        statistics=fisher.final_nbytes,
        group=fisher.final_nbytes,
        rows=_rows(how, how.micro_batch, parts),
        activations=0,
        kept=0,
        kept_collecting=0,
        view=VIEW_BYTES,
    )


def plan_within(
    budget: int,
    how: Gradients,
    fisher: BlockFisher,
    images: Tensor,
    labels: Tensor | None,
    *,
    scratch: str | os.PathLike[str] | None = None,
    scratch_budget: int | None = None,
    kept: int = 0,
    kept_collecting: int = 0,
    joins: bool = False,
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
        scratch: Folder for statistics that do not fit into memory.
        scratch_budget: Bytes that they may take there.
        kept: Bytes that are held beside the statistics while weights are scored and moved.
        kept_collecting: Bytes that are held while sums are made.
        joins: Whether more samples join later, for whose sums there must be room.
        repeats: Whether the images can be gone over several times.
        is_dry: Whether only a plan is wanted: the scratch folder need not be there.

    Raises:
        InvalidArgument: The budget is too small, or needs a scratch folder, or more room in it.
    """
    total = round(_PLANNED * budget)
    planned = total - kept_collecting
    view = min(VIEW_BYTES, budget // 16)
    trial = _group(how, fisher, how.micro_batch, max(planned // 2, 2**20)) or [whole(fisher.shapes)]
    memory = measure(how, {part.name for part in trial[0]}, images, labels)
    size = _micro_batch(memory, how.micro_batch, planned)
    activations = memory.of(size)
    room = planned - activations
    share = _JOINED if joins else 1.0
    # In memory the sums are still there when weights are scored.
    inside = round(share * min(room, total - kept - _VIEWS * view))
    groups = _group(how, fisher, size, inside) if inside > 0 else None
    stays = groups is not None and len(groups) == 1
    if not stays:
        groups = _group(how, fisher, size, round(share * room)) if room > 0 else None
    fits = kept + _VIEWS * view <= total
    if groups is None or not fits:
        block = _cost(how, fisher, size, _first_block(fisher))
        least = max(kept_collecting + activations + block, kept + _VIEWS * view) / _PLANNED
        raise InvalidArgument(
            f"memory_budget: got {gib(budget)}; takes at least {gib(least)}: {gib(activations)} "
            f"for a pass of {max(size, 2)} samples, {gib(block)} for one block" + _and_kept(kept)
        )
    plan = MemoryPlan(
        budget=budget,
        micro_batch=size,
        step=how.step,
        groups=groups,
        place="memory" if stays else "file",
        statistics=_sums(how, fisher, whole(fisher.shapes)),
        group=max(_sums(how, fisher, group) for group in groups),
        rows=max(_rows(how, size, group) for group in groups),
        activations=activations,
        kept=kept,
        kept_collecting=kept_collecting,
        view=view,
    )
    if plan.place == "memory":
        return replace(plan, spare=max(0, room - plan.statistics))
    plan = replace(plan, spare=room)
    if scratch is None and not is_dry:
        raise InvalidArgument(
            f"memory_budget: the statistics take {gib(plan.statistics)}, and {gib(room)} of "
            f"{gib(budget)} are left for them; give scratch=FOLDER to keep them in a file "
            "(--scratch), fewer parameters, or a smaller block_size"
        )
    if scratch_budget is not None and plan.disk > scratch_budget:
        raise InvalidArgument(
            f"scratch_budget: got {gib(scratch_budget)}; the statistics take {gib(plan.disk)}"
        )
    if is_dry:
        return replace(plan, scratch=None if scratch is None else os.fspath(scratch))
    assert scratch is not None
    check_folder(scratch, plan.disk)
    if not repeats:
        raise InvalidArgument(
            "batches: is an iterator, which gives its images once, and within memory_budget they "
            f"are gone over {plan.passes} times; takes a list, a DataLoader or anything else that "
            "can be iterated again"
        )
    return replace(plan, scratch=os.fspath(scratch))


def groups_within(room: int, how: Gradients, fisher: BlockFisher) -> list[list[Part]]:
    """Groups of parts whose sums and rows fit a memory; single parameters where nothing does."""
    return _group(how, fisher, how.micro_batch, room) or [[p] for p in whole(fisher.shapes)]


def measure(how: Gradients, names: set[str], images: Tensor, labels: Tensor | None) -> PassMemory:
    """What passes with the gradients of some parameters take, from those of one and two samples."""
    if how.chosen and next(iter(how.chosen.values())).device.type == "meta":
        return _on_meta(how, names, images)
    peaks = []
    for n in (1, 2):
        x, y = first_samples(images, labels, n)
        trial = replace(how, micro_batch=n)
        with trial.engine(names) as engine, LiveMemory() as live:
            engine.prepare(x, y)
            live.reset()
            engine.run(x, y, drop)
            peaks.append(live.peak + engine.scratch_nbytes)
    trim_heap()
    return _line(*peaks)


def drop(name: str, rows: Tensor) -> None:
    """A sink that keeps nothing."""
    del name, rows


def _on_meta(how: Gradients, names: set[str], images: Tensor) -> PassMemory:
    """The same without computing: the tensors that autograd keeps on the meta device."""
    peaks = []
    for n in (1, 2):
        x, _ = first_samples(images, None, n)
        tracked = {name: p for name, p in how.chosen.items() if name in names}
        flags = {name: p.requires_grad for name, p in how.model.named_parameters()}
        for p in how.model.parameters():
            p.requires_grad_(False)
        try:
            for p in tracked.values():
                p.requires_grad_(True)
            with LiveMemory() as live:
                outputs = how.model(x.to("meta"))
                torch.autograd.grad(outputs.float().sum(), list(tracked.values()))
                peaks.append(live.peak)
        finally:
            for name, p in how.model.named_parameters():
                p.requires_grad_(flags[name])
    largest = max(p.numel() * row_dtype(p).itemsize for p in how.chosen.values())
    line = _line(*peaks)
    return replace(line, sample=line.sample + largest)


def _line(one: float, two: float) -> PassMemory:
    each = max(0.0, two - one)
    return PassMemory(max(0.0, one - each), each)


def first_samples(images: Tensor, labels: Tensor | None, n: int) -> tuple[Tensor, Tensor | None]:
    """The first `n` samples, over again where there are fewer."""
    at = torch.arange(n) % len(images)
    return images[at], None if labels is None else labels[at]


def _micro_batch(memory: PassMemory, most: int, planned: int) -> int:
    """The largest of `most`, its half, ..., whose tensors take a share of what is planned."""
    size = most
    usable = planned - _OVERHEAD_BYTES
    while size > 2:  # the probe takes two samples anyway
        tensors = memory.of(size) - _OVERHEAD_BYTES
        share = _ACTIVATIONS_OF_SMALL if size <= _SMALL else _ACTIVATIONS
        if tensors <= share * usable:
            break
        size //= 2
    return size


def _group(
    how: Gradients, fisher: BlockFisher, micro_batch: int, room: int
) -> list[list[Part]] | None:
    return cut(fisher.shapes, fisher.block_size, lambda p: _cost(how, fisher, micro_batch, p), room)


def _cost(how: Gradients, fisher: BlockFisher, micro_batch: int, part: Part) -> int:
    return _sums(how, fisher, [part]) + _rows(how, micro_batch, [part])


def _sums(how: Gradients, fisher: BlockFisher, parts: list[Part]) -> int:
    """Bytes of the statistics of parts while they are collected."""
    size = fisher._itemsize
    total = 0
    for part in parts:
        limit = (min(fisher.block_size or part.size, part.size) + 1) // 2
        if how.samples is not None and how.samples <= limit:
            total += size * len(part) * (how.samples + 1)  # the gradients themselves are kept
        else:
            total += packed_bytes(part, fisher.block_size, size)
    return total


def _rows(how: Gradients, micro_batch: int, parts: list[Part]) -> int:
    """Bytes of the rows that are gathered for a step."""
    if micro_batch >= how.step:
        return 0
    sizes = {part.name: row_dtype(how.chosen[part.name]).itemsize for part in parts}
    return how.step * sum(len(part) * sizes[part.name] for part in parts)


def _first_block(fisher: BlockFisher) -> Part:
    part = max(whole(fisher.shapes), key=lambda p: min(fisher.block_size or p.size, p.size))
    return Part(part.name, 0, min(fisher.block_size or part.size, part.size), part.size)


def _and_kept(kept: int) -> str:
    return f", {gib(kept)} for scores, masks and copies of weights" if kept else ""


def kept_by_pruning(
    chosen: Mapping[str, nn.Parameter], *, is_auto: bool, rounds: int, has_scratch: bool
) -> dict[str, int]:
    """Bytes that pruning keeps beside statistics, as `plan_within` takes them.

    Scores and two masks; weights to go back to and those that compensation finds, and the best try
    where a damping is chosen. With a scratch folder copies of weights and of scores lie there.
    While sums are made there are the masks of the round before, or of the best try.
    """
    weights = sum(p.numel() for p in chosen.values())
    copies = sum(p.numel() * p.element_size() for p in chosen.values())
    kept, collecting = weights * (4 + 1 + 1), 0
    if is_auto:
        kept += weights
    if is_auto or rounds > 1:
        collecting += 2 * weights
    if not has_scratch:
        tries = 2 * copies + 4 * weights if is_auto else 0
        kept += copies + 4 * weights + tries
        collecting += copies + tries
    return {"kept": kept, "kept_collecting": collecting}
