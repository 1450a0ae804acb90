"""Statistics that are not stored: each use runs the passes over the images again.

The sums of one group of parts are collected, used and freed before those of the next group. A model
can be pruned in this way if its sums fit neither in memory nor on a disk, in several times the
time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fastsal.data.batches import check_again
from fastsal.fisher.block_fisher import BlockFisher, fisher_of
from fastsal.fisher.collection.work import Passes, Work
from fastsal.fisher.memory_plan import MemoryPlan
from fastsal.fisher.model_sums import ModelSums
from fastsal.fisher.parts import Part, Parts
from fastsal.utils.live_memory import trim_heap
from fastsal.utils.progress import Report, reporter


class Recollected:
    """Statistics that are recomputed on each use, in groups of parts.

    They are consistent only if the model has the same weights at each use.

    Args:
        work: The collection; its sums stay empty.
        passes: Runs it for one group of parts at a time.
        progress: How to report progress, at each use.
    """

    def __init__(self, work: Work, passes: Passes, progress: bool | Report = False) -> None:
        self._works = [work]
        self._passes = passes
        self._progress = progress
        # This also fills the held-out images of a source that holds some out.
        self._samples = sum(len(images) for images, _ in work.source())

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self._samples

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name to shape."""
        return self._works[0].sums.shapes

    @property
    def precision(self) -> str:
        """Type of the sums, `"float32"` or `"float64"`."""
        return self._works[0].sums.precision

    @property
    def plan(self) -> MemoryPlan:
        """How memory is used."""
        return self._works[0].plan

    def __repr__(self) -> str:
        return (
            f"Recollected({len(self.shapes)} parameters, samples={self.samples}, "
            f"passes={len(self._passes.groups)})"
        )

    def add(self, work: Work) -> None:
        """Add the samples of more work, which are summed separately and then added on each use."""
        self._samples += sum(len(images) for images, _ in work.source())
        self._works.append(replace(work, sums=self._works[0].sums))

    def merge(self, other: Recollected) -> None:
        """Add the samples of other statistics of the same passes."""
        self._works += other._works
        self._samples += other._samples

    def groups(self, *, cuts: bool = True) -> Iterator[tuple[BlockFisher, Parts]]:
        """Yield the statistics of groups of parts, each collected when it is requested."""
        total = self._samples * len(self._passes.groups)
        with reporter(self._progress, "statistics") as report:
            for number, parts in enumerate(self._passes.groups):
                before = number * self._samples

                def so_far(done: int, _: int | None, before: int = before) -> None:
                    report(before + done, total)

                sums = self._collected(number, so_far)
                for view, inner in sums.views(cuts=cuts):
                    found = [_within(parts[part.name], part) for part in inner.values()]
                    keys = [part.key for part in found]
                    view.parameters = dict(zip(keys, view.parameters.values(), strict=True))
                    yield fisher_of(view), dict(zip(keys, found, strict=True))
                    view.parameters.clear()
                sums.parameters.clear()
                trim_heap()

    def _collected(self, number: int, report: Report) -> ModelSums:
        parts = self._passes.groups[number]
        first, *others = self._works
        sums = first.sums.like(parts)
        self._passes.add(first, sums, number, report)
        for work in others:
            more = first.sums.like(parts)
            self._passes.add(work, more, number, lambda *_: None)
            sums.merge(more, 1.0)
        trim_heap()  # memory of the passes, before scores are computed
        check_again(self._samples, sums.rows_seen)
        return sums


def _within(outer: Part, inner: Part) -> Part:
    """Return a part of a part as one of the parameter."""
    return Part(outer.name, outer.start + inner.start, outer.start + inner.stop, outer.size)
