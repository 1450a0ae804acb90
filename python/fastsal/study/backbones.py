"""Load the dense models of a study, fit their heads and evaluate them on every task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from fastsal.data.class_map import IMAGENET, imagenet_map, indices_of
from fastsal.data.opening import open_images
from fastsal.deploy.run_folder import MODEL
from fastsal.errors import InvalidArgument
from fastsal.models.classifier import class_count
from fastsal.models.inputs import InputSpec, input_spec
from fastsal.models.loading import load_model
from fastsal.models.saving import check_savable
from fastsal.pruning.shelf import copies
from fastsal.study.images import class_map_of
from fastsal.study.settings.schema import ModelSettings, Study, TaskSettings
from fastsal.transfer.evaluation import Measurement, measure_tasks
from fastsal.transfer.head_cache import HeadCache
from fastsal.transfer.headed import backbone_parameters
from fastsal.transfer.heads import AnyHead, fit_heads
from fastsal.transfer.linear_head import Head
from fastsal.transfer.own import Columns, OwnHead
from fastsal.transfer.tasks import Task
from fastsal.utils.choices import HeadKind
from fastsal.utils.digests import Digest
from fastsal.utils.paths import user_path


@dataclass(frozen=True)
class Backbone:
    """A dense model with the state that its cells share.

    Attributes:
        settings: Settings of the model.
        model: The model; it is dense again after each cell.
        spec: Preprocessing of its images.
        names: Names of the weights to prune.
        dense: Copy of its dense parameters and buffers.
        tasks: `{name: task}`.
        heads: `{task: head}` for evaluation.
        differentiable: `{task: head}` for gradients, for tasks that need them.
        before: `{task: accuracy and loss}` of the dense model.
    """

    settings: ModelSettings
    model: nn.Module
    spec: InputSpec
    names: list[str]
    dense: dict[str, Tensor]
    tasks: Mapping[str, Task]
    heads: dict[str, AnyHead]
    differentiable: dict[str, Head | OwnHead]
    before: dict[str, Measurement]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Current parameters and buffers, not copied."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the current parameters and buffers."""
        return copies(self.tensors)

    def measure(self) -> dict[str, Measurement]:
        """Return accuracy and loss on every task with the current weights."""
        return measure_tasks(self.model, list(self.tasks.values()), self.heads)


def open_backbone(
    study: Study, settings: ModelSettings, tasks: Mapping[str, Task], cache: Path
) -> Backbone:
    """Load a model, fit the heads of all tasks on its dense features, and evaluate it.

    Args:
        study: Settings of heads and batches.
        settings: Settings of the model.
        tasks: All tasks.
        cache: Folder of fitted heads.

    Raises:
        FastsalError: The model cannot be loaded, or a head cannot be fitted.
    """
    model = load_model(
        model_path(study, settings),
        weights=weights_path(study, settings),
        weights_key=settings.weights_key,
        num_classes=settings.num_classes,
        in_chans=settings.in_chans,
        device=study.device,
    )
    if study.save == "models":
        check_savable(model)
    spec = spec_of(model, settings)
    heads: dict[str, AnyHead] = {}
    differentiable: dict[str, Head | OwnHead] = {}
    pruned_on = {name for source in study.sources for name in source.tasks}
    head_cache = HeadCache(cache)
    for task in study.tasks:
        kind = task.head or study.head

        def fit(kind: HeadKind, task: TaskSettings = task) -> AnyHead:
            columns = _columns(model, study, task) if kind == "own" else None
            found = fit_heads(
                model,
                tasks[task.name],
                kind=kind,
                columns=columns,
                ridge=study.ridge,
                spec=spec,
                batch_size=study.batch_size,
                cache=head_cache,
            )
            return found[task.name]

        heads[task.name] = fit(kind)
        if task.name in pruned_on or study.diagnostics is not None:
            # A k-nearest neighbor head is not differentiable: gradients use a ridge head.
            head = fit("ridge") if kind == "knn" else heads[task.name]
            assert isinstance(head, (Head, OwnHead))
            differentiable[task.name] = head
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return Backbone(
        settings=settings,
        model=model,
        spec=spec,
        names=backbone_parameters(model, settings.parameters),
        dense=copies(tensors),
        tasks=tasks,
        heads=heads,
        differentiable=differentiable,
        before=measure_tasks(model, list(tasks.values()), heads),
    )


def spec_of(model: nn.Module, settings: ModelSettings) -> InputSpec:
    """Return the preprocessing of the images of a model."""
    return input_spec(
        model,
        size=settings.size,
        crop_pct=settings.crop_pct,
        crop_mode=settings.crop_mode,
        interpolation=settings.interpolation,
    )


def _columns(model: nn.Module, study: Study, task: TaskSettings) -> Columns | None:
    """Return which logit of the model each class of a task belongs to; None for the default."""
    class_map = class_map_of(task, study)
    if class_map is None and task.classes is None:
        return None
    # A task may have a subset of the classes; all class names select the logits.
    names = open_images(task.data, root=study.root).classes
    if class_map is None:
        return names
    if class_map == IMAGENET:
        class_map = imagenet_map(class_count(model))
    return indices_of(class_map, names, names)


def model_path(study: Study, settings: ModelSettings) -> str:
    """Return a timm name, or `file.py:function` with the path resolved, as for `load_model`."""
    file, colon, function = settings.model.rpartition(":")
    if not colon or not file.endswith(".py"):
        return settings.model
    return f"{study.folder / user_path(file)}:{function}"


def weights_path(study: Study, settings: ModelSettings) -> str | Path | None:
    """Return the path of a weights file, `"pretrained"` or None, as for `load_model`.

    The path is relative to the root of the study, or else to the folder of its file. Of the folder
    of a run, it is that of the weights inside.
    """
    if settings.weights is None or settings.weights == "pretrained":
        return settings.weights
    given = user_path(settings.weights)
    paths = [folder / given for folder in (study.root, study.folder)]
    paths = [path / MODEL if path.is_dir() else path for path in paths]
    return next((path for path in paths if path.is_file()), paths[0])


def check_files(study: Study) -> None:
    """Raise InvalidArgument if a file of a model does not exist."""
    for settings in study.models:
        file = model_path(study, settings).rpartition(":")[0]
        if file.endswith(".py") and not Path(file).is_file():
            raise InvalidArgument(f"model {settings.name!r}: {file} does not exist")
        weights = weights_path(study, settings)
        if weights not in (None, "pretrained") and not Path(str(weights)).is_file():
            raise InvalidArgument(
                f"model {settings.name!r}: weights file {settings.weights} does not exist in "
                + " or ".join(dict.fromkeys(map(str, (study.root, study.folder))))
            )


def digest_of(study: Study, settings: ModelSettings) -> str:
    """Return a digest of the model file and the weights file of a model."""
    digest = Digest().text(settings.model)
    file = model_path(study, settings).rpartition(":")[0]
    for path in (file, weights_path(study, settings)):
        if path and path != "pretrained" and Path(path).is_file():
            digest.file(Path(path))
    return digest.hexdigest()[:16]
