"""Files of ONNX: written by torch.onnx, read back, and run by ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsal.deploy.comparing import OneOutput, compare_outputs, images_of_type
from fastsal.deploy.staged import bytes_beside, staged
from fastsal.errors import FastsalError, InvalidArgument
from fastsal.utils.plain_text import first_line

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def require_packages() -> None:
    """Raise InvalidArgument unless the packages of the extra `export` are installed."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise InvalidArgument(
            f"format 'onnx' requires {', '.join(missing)}: pip install 'fastsal[export]'"
        )


def export_onnx(
    model: nn.Module, path: Path, images: Tensor, tolerance: float
) -> tuple[int, float, int, int]:
    """Write a file of ONNX and compare it with the model.

    Args:
        model: The model, in evaluation mode.
        path: The file.
        images: `[n, ...]`, n >= 2.
        tolerance: Largest difference of outputs, relative to the largest output.

    Returns:
        Bytes, the difference, the weights in the file, and how many of them are zero.

    Raises:
        InvalidArgument: A package is missing.
        FastsalError: The model cannot be exported, or the file differs from it.
    """
    require_packages()
    images = images_of_type(model, images, "ONNX")
    with staged(path) as made:
        _write(model, made, images)
        values, zeros = _compare_weights(model, made)
        session = runtime_session(made)
        difference = compare_outputs(
            model, lambda x: run_session(session, x), images, tolerance, "ONNX"
        )
        size = bytes_beside(made)
    return size, difference, values, zeros


def _write(model: nn.Module, path: Path, images: Tensor) -> None:
    batch = torch.export.Dim("batch", min=1)
    screen = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(screen),
            _quiet("torch.onnx", "onnxscript"),
        ):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                OneOutput(model),
                (images[:2],),
                str(path),
                dynamo=True,
                external_data=sum(p.nbytes for p in model.parameters()) > 2**31 - 2**20,
                input_names=["images"],
                output_names=["outputs"],
                dynamic_shapes={"images": {0: batch}},
                verbose=False,
                optimize=False,
            )
    except Exception as error:  # whatever the exporter or the model raises
        raise FastsalError(
            f"model: torch.onnx cannot export {type(model).__name__} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def _compare_weights(model: nn.Module, path: Path) -> tuple[int, int]:
    """Return how many weights the file has, and how many are zero; all must be those of the model.

    The exporter may have folded or transposed some into others, which then cannot be found.
    """
    import onnx
    from onnx import numpy_helper

    stored = onnx.load(str(path))
    found: dict[str, Any] = {}
    for tensor in stored.graph.initializer:
        found[tensor.name.removeprefix("model.")] = numpy_helper.to_array(tensor, str(path.parent))
    values = zeros = 0
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        own = parameter.detach().cpu()
        if name not in found or own.dtype == torch.bfloat16 or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        if found[name].shape != tuple(own.shape) or not np.array_equal(found[name], own.numpy()):
            raise FastsalError(f"the ONNX file differs from the model in {name!r}")
        values += own.numel()
        zeros += int((own == 0).sum())
    if not values:
        raise FastsalError("the ONNX file has none of the weights of the model")
    return values, zeros


def runtime_session(path: Path, threads: int | None = None) -> Any:
    """Return a session of ONNX Runtime on the CPU.

    Raises:
        FastsalError: It cannot run the file, such as some layers in float64.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # whatever ONNX Runtime raises
        raise _cannot_run(error) from error


def run_session(session: Any, images: Any) -> Any:
    """Return the outputs of a session on images `[n, ...]`; raise FastsalError if it cannot run."""
    try:
        return session.run(None, {"images": images})[0]
    except Exception as error:  # whatever ONNX Runtime raises
        raise _cannot_run(error) from error


def _cannot_run(error: Exception) -> FastsalError:
    return FastsalError(
        f"model: ONNX Runtime cannot run the file ({type(error).__name__}: {first_line(error)})"
    )


@contextlib.contextmanager
def _quiet(*names: str) -> Any:
    """Silence loggers."""
    before = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    try:
        for logger, _ in before:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in before:
            logger.setLevel(level)
