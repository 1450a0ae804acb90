"""Statistics that are nowhere: whatever uses them goes over the images again.

Sums of a group of parts are collected, used, and forgotten before those of the next group are made.
So a model is pruned whose sums fit neither into memory nor onto a disk, in several times the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fastsal.data.batches import check_again
from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.collection.work import GroupPass
from fastsal.fisher.parts import Part, Parts
from fastsal.utils.live_memory import trim_heap
from fastsal.utils.progress import Report, reporter

if TYPE_CHECKING:
    from fastsal.fisher.collection.work import Work


class Recollected(BlockFisher):
    """Statistics that are collected whenever they are used, in groups of parts.

    They are those of one place only as long as the model has the same weights at each use.

    Args:
        work: What is done each time; its statistics, of no samples, are what these are like.
        groups: Parts of them, by their keys, that are collected at a time.
        add: Does it for one group.
        progress: Where to report, at each use.
    """

    def __init__(
        self,
        work: Work,
        groups: Sequence[Parts],
        add: GroupPass,
        progress: bool | Report = False,
    ) -> None:
        vars(self).update(vars(work.fisher))
        self._like = work.fisher
        self._groups = groups
        self._add_group = add
        self._progress = progress
        self._works: list[Work] = []
        self._next = len(groups)  # of the use that goes on, if one does
        self._join(work)

    def _join(self, work: Work) -> None:
        """More samples, which are summed by themselves and then added."""
        # This also fills what a source holds out.
        samples = sum(len(images) for images, _ in work.source())
        self._works.append(work)
        self._samples += samples
        self._rows_seen += samples

    def _views(self, *, cuts: bool = True) -> Iterator[tuple[BlockFisher, Parts]]:
        """The statistics in groups of parts, each collected when it is asked for.

        Args:
            cuts: Whether parts that alone take more than a group are cut; the groups are as they
                are.
        """
        total = self._rows_seen * len(self._groups)
        with reporter(self._progress, "statistics") as report:
            for number, parts in enumerate(self._groups):
                before = number * self._rows_seen

                def so_far(done: int, _: int | None, before: int = before) -> None:
                    report(before + done, total)

                some = self._collected(number, parts, so_far)
                self._next = number + 1
                for view, inner in some._views(cuts=cuts):
                    found = [_within(parts[part.name], part) for part in inner.values()]
                    keys = [part.key for part in found]
                    view._parameters = dict(zip(keys, view._parameters.values(), strict=True))
                    yield view, dict(zip(keys, found, strict=True))
                    view._parameters.clear()
                some._parameters.clear()
                trim_heap()

    def _finish(self) -> None:
        """Go through what is left of a use that failed, as other ranks do that it has not."""
        for number in range(self._next, len(self._groups)):
            self._collected(number, self._groups[number], lambda *_: None)
        self._next = len(self._groups)

    def _collected(self, number: int, parts: Parts, report: Report) -> BlockFisher:
        some = self._like._empty(parts)
        first, *others = self._works
        self._add_group(first, some, number, report)
        for work in others:
            more = self._like._empty(parts)
            self._add_group(work, more, number, lambda *_: None)
            some.merge(more)
        trim_heap()  # what a pass held, before scores are made
        check_again(self._rows_seen, some._rows_seen)
        return some


def _within(outer: Part, inner: Part) -> Part:
    """A part of a part, as one of the parameter."""
    return Part(outer.name, outer.start + inner.start, outer.start + inner.stop, outer.size)
