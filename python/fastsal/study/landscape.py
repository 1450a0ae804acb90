"""Why did it transfer? Losses between dense, pruned and tuned weights, and overlaps of Fishers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.collection.collect import collect
from fastsal.pruning.shelf import restore
from fastsal.study.images import few, images_of
from fastsal.study.settings.schema import LandscapeSettings
from fastsal.study.sources import Source
from fastsal.transfer.evaluation import measure_tasks
from fastsal.transfer.fisher_overlap import fisher_overlap
from fastsal.transfer.headed import PREFIX, Headed
from fastsal.transfer.loss_line import line
from fastsal.transfer.tasks import Task

PATHS = (("dense", "pruned"), ("pruned", "tuned"))


Rows = list[dict[str, Any]]


def landscape_of(source: Source, states: Mapping[str, Mapping[str, Tensor]]) -> Rows:
    """Measure every task along the lines between the states of a cell.

    Args:
        source: its backbone is as it was after.
        states: `{"dense" | "pruned" | "tuned": name to value}`.

    Returns:
        Rows of `task`, `role`, `path`, `t`, `loss`, `accuracy`.
    """
    settings, backbone = _settings(source), source.backbone
    found = []
    for name, task in backbone.tasks.items():
        some = Task(name, task.fit, few(images_of(task.test), settings.images))

        def measure(model: nn.Module, some: Task = some) -> tuple[float, float]:
            measured = measure_tasks(model, [some], backbone.heads)[some.name]
            return measured.accuracy, measured.loss

        role = "source" if name in source.settings.tasks else "transfer"
        for start, end in PATHS:
            if end not in states:
                continue
            points = line(
                backbone.model, states[start], states[end], measure, points=settings.points
            )
            found += [
                {
                    "task": name,
                    "role": role,
                    "path": f"{start}-{end}",
                    "t": point.t,
                    "loss": point.loss,
                    "accuracy": point.accuracy,
                }
                for point in points
            ]
    return found


def overlap_of(source: Source) -> Rows:
    """Compare the source's Fisher with that of every task, at the dense weights.

    Returns:
        Rows of `task`, `layer`, `position`, `diagonal`, `eigenspace`.
    """
    if source.overlaps is None:
        settings, backbone = _settings(source), source.backbone
        before = backbone.state()
        restore(backbone.tensors, backbone.dense)
        try:
            own = source.dense_fisher()
            source.overlaps = [
                {
                    "task": name,
                    "layer": row.layer.removeprefix(PREFIX),
                    "position": row.position,
                    "diagonal": row.diagonal,
                    "eigenspace": row.eigenspace,
                }
                for name, task in backbone.tasks.items()
                for row in fisher_overlap(own, _fisher(source, name, task), k=settings.eigenvectors)
            ]
        finally:
            restore(backbone.tensors, before)
    return source.overlaps


def _fisher(source: Source, name: str, task: Task) -> BlockFisher:
    study, backbone = source.study, source.backbone
    images = images_of(task.prune)
    return collect(
        Headed(backbone.model, [backbone.sources[name]]),
        images.batches(
            backbone.spec,
            study.batch_size,
            samples=min(_settings(source).samples, len(images)),
            shuffle_seed=source.seed,
        ),
        block_size=study.block_size,
        curvature=source.curvature,
        parameters=source.parameters,
    )


def _settings(source: Source) -> LandscapeSettings:
    assert source.study.landscape is not None
    return source.study.landscape
