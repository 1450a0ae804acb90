"""Measure a pruned model against its original: size, files, latency and throughput."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.deploy.semi_structured import require_gpu, semi_structured
from fastsal.deploy.sizes import ModelSize, model_size
from fastsal.deploy.timing import Run, Timing, time_models, time_pair
from fastsal.errors import InvalidArgument
from fastsal.gradients.losses import check_images
from fastsal.models.evaluating import evaluating, to_model
from fastsal.models.inputs import example_images
from fastsal.models.wrappers import unwrapped
from fastsal.utils.choices import RUNTIMES, Runtime
from fastsal.utils.devices import device_facts
from fastsal.utils.machine import machine, versions
from fastsal.utils.numbers import real, whole
from fastsal.utils.suggestions import check_choice


@dataclass(frozen=True)
class Measurement:
    """A pruned model beside its original.

    Attributes:
        dense: Size of the original.
        pruned: Size of the pruned model.
        timings: One for each number of images of a batch.
        runtime: As given.
        machine: Processor, threads, memory, system and versions.
        zeros: What the runtime did with zeros, in words.
    """

    dense: ModelSize
    pruned: ModelSize
    timings: list[Timing]
    runtime: Runtime
    zeros: str
    machine: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "dense": asdict(self.dense),
            "pruned": asdict(self.pruned),
            "timings": [timing.as_dict() for timing in self.timings],
            "runtime": self.runtime,
            "zeros": self.zeros,
            "machine": self.machine,
        }


def measure_against(
    dense: nn.Module,
    pruned: nn.Module,
    images: Tensor | None = None,
    *,
    batches: Sequence[int] = (1, 16),
    runtime: Runtime = "torch",
    seconds: float = 5.0,
) -> Measurement:
    """Measure a pruned model against its original.

    Both run in turn in one process, on the same images, with as many threads as PyTorch has. No
    figure is calculated from a sparsity.

    Args:
        dense: The original, or a model of its architecture: its values do not matter.
        pruned: The pruned model, on the same device.
        images: Images `[n, ...]`, repeated as needed; None makes up images of the model's size.
        batches: Numbers of images of a run: 1 for latency, more for throughput.
        runtime: `"torch"`; `"torch-2:4"`: copies of both in float16 on the current GPU, those
            weights of the pruned one that have 2:4 zeros compressed; or `"onnxruntime"` or
            `"openvino"`, for which both are exported to temporary files.
        seconds: Time to spend on each number of images.

    Raises:
        InvalidArgument: An argument is invalid, a package of an extra is missing, or for
            `"torch-2:4"` there is no such GPU or no such weight.
        FastsalError: A model cannot be exported.
    """
    check_choice("runtime", runtime, RUNTIMES)
    gpu = require_gpu() if runtime == "torch-2:4" else None
    seconds = real("seconds", seconds, above=0)
    if not isinstance(batches, Iterable):
        raise InvalidArgument(f"batches must be numbers of images, got {batches!r:.80}")
    counts = [whole("batches", count, 1) for count in batches]
    if not counts:
        raise InvalidArgument("batches must have at least one number of images, got none")
    dense, pruned = unwrapped(dense), unwrapped(pruned)
    images = example_images(pruned) if images is None else images
    check_images(images)
    sizes = (
        model_size(dense, images, has_values=False),
        model_size(pruned, images, has_values=True),
    )
    runs = [_repeated(images, count) for count in counts]
    compressed = 0
    if runtime == "torch":
        timings = [time_models(dense, pruned, some, seconds=seconds) for some in runs]
    elif runtime == "torch-2:4":
        half, layers = semi_structured(pruned, torch.float16)
        compressed = sum(layers.values()) // 2
        plain = copy.deepcopy(dense).to(next(half.parameters()).device, torch.float16)
        timings = [time_models(plain, half, some, seconds=seconds) for some in runs]
    else:
        timings = _of_files(runtime, dense, pruned, images, runs, seconds)
    facts = {**machine(), "versions": versions()}
    if gpu is not None:
        facts |= device_facts(gpu)
    return Measurement(*sizes, timings, runtime, _zeros(sizes[1], runtime, compressed), facts)


def _repeated(images: Tensor, count: int) -> Tensor:
    times = -(-count // len(images))
    return images.repeat(times, *(1 for _ in images.shape[1:]))[:count]


def _zeros(size: ModelSize, runtime: Runtime, compressed: int) -> str:
    assert size.nonzeros is not None  # the model has its values
    zeros = size.parameters - size.nonzeros
    if compressed:
        return (
            f"{zeros:,} of {size.parameters:,} parameters are zero, and PyTorch skips "
            f"{compressed:,} of them, those of layers that it stores as 2:4"
        )
    name = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime"}.get(runtime, "OpenVINO")
    if not zeros:
        return f"no parameter is zero: {name} computes with all of them"
    return (
        f"{zeros:,} of {size.parameters:,} parameters are zero, and {name} computes with them as "
        "with other values: dense layers skip none"
    )


def _of_files(
    runtime: Runtime,
    dense: nn.Module,
    pruned: nn.Module,
    images: Tensor,
    runs: list[Tensor],
    seconds: float,
) -> list[Timing]:
    """Export both models to temporary files, and time a runtime on these."""
    pair = _repeated(images, max(2, len(images)))
    with tempfile.TemporaryDirectory() as folder, evaluating(dense), evaluating(pruned):
        opened = _on_onnxruntime if runtime == "onnxruntime" else _on_openvino
        calls = [
            opened(model, Path(folder) / name, pair)
            for name, model in (("dense", dense), ("pruned", pruned))
        ]

        def run(call: Callable[[Any], object], model: nn.Module, some: Tensor) -> Run:
            given = to_model(some, model).cpu().numpy()
            return lambda: call(given)

        timings = [
            time_pair(
                run(calls[0], dense, some), run(calls[1], pruned, some), len(some), seconds=seconds
            )
            for some in runs
        ]
        calls.clear()  # they map the files
    return timings


def _on_onnxruntime(model: nn.Module, path: Path, images: Tensor) -> Callable[[Any], object]:
    from fastsal.deploy.onnx_files import export_onnx, run_session, runtime_session

    path = path.with_suffix(".onnx")
    export_onnx(model, path, images, tolerance=1e-2)
    session = runtime_session(path, torch.get_num_threads())
    return lambda given: run_session(session, given)


def _on_openvino(model: nn.Module, path: Path, images: Tensor) -> Callable[[Any], object]:
    from fastsal.deploy.openvino_files import compiled_model, export_openvino

    path = path.with_suffix(".xml")
    export_openvino(model, path, images, tolerance=1e-2)
    compiled: Callable[[Any], object] = compiled_model(path, torch.get_num_threads())
    return compiled
