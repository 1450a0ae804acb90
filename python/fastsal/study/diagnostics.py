"""Loss lines between dense, pruned and fine-tuned weights, and overlaps of Fisher statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.collection.collect import collect
from fastsal.pruning.shelf import restore
from fastsal.study.folder_format import DENSE_PRUNED, PRUNED_TUNED
from fastsal.study.images import few, images_of
from fastsal.study.settings.schema import DiagnosticsSettings
from fastsal.study.sources import PruningSource
from fastsal.transfer.evaluation import measure_tasks
from fastsal.transfer.fisher_overlap import fisher_overlap
from fastsal.transfer.headed import PREFIX, Headed
from fastsal.transfer.loss_line import measure_line
from fastsal.transfer.tasks import Task

Rows = list[dict[str, Any]]


def loss_lines_of(source: PruningSource, states: Mapping[str, Mapping[str, Tensor]]) -> Rows:
    """Measure every task along the lines between the states of a cell.

    Args:
        source: Source with the backbone to measure; its weights are restored.
        states: `{"dense" | "pruned" | "tuned": {name: tensor}}`.

    Returns:
        Rows of `task`, `role`, `path`, `t`, `loss` (nats), `accuracy` (0 to 1).
    """
    settings, backbone = _settings(source), source.backbone
    found = []
    for name, task in backbone.tasks.items():
        some = Task(
            name, task.fit, few(images_of(task.test), settings.images, "diagnostics.images")
        )

        def measure(model: nn.Module, some: Task = some) -> tuple[float, float]:
            measured = measure_tasks(model, [some], backbone.heads)[some.name]
            return measured.accuracy, measured.loss

        for path in (DENSE_PRUNED, PRUNED_TUNED):
            start, end = path.split("-")
            if end not in states:
                continue
            points = measure_line(
                backbone.model, states[start], states[end], measure, points=settings.points
            )
            found += [
                {
                    "task": name,
                    "role": source.role(name),
                    "path": path,
                    "t": point.t,
                    "loss": point.loss,
                    "accuracy": point.accuracy,
                }
                for point in points
            ]
    return found


def overlaps_of(source: PruningSource) -> Rows:
    """Compare the Fisher statistics of a source with those of every task, at the dense weights.

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


def _fisher(source: PruningSource, name: str, task: Task) -> BlockFisher:
    study, backbone = source.study, source.backbone
    images = images_of(task.prune)
    return collect(
        Headed(backbone.model, [backbone.differentiable[name]]),
        images.batches(
            backbone.spec,
            study.batch_size,
            samples=min(_settings(source).samples, len(images)),
            shuffle_seed=source.seed,
        ),
        block_size=study.block_size,
        curvature=source.curvature,
        parameters=source.parameters,
        autocast=source.autocast,
    )


def _settings(source: PruningSource) -> DiagnosticsSettings:
    assert source.study.diagnostics is not None
    return source.study.diagnostics
