"""One pass over images, which adds the statistics of some parts of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fastsal.data.batches import Pair, in_micro_batches
from fastsal.fisher.collection.label_checks import LabelChecks
from fastsal.fisher.model_sums import ModelSums
from fastsal.fisher.parts import Parts
from fastsal.fisher.sinks.choosing import choose_sink
from fastsal.gradients import GradientEngine
from fastsal.gradients.losses import LossFunction
from fastsal.utils.choices import Curvature
from fastsal.utils.progress import Report


@dataclass(frozen=True)
class PassSettings:
    """Settings of passes: how gradients are formed and summed.

    Attributes:
        model: The model.
        chosen: Name to parameter, of all parameters with statistics.
        loss: `"cross-entropy"`, or a function `(outputs, labels)` that returns losses `[n]`.
        curvature: `"empirical"`, `"sampled"` or `"features"`; see `collect`.
        seed: Seed of random draws, which are the same in every pass.
        autocast: Type that passes run in, or None.
        loss_scale: Factor of the losses in the backward pass; None chooses by type.
        micro_batch: Samples of one forward and backward pass.
        step: Samples whose rows are gathered before they are added to the sums.
        samples: Total number of samples, or None if unknown.
        checks: Notes about labels and the classifier; None for none.
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
    checks: LabelChecks | None = None

    def engine(self, names: Iterable[str], *, pads: bool = True) -> GradientEngine:
        """Return the engine of a pass that forms the gradients of some parameters."""
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
            pads=pads,
        )


def add_pass(
    settings: PassSettings,
    sums: ModelSums,
    parts: Parts,
    pairs: Iterable[Pair],
    report: Report,
) -> None:
    """Iterate over images once, and add their gradients to the sums of some parts.

    Args:
        settings: Settings of the pass.
        sums: The sums, by the keys of `parts`.
        parts: Parts to collect, by their keys.
        pairs: Images and labels.
        report: Called with the number of samples done and the total or None.
    """
    with settings.engine(part.name for part in parts.values()) as engine:
        sink = choose_sink(
            sums,
            settings.chosen,
            parts,
            settings.step,
            samples=settings.samples,
        )
        total = 0
        # One micro-batch at a time, so that an error can name the sample.
        for images, targets in in_micro_batches(pairs, settings.micro_batch, settings.step):
            if total == 0:
                engine.prepare(images, targets)
                if settings.checks is not None:
                    settings.checks.begin(images)
            total += images.shape[0]
            if settings.samples is None:
                sink.expect(total)
            losses = engine.run(images, targets, sink)
            if settings.checks is not None:
                settings.checks.add(losses, engine.outputs)
            sink.end_micro_batch(images.shape[0])
            report(total, settings.samples)
        sink.flush()
        if settings.checks is not None:
            settings.checks.end()
