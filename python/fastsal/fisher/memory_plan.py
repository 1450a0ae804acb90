"""How a collection uses memory, as plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fastsal.fisher.parts import Part, Unit, blocks

# Of the sums that are worked on at a time: they, what is made of them, and a margin.
_VIEWS = 3


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


# What a process takes beside the tensors of a pass: buffers inside of kernels, free lists.
_OVERHEAD, OVERHEAD_BYTES = 1.1, 80 * 2**20


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
        return round(_OVERHEAD * (self.fixed + self.sample * max(n, 2)) + OVERHEAD_BYTES)
