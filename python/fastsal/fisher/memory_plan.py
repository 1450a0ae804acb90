"""How a collection uses memory, as plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fastsal.fisher.parts import Part, Unit, block_unit
from fastsal.utils.sizes import gib

# Memory of sums that are worked on at a time, in multiples of their size: the sums, what is
# computed from them, and a margin.
VIEW_COPIES = 3

# Bytes of rows that are received at a time from all ranks, and the number of copies held.
_IN_FLIGHT, _COPIES = 2**27, 3


@dataclass(frozen=True)
class Use:
    """Memory requirements of what statistics are collected for.

    Attributes:
        kept: Bytes held beside the sums while weights are scored and compensated.
        kept_collecting: Bytes held while sums are accumulated.
        images: Bytes of held-out images, held all the time.
        joins: Whether more samples are added later, whose sums need memory.
        again: Whether statistics may be recomputed on each use, as the model has the same weights
            then.
    """

    kept: int = 0
    kept_collecting: int = 0
    images: int = 0
    joins: bool = False
    again: bool = False


@dataclass(frozen=True)
class Share:
    """How the statistics are divided among processes.

    Attributes:
        ranks: Number of processes.
        sums_first: Whether each process sums whole groups over its own samples before the sums are
            divided.
        unit: Weights of a parameter that are never separated; None is a block.
        agree: Returns the memory that all processes plan with, from what one has measured.
    """

    ranks: int = 1
    sums_first: bool = False
    unit: Unit | None = None
    agree: Callable[[PassMemory], PassMemory] = lambda memory: memory

    def of(self, nbytes: int, part: Part, block_size: int | None) -> int:
        """Return the bytes that one process holds of `nbytes` of a part, divided in units."""
        unit = (self.unit or block_unit(block_size))(part)
        least = -(-nbytes * min(unit, len(part)) // len(part))
        return max(-(-nbytes // self.ranks), least)

    def rows(self, micro_batch: int) -> int:
        """Return the rows that all processes compute at a time."""
        return micro_batch * self.ranks

    def longest(self, micro_batch: int, block_size: int | None, budget: int | None) -> int | None:
        """Return the most weights that are sent at a time; None for a single process."""
        if self.ranks == 1:
            return None
        packed = ((block_size or 64) + 1) // 2 + 1
        return max(1, _in_flight(budget) // (4 * max(self.rows(micro_batch), packed)))

    def sent(self, budget: int | None) -> int:
        """Return the bytes of send and receive buffers."""
        return 0 if self.ranks == 1 else _COPIES * _in_flight(budget)


def _in_flight(budget: int | None) -> int:
    return _IN_FLIGHT if budget is None else min(_IN_FLIGHT, budget // 32)


@dataclass(frozen=True, repr=False)
class MemoryPlan:
    """How statistics are collected within a memory budget. Bytes are those added to the process.

    Attributes:
        budget: Most bytes that may be added to the process; None for no limit.
        micro_batch: Samples of one forward and backward pass.
        step: Samples whose rows are gathered before they are added to the statistics.
        groups: Parts of the model that are collected in each pass over the images.
        place: Where statistics are stored: in `"memory"`, in a `"file"` of the scratch folder, or
            `"recomputed"`: nothing is stored, statistics are recomputed on each use, in all passes.
        statistics: Bytes of all packed blocks and sums.
        group: Bytes of the sums of the largest group.
        rows: Bytes of the gathered rows of the largest group.
        activations: Bytes of a forward and backward pass, including buffers of kernels.
        kept: Bytes of scores, masks and copies of weights, held while weights are scored and
            compensated.
        kept_collecting: Bytes of these that are held while sums are accumulated.
        view: Bytes of sums that are worked on at a time.
        images: Bytes of held-out images that are kept in memory.
        spare: Bytes left for the sums of samples that are added later.
        scratch: The scratch folder, if one is used.
        ranks: Number of processes; all other numbers are those of one of them.
        sent: Kind of data to the bytes that one process sends to the others; empty if not planned
            for several processes.
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
    images: int = 0
    spare: int = 0
    scratch: str | None = None
    ranks: int = 1
    sent: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def passes(self) -> int:
        """Number of passes over the images."""
        return len(self.groups)

    @property
    def memory(self) -> int:
        """Peak of the bytes added to the process."""
        collecting = self.kept_collecting + self.group + self.rows + self.activations
        held = {"memory": self.statistics, "file": 0, "recomputed": self.group}[self.place]
        return self.images + max(collecting, self.kept + held + VIEW_COPIES * self.view)

    @property
    def disk(self) -> int:
        """Bytes of the scratch file."""
        return self.statistics if self.place == "file" else 0

    def __repr__(self) -> str:
        budget = "None" if self.budget is None else gib(self.budget)
        seconds = f", seconds={self.seconds}" if self.seconds else ""
        return (
            f"MemoryPlan(budget={budget}, memory={gib(self.memory)}, disk={gib(self.disk)}, "
            f"place={self.place!r}, passes={self.passes}, micro_batch={self.micro_batch}, "
            f"step={self.step}, ranks={self.ranks}{seconds})"
        )

    def as_dict(self) -> dict[str, object]:
        """Return the plan as values for JSON."""
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
            "images": self.images,
            "ranks": self.ranks,
            "sent_bytes": self.sent,
            "seconds": self.seconds,
        }


# Memory of a process beside the tensors of a pass: buffers of kernels, free lists of allocators.
_OVERHEAD, OVERHEAD_BYTES = 1.1, 80 * 2**20


@dataclass(frozen=True)
class PassMemory:
    """Memory of one forward and backward pass, without the statistics.

    Attributes:
        fixed: Bytes for any number of samples.
        sample: Bytes for each sample.
    """

    fixed: float
    sample: float

    def of(self, n: int) -> int:
        """Return the bytes for `n` samples; at least two, as two are used to test the model."""
        return round(_OVERHEAD * (self.fixed + self.sample * max(n, 2)) + OVERHEAD_BYTES)
