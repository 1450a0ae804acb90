"""A model of a study, dense: loaded, its heads fitted, and measured on every task."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from fastsal.data.opening import open_images
from fastsal.errors import InvalidArgument
from fastsal.models.inputs import InputSpec, input_spec
from fastsal.models.loading import load_model
from fastsal.pruning.shelf import copies
from fastsal.study.settings.schema import ModelSettings, Study, TaskSettings
from fastsal.transfer.evaluation import Measurement, measure_tasks
from fastsal.transfer.head_cache import HeadCache
from fastsal.transfer.headed import backbone_parameters
from fastsal.transfer.heads import AnyHead, fit_heads
from fastsal.transfer.linear_head import Head
from fastsal.transfer.own import OwnHead
from fastsal.transfer.tasks import Task


@dataclass(frozen=True)
class Backbone:
    """A dense model and what cells of it share.

    Attributes:
        settings: the study's.
        model: dense again after each cell.
        spec: what images it takes.
        names: weights that are pruned.
        dense: its parameters and buffers, to go back to.
        tasks: `{name: task}`.
        heads: that tasks are measured with.
        sources: linear heads that gradients of a task go through, where they are needed.
        before: the dense model's accuracy and loss on every task.
    """

    settings: ModelSettings
    model: nn.Module
    spec: InputSpec
    names: list[str]
    dense: dict[str, Tensor]
    tasks: Mapping[str, Task]
    heads: dict[str, AnyHead]
    sources: dict[str, Head | OwnHead]
    before: dict[str, Measurement]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its parameters and buffers as they are."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def state(self) -> dict[str, Tensor]:
        """A copy of them."""
        return copies(self.tensors)

    def measure(self) -> dict[str, Measurement]:
        """Accuracy and loss on every task, as the weights are."""
        return measure_tasks(self.model, list(self.tasks.values()), self.heads)


def open_backbone(
    study: Study, settings: ModelSettings, tasks: Mapping[str, Task], cache: Path
) -> Backbone:
    """Load a model, fit the heads of all tasks on its dense features, and measure it.

    Args:
        study: settings of heads and batches.
        settings: of the model.
        tasks: all tasks.
        cache: a folder that keeps heads.

    Raises:
        FastsalError: the model cannot be loaded, or a head not fitted.
    """
    model = load_model(
        model_path(study, settings),
        weights=weights_path(study, settings),
        num_classes=settings.num_classes,
        in_chans=settings.in_chans,
    )
    spec = input_spec(model, size=settings.size)
    heads: dict[str, AnyHead] = {}
    sources: dict[str, Head | OwnHead] = {}
    pruned_on = {name for source in study.sources for name in source.tasks}
    keeper = HeadCache(cache)
    for task in study.tasks:
        kind = task.head or study.head

        def fit(kind: str, task: TaskSettings = task) -> AnyHead:
            # Of the model's own classes a task may have some: all names say which logits.
            is_part = kind == "own" and task.classes is not None
            found = fit_heads(
                model,
                tasks[task.name],
                kind=kind,
                columns=open_images(task.data, root=study.root).classes if is_part else None,
                ridge=study.ridge,
                spec=spec,
                batch_size=study.batch_size,
                cache=keeper,
            )
            return found[task.name]

        heads[task.name] = fit(kind)
        if task.name in pruned_on or study.landscape is not None:
            # No gradient goes through neighbours: there a ridge head stands in for them.
            head = fit("ridge") if kind == "knn" else heads[task.name]
            assert isinstance(head, (Head, OwnHead))
            sources[task.name] = head
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return Backbone(
        settings=settings,
        model=model,
        spec=spec,
        names=backbone_parameters(model, settings.parameters),
        dense=copies(tensors),
        tasks=tasks,
        heads=heads,
        sources=sources,
        before=measure_tasks(model, list(tasks.values()), heads),
    )


def model_path(study: Study, settings: ModelSettings) -> str:
    """Return what `load_model` takes: a timm name, or a function in a file beside the study's."""
    file, colon, function = settings.model.rpartition(":")
    if not colon or not file.endswith(".py"):
        return settings.model
    return f"{study.folder / file}:{function}"


def weights_path(study: Study, settings: ModelSettings) -> str | Path | None:
    """Return what `load_model` takes: a file, `"pretrained"` or None.

    A file is looked for below the study's root, then below the folder of its file.
    """
    if settings.weights is None or settings.weights == "pretrained":
        return settings.weights
    below = [folder / settings.weights for folder in (study.root, study.folder)]
    return next((path for path in below if path.is_file()), below[0])


def check_files(study: Study) -> None:
    """Raise InvalidArgument for a model whose files are not there, before anything is done."""
    for settings in study.models:
        file = model_path(study, settings).rpartition(":")[0]
        if file.endswith(".py") and not Path(file).is_file():
            raise InvalidArgument(f"model {settings.name!r}: there is no file {file}")
        weights = weights_path(study, settings)
        if weights not in (None, "pretrained") and not Path(str(weights)).is_file():
            raise InvalidArgument(
                f"model {settings.name!r}: there is no file {settings.weights} of weights below "
                f"{study.root} or {study.folder}"
            )


def digest_of(study: Study, settings: ModelSettings) -> str:
    """Return a digest of a model's files: its function's and its weights."""
    digest = hashlib.sha256(settings.model.encode())
    file = model_path(study, settings).rpartition(":")[0]
    for path in (file, weights_path(study, settings)):
        if path and path != "pretrained" and Path(path).is_file():
            digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:16]
