"""The time and memory of a study, extrapolated from short trials of its models on this machine.

The models of a trial have random weights, and its images are random: only sizes matter.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.gradients import select_parameters
from fastsal.models.evaluating import evaluating
from fastsal.models.features import feature_outputs, features
from fastsal.models.inputs import InputSpec
from fastsal.models.loading import load_model
from fastsal.pruning.criteria import CRITERIA
from fastsal.pruning.forecast import plan_memory
from fastsal.study.backbones import model_path, spec_of
from fastsal.study.cells import Cell
from fastsal.study.images import images_of
from fastsal.study.needs import Needs, source_samples, tuning_images
from fastsal.study.settings.schema import CriterionSettings, ModelSettings, Study
from fastsal.study.turns import Group, group_of
from fastsal.transfer.headed import backbone_parameters
from fastsal.transfer.tasks import Task
from fastsal.utils.devices import resolve_device
from fastsal.utils.machine import peak_memory

_IMAGES = 16  # images of a trial
_COPIES = 3  # of the weights: dense, pruned and fine-tuned
_HELD = 3  # sums of the statistics: with and without the held-out images, and of these alone


@dataclass(frozen=True)
class Speed:
    """Seconds of the steps of one model, and the memory of a process that runs it.

    Attributes:
        look: Seconds an image of a forward pass.
        train: Seconds an image of a forward and a backward pass.
        statistics: Seconds of collecting the statistics of one source.
        prune: `{criterion: seconds}` of pruning once.
        memory: Bytes of the process.
        device_memory: Bytes on the GPU; 0 on the CPU.
    """

    look: float
    train: float
    statistics: float
    prune: Mapping[str, float]
    memory: int
    device_memory: int


@dataclass(frozen=True)
class Estimate:
    """Time and memory of the cells of a study that have no result.

    Attributes:
        seconds: `{model: seconds}` of one process.
        memory: Bytes of a process, with the largest model.
        device_memory: Bytes on the GPU; 0 on the CPU.
        device: The device.
    """

    seconds: dict[str, float]
    memory: int
    device_memory: int
    device: str


def estimate(study: Study, needs: Needs, tasks: Mapping[str, Task] | None) -> Estimate:
    """Estimate the time and memory of the cells without a result.

    Args:
        study: Settings of the study.
        needs: What it needs.
        tasks: Its tasks, to measure how fast their images are read; None leaves reading out.

    Raises:
        FastsalError: A model cannot be built, or this machine does not have the device.
    """
    study = replace(study, device=str(resolve_device(study.device)))
    speeds: dict[ModelSettings, Speed] = {}
    seconds: dict[str, float] = {}
    for settings in study.models:
        cells = [cell for cell in needs.left if cell.model.name == settings.name]
        file = model_path(study, settings).rpartition(":")[0]
        if not cells or (file.endswith(".py") and not Path(file).is_file()):
            continue
        # Weights and classifiers do not matter; a timm name may end with a tag of weights.
        model = settings.model if file.endswith(".py") else settings.model.partition(".")[0]
        alike = ModelSettings("", model, size=settings.size, parameters=settings.parameters)
        if alike not in speeds:
            samples = source_samples(cells[0], needs.images)
            speeds[alike] = measured(study, settings, samples, tasks)
        seconds[settings.name] = _seconds_of(cells, study, needs, speeds[alike])
    return Estimate(
        seconds,
        max((speed.memory for speed in speeds.values()), default=0),
        max((speed.device_memory for speed in speeds.values()), default=0),
        study.device,
    )


def measured(
    study: Study, settings: ModelSettings, samples: int, tasks: Mapping[str, Task] | None
) -> Speed:
    """Return the speed of one model in short trials."""
    model = load_model(
        model_path(study, settings),
        num_classes=settings.num_classes,
        in_chans=settings.in_chans,
        device=study.device,
    )
    device = next(model.parameters()).device
    spec = spec_of(model, settings)
    names = backbone_parameters(model, settings.parameters)
    count = min(_IMAGES, study.batch_size)
    images = torch.randn(
        count, spec.channels, *(spec.size or (224, 224)), dtype=torch.float32, device=device
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    read = 0.0 if tasks is None else _reading(tasks, spec)

    def look() -> None:
        with evaluating(model), torch.no_grad():
            features(model, images)

    def train() -> None:
        _step(model, images)

    look()  # the first run is slower
    seconds = [min(_timed(device, call) for _ in range(2)) / count + read for call in (look, train)]
    options: dict[str, Any] = {
        "samples": samples,
        "curvature": "features",  # as many operations as with labels, and no head
        "parameters": names,
        "block_size": study.block_size,
    }
    batches = [(images.cpu(), torch.zeros(count, dtype=torch.int64, device="cpu"))]
    prune: dict[str, float] = {}
    statistics = sums = 0.0
    plans: dict[tuple[object, ...], Any] = {}
    for how in study.criteria:
        if not _is_slow(how):
            prune[how.name] = 0.0
            continue
        key = (CRITERIA[how.criterion].needs_damping, how.compensate, how.damping == "auto")
        if key not in plans:
            plans[key] = plan_memory(
                model,
                batches,
                compensate=how.compensate,
                damping=how.damping,
                **{**options, "criterion": how.criterion},
            )
        prune[how.name] = plans[key].seconds["prune"]
    for plan in plans.values():
        statistics = max(statistics, plan.seconds["statistics"])
        sums = max(sums, _HELD * plan.statistics)
    if not plans and any(CRITERIA[how.criterion].needs_fisher for how in study.criteria):
        plan = plan_memory(model, batches, prunes=False, **options)
        statistics, sums = plan.seconds["statistics"], _HELD * plan.statistics
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    chosen = select_parameters(model, names)
    scores = 8 * sum(p.numel() for p in chosen.values())
    on_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    # Passes of the run have larger batches than those of the trial.
    more = study.batch_size / count
    host = int((peak_memory() or 0) + sums + scores + _COPIES * weights)
    return Speed(
        look=seconds[0],
        train=seconds[1],
        statistics=statistics + samples * read,
        prune=prune,
        memory=host,
        device_memory=int(more * on_gpu + _COPIES * weights) if on_gpu else 0,
    )


def _seconds_of(cells: list[Cell], study: Study, needs: Needs, speed: Speed) -> float:
    """Return the seconds of the cells of one model in one process."""
    counts = [c for c in needs.images.values() if c is not None]
    test = sum(c["test"] for c in counts)
    total = speed.look * (test + sum(c["fit"] for c in counts))  # the dense model
    groups: Counter[Group] = Counter()
    epochs = 0 if study.finetune is None else study.finetune.epochs
    for cell in cells:
        needs_fisher = CRITERIA[cell.criterion.criterion].needs_fisher or cell.criterion.compensate
        if needs_fisher:
            groups[group_of(cell)] += 1
            total += (cell.rounds - 1) * speed.statistics
        total += cell.rounds * speed.prune[cell.criterion.name]
        total += speed.look * test * (1 + (epochs > 0))
        total += speed.train * epochs * tuning_images(cell, study, needs.images)
    return total + len(groups) * speed.statistics


def _is_slow(how: CriterionSettings) -> bool:
    return CRITERIA[how.criterion].needs_damping or how.compensate


def _step(model: nn.Module, images: Tensor) -> None:
    """Run a forward and a backward pass, leaving no gradients."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    with evaluating(model):
        loss = feature_outputs(model, images).float().square().mean()
        torch.autograd.grad(loss, chosen, allow_unused=True)


def _reading(tasks: Mapping[str, Task], spec: InputSpec) -> float:
    """Return the seconds of reading an image, of the slowest task."""
    found = []
    for task in tasks.values():
        images = images_of(task.test)
        count = min(len(images), 2 * _IMAGES)
        start = time.perf_counter()
        for _ in images.batches(spec, _IMAGES, samples=count):
            pass
        found.append((time.perf_counter() - start) / count)
    return max(found)


def _timed(device: torch.device, call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
