"""Passes over images: each adds the statistics of some parts of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fastsal.data.batches import Pair, in_micro_batches
from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.parts import Parts
from fastsal.fisher.sinks.choosing import choose_sink
from fastsal.gradients import GradientEngine
from fastsal.gradients.losses import LossFunction
from fastsal.utils.choices import Curvature
from fastsal.utils.progress import Report


@dataclass(frozen=True)
class Gradients:
    """How the gradients of a model are formed and summed.

    Attributes:
        model: The model.
        chosen: Name to parameter, of all that there are statistics of.
        loss: As for `collect`.
        labels: As for `collect`.
        seed: Of what is drawn; the same in every pass.
        autocast: Type of the passes, or None.
        loss_scale: As for `collect`.
        micro_batch: Samples of one forward and backward pass.
        step: Samples that are gathered before they are added to the statistics.
        samples: Samples in all, or None if not known.
    """

    model: nn.Module
    chosen: Mapping[str, nn.Parameter]
    loss: str | LossFunction
    curvature: Curvature
    seed: int
    autocast: torch.dtype | None
    loss_scale: float | None
    micro_batch: int
    step: int
    samples: int | None

    def engine(self, names: Iterable[str]) -> GradientEngine:
        """The engine of a pass that forms the gradients of some parameters."""
        wanted = set(names)
        return GradientEngine(
            self.model,
            {name: p for name, p in self.chosen.items() if name in wanted},
            loss=self.loss,
            curvature=self.curvature,
            seed=self.seed,
            autocast=self.autocast,
            loss_scale=self.loss_scale,
            micro_batch=self.micro_batch,
        )


def add_pass(
    gradients: Gradients,
    fisher: BlockFisher,
    parts: Parts,
    pairs: Iterable[Pair],
    report: Report,
) -> None:
    """Go over images once and add their gradients to the statistics of some parts.

    Args:
        gradients: How.
        fisher: Statistics by the keys of `parts`.
        parts: What gradients are formed of.
        pairs: Images and labels.
        report: Is told of samples as they are done.
    """
    with gradients.engine(part.name for part in parts.values()) as engine:
        sink = choose_sink(
            fisher,
            gradients.chosen,
            parts,
            gradients.step,
            samples=gradients.samples,
        )
        total = 0
        # A micro-batch at a time, so that an error can name the sample.
        for images, targets in in_micro_batches(pairs, gradients.micro_batch, gradients.step):
            if total == 0:
                engine.prepare(images, targets)
            total += images.shape[0]
            if gradients.samples is None:
                sink.expect(total)
            engine.run(images, targets, sink)
            sink.end_micro_batch(images.shape[0])
            report(total, gradients.samples)
        sink.flush()
