"""A pruning job: a model, its images and how to prune it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastsal.data.batches import Batches, Pair, as_batches, in_micro_batches
from fastsal.fisher.collection.groups import add_samples, collected
from fastsal.fisher.statistics import Statistics
from fastsal.gradients import choose_micro_batch
from fastsal.gradients.losses import LABEL_USE
from fastsal.pruning.limits.examination import Examination
from fastsal.pruning.limits.limit import Limit
from fastsal.pruning.measured import HeldOut, HeldOutFeatures, InMicroBatches, Measured
from fastsal.pruning.shelf import all_or_nothing, restore
from fastsal.pruning.step import Plan


@dataclass(frozen=True)
class Job:
    """A model, its images, and how to prune it.

    Attributes:
        model: To be pruned in place.
        batches: What `prune` was given.
        samples: Samples of each round; None takes all.
        plan: How.
        chosen: Name to parameter.
        statistics: Arguments of `collect` but model, batches, samples and seed.
        loss: `(outputs, labels)` to losses `[n]`.
        dense: Name to the weights whose features are to be matched, with `curvature="features"`;
            None where the model has them.
    """

    model: nn.Module
    batches: Batches | None
    samples: int | None
    plan: Plan
    chosen: Mapping[str, nn.Parameter]
    statistics: dict[str, Any]
    loss: Callable[[Tensor, Tensor], Tensor]
    dense: Mapping[str, Tensor] | None = None

    def source(self) -> Iterable[Pair]:
        """The images, checked; nothing without any."""
        if self.batches is None:
            return ()
        return as_batches(self.batches, self.samples, LABEL_USE[self.statistics["curvature"]])

    def held_out(self, images: list[Pair], fisher: Statistics | None = None) -> Measured:
        """Images to measure a model on, by its loss or, with `curvature="features"`, its features.

        They run through the model in micro-batches of the size that the statistics use, so that
        losses round alike within a memory budget and without one.
        """
        asked = self.statistics["micro_batch"]
        size = planned_micro_batch(fisher) or asked or choose_micro_batch(self.chosen)
        return self._measured(list(in_micro_batches(images, size, size)))

    def _measured(self, images: list[Pair]) -> InMicroBatches:
        """Return what `held_out` does, from micro-batches."""
        if self.statistics["curvature"] != "features":
            return HeldOut.of(self.model, images, self.loss)
        if self.dense is None:
            return HeldOutFeatures.of(self.model, images, self._of_all)
        present = self.plan.shelf.put("present", self.chosen)
        restore(self.chosen, self.dense)
        try:
            return HeldOutFeatures.of(self.model, images, self._of_all)
        finally:
            restore(self.chosen, present)

    def _of_all(self, features: list[Tensor]) -> list[Tensor]:
        """Return the features of all micro-batches, from those that are measured here."""
        return features

    def examination(
        self, images: list[Pair], limit: Limit, fisher: Statistics | None
    ) -> Examination:
        """The test of a limit on some images."""
        if size := planned_micro_batch(fisher):
            images = list(in_micro_batches(images, size, size))
        return self._examination(images, limit)

    def _examination(self, images: list[Pair], limit: Limit) -> Examination:
        return Examination(self.model, images, limit, self.loss)

    def collect(self, source: Iterable[Pair], seed: int, *, quiet: bool = False) -> Statistics:
        """Statistics of some images."""
        if isinstance(self.batches, Iterator):
            source = iter(source)  # so that it is known to give them once
        return self._collected(source, self._options(seed, quiet=quiet))

    def _collected(self, source: Iterable[Pair], options: dict[str, Any]) -> Statistics:
        return collected(self.model, source, **options)

    def _add(self, fisher: Statistics, images: list[Pair], options: dict[str, Any]) -> None:
        add_samples(fisher, self.model, images, **options)

    def _options(self, seed: int, *, quiet: bool) -> dict[str, Any]:
        """Arguments of `collect` for some images."""
        return {**self.statistics, "seed": seed} | ({"progress": False} if quiet else {})

    def joining(self, fisher: Statistics, held: list[Pair], seed: int) -> Callable[[], None]:
        """Return what adds the statistics of held-out images to others, in place.

        They are collected at once, or, where memory is limited, when they are added. The model has
        the same weights then.
        """
        if fisher.plan is not None:
            options = self._options(seed, quiet=True)
            return lambda: self._add(fisher, held, options)
        rest = self.collect(held, seed, quiet=True)
        return lambda: fisher.merge(rest)

    def all_or_nothing(self) -> contextlib.AbstractContextManager[dict[str, Tensor]]:
        """Give the weights back if anything goes wrong; yields a copy of them."""
        return all_or_nothing(self.chosen, self.plan.shelf)


def planned_micro_batch(fisher: Statistics | None) -> int | None:
    """Samples of a pass within the memory budget of statistics; None without a budget."""
    return None if fisher is None or fisher.plan is None else fisher.plan.micro_batch
