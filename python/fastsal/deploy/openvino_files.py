"""Files of OpenVINO: written by its own converter, read back, and run on the CPU."""

from __future__ import annotations

import contextlib
import io
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsal.deploy.comparing import (
    OneOutput,
    compare_outputs,
    compare_zeros,
    images_of_type,
)
from fastsal.deploy.converting import converting
from fastsal.deploy.staged import bytes_beside, staged
from fastsal.errors import InvalidArgument


def require_package() -> None:
    """Raise InvalidArgument unless OpenVINO is installed."""
    if find_spec("openvino") is None:
        raise InvalidArgument("OpenVINO requires openvino: pip install 'fastsal[openvino]'")


def export_openvino(
    model: nn.Module, path: Path, images: Tensor, tolerance: float
) -> tuple[int, float, int, int]:
    """Write a file of OpenVINO, with its weights beside it, and compare it with the model.

    Args:
        model: The model, in evaluation mode.
        path: The file, `.xml`; the weights are in a file of that name that ends in `.bin`.
        images: `[n, ...]`, n >= 2; their size is fixed, their number is not.
        tolerance: Largest difference of outputs, relative to the largest output.

    Returns:
        Bytes of both files, the difference, the weights in the file, and how many of them are zero.

    Raises:
        InvalidArgument: OpenVINO is not installed.
        FastsalError: The model cannot be exported, or the file differs from it.
    """
    require_package()
    images = images_of_type(model, images, "OpenVINO")
    with staged(path) as made:
        _write(model, made, images)
        values, zeros = _compare_weights(model, made)
        difference = _difference(model, made, images, tolerance)
        size = bytes_beside(made)
    return size, difference, values, zeros


def _write(model: nn.Module, path: Path, images: Tensor) -> None:
    import openvino

    screen = io.StringIO()
    with (
        converting(model, "OpenVINO"),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(screen),
    ):
        warnings.simplefilter("ignore")
        made = openvino.convert_model(
            OneOutput(model),
            example_input=images[:2],
            input=[-1, *images.shape[1:]],
        )
        openvino.save_model(made, str(path), compress_to_fp16=False)


def _compare_weights(model: nn.Module, path: Path) -> tuple[int, int]:
    """Return how many weights the file has, and how many are zero, where the model's are zero.

    The converter names weights anew, and transposes or removes some.
    """
    import openvino

    constants = (
        np.asarray(node.data)
        for node in openvino.Core().read_model(str(path)).get_ops()
        if node.get_type_name() == "Constant" and node.get_element_type().is_real()
    )
    return compare_zeros(model, constants, "OpenVINO file")


def _difference(model: nn.Module, path: Path, images: Tensor, tolerance: float) -> float:
    # The model that maps the file is gone when this returns, so that the file can be moved.
    compiled = compiled_model(path)
    return compare_outputs(model, lambda x: compiled(x)[0], images, tolerance, "OpenVINO")


def compiled_model(path: Path, threads: int | None = None) -> Any:
    """Return a model of OpenVINO on the CPU, which computes in float32."""
    import openvino

    count = torch.get_num_threads() if threads is None else threads
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": count,
        "PERFORMANCE_HINT": "LATENCY",
    }
    return openvino.Core().compile_model(str(path), "CPU", settings)
