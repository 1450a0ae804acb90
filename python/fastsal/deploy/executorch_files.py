"""Files of ExecuTorch: lowered to XNNPACK by its own exporter, and run by its runtime."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastsal.deploy.comparing import OneOutput, compare_outputs, images_of_type
from fastsal.deploy.converting import converting
from fastsal.deploy.quiet import quiet
from fastsal.deploy.staged import bytes_beside, staged
from fastsal.errors import InvalidArgument

_MOST_IMAGES = 64  # of one call


def require_package() -> None:
    """Raise InvalidArgument unless ExecuTorch is installed."""
    if find_spec("executorch") is None:
        raise InvalidArgument("ExecuTorch requires executorch: pip install 'fastsal[executorch]'")


def export_executorch(
    model: nn.Module, path: Path, images: Tensor, tolerance: float
) -> tuple[int, float, int, int]:
    """Write a program of ExecuTorch for XNNPACK, and compare it with the model.

    Args:
        model: The model, in evaluation mode.
        path: The file, `.pte`.
        images: `[n, ...]`, n >= 2; their size is fixed, their number is 1 to 64.
        tolerance: Largest difference of outputs, relative to the largest output.

    Returns:
        Bytes of the file, the difference, the weights that were found in the file, and how many of
        them are zero. Others are not counted: those that XNNPACK stores in an order of its own, and
        those without zeros that the exporter multiplied by the scales of batch normalization.

    Raises:
        InvalidArgument: ExecuTorch is not installed.
        FastsalError: The model cannot be exported, or the file differs from it.
    """
    require_package()
    images = images_of_type(model, images[:_MOST_IMAGES], "ExecuTorch")
    with staged(path) as made:
        with quiet():
            _write(model, made, images)
        difference = _difference(model, made, images, tolerance)
        values, zeros = _count_weights(model, made.read_bytes())
        size = bytes_beside(made)
    return size, difference, values, zeros


def _write(model: nn.Module, path: Path, images: Tensor) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    count = torch.export.Dim("n", min=1, max=_MOST_IMAGES)
    with converting(model, "ExecuTorch"), torch.no_grad():
        program = torch.export.export(OneOutput(model), (images[:2],), dynamic_shapes=({0: count},))
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        made = lowered.to_executorch()
    with path.open("wb") as file:
        made.write_to_file(file)


def _difference(model: nn.Module, path: Path, images: Tensor, tolerance: float) -> float:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    return compare_outputs(
        model,
        lambda x: method.execute([torch.from_numpy(x)])[0].numpy(),
        images,
        tolerance,
        "ExecuTorch",
    )


def _count_weights(model: nn.Module, content: bytes) -> tuple[int, int]:
    """Return how many weights are found in a file, and how many of these are zero.

    A weight is found if the file has all of its bits, in its own order or with the inputs last; or,
    if it was multiplied by the scales of batch normalization, by the places of its zeros.
    """
    numbers = np.frombuffer(content[: len(content) // 4 * 4], np.uint32)
    present = (numbers & 0x7FFFFFFF).astype(bool).tobytes()  # neither 0 nor -0
    values = zeros = 0
    for parameter in model.parameters():
        weight = parameter.detach().cpu().contiguous()
        if weight.ndim < 2:
            continue
        orders = [weight, weight.movedim(1, -1).contiguous()]
        nulls = int((weight == 0).sum())
        if any(w.numpy().tobytes() in content for w in orders) or (
            nulls and any((w != 0).numpy().tobytes() in present for w in orders)
        ):
            values += weight.numel()
            zeros += nulls
    return values, zeros
