"""Files of LiteRT (TensorFlow Lite): written by its own converter, and run by its interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastsal.deploy.comparing import (
    OneOutput,
    compare_outputs,
    compare_zeros,
    images_of_type,
)
from fastsal.deploy.converting import converting
from fastsal.deploy.quiet import quiet
from fastsal.deploy.staged import bytes_beside, staged
from fastsal.errors import InvalidArgument


def require_package() -> None:
    """Raise InvalidArgument unless the converter of LiteRT is installed."""
    if find_spec("litert_torch") is None:
        raise InvalidArgument("LiteRT requires litert_torch: pip install 'fastsal[litert]'")


def export_litert(
    model: nn.Module, path: Path, images: Tensor, tolerance: float
) -> tuple[int, float, int, int]:
    """Write a file of LiteRT for one image at a time, and compare it with the model.

    Args:
        model: The model, in evaluation mode.
        path: The file, `.tflite`.
        images: `[n, ...]`, n >= 2; their size is fixed.
        tolerance: Largest difference of outputs, relative to the largest output.

    Returns:
        Bytes of the file, the difference, the weights in the file, and how many of them are zero.

    Raises:
        InvalidArgument: The converter is not installed.
        FastsalError: The model cannot be exported, or the file differs from it.
    """
    require_package()
    images = images_of_type(model, images, "LiteRT")
    with staged(path) as made:
        with quiet():
            _write(model, made, images)
            values, zeros = compare_zeros(model, _constants(made), "LiteRT file")
            difference = _difference(model, made, images, tolerance)
        size = bytes_beside(made)
    return size, difference, values, zeros


def _write(model: nn.Module, path: Path, images: Tensor) -> None:
    import litert_torch

    with converting(model, "LiteRT"), torch.no_grad():
        litert_torch.convert(OneOutput(model), (images[:1],)).export(str(path))


def _constants(path: Path) -> Iterator[NDArray[Any]]:
    """Yield the real constants of a file, with the inputs of a layer after its outputs.

    LiteRT has the weights of convolutions as `[out, h, w, in]`, those of depthwise ones as
    `[1, h, w, out]`.
    """
    from ai_edge_litert.interpreter import Interpreter

    file = Interpreter(str(path))
    for tensor in file.get_tensor_details():
        if not np.issubdtype(tensor["dtype"], np.floating):
            continue
        try:
            value = file.get_tensor(tensor["index"])
        except ValueError:
            continue  # computed by the model: without memory, which is not allocated here
        yield value
        if value.ndim == 4:
            yield np.moveaxis(value, -1, 1)
            yield np.moveaxis(value, -1, 0)


def _difference(model: nn.Module, path: Path, images: Tensor, tolerance: float) -> float:
    from ai_edge_litert.interpreter import Interpreter

    file = Interpreter(str(path), num_threads=torch.get_num_threads())
    file.allocate_tensors()
    given, found = file.get_input_details()[0]["index"], file.get_output_details()[0]["index"]

    def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
        outputs = []
        for image in x:
            file.set_tensor(given, image[None])
            file.invoke()
            outputs.append(file.get_tensor(found))
        return np.concatenate(outputs)

    return compare_outputs(model, run, images, tolerance, "LiteRT")
