"""Export a model to a file for deployment, and compare the file with the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.errors import FastsalError, InvalidArgument
from fastsal.models.evaluating import evaluating
from fastsal.models.saving import check_savable, save_packed, tensors_in
from fastsal.models.weights import read_weights
from fastsal.models.wrappers import unwrapped
from fastsal.utils.choices import EXPORT_FORMATS, ExportFormat
from fastsal.utils.numbers import real
from fastsal.utils.paths import user_path
from fastsal.utils.suggestions import check_choice

_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SUFFIXES = {
    "packed": ".safetensors",
    "onnx": ".onnx",
    "openvino": ".xml",
    "executorch": ".pte",
    "coreml": ".mlpackage",
    "litert": ".tflite",
    "torch-2:4": ".pt",
}
_TOLERANCE = 1e-4
_TOLERANCE_16 = 1e-2  # of outputs in 16 bits
# Model, path, images and tolerance to bytes, difference of outputs, weights, and zeros of these.
Writer = Callable[[nn.Module, Path, Tensor, float], tuple[int, float | None, int, int]]


@dataclass(frozen=True)
class ExportResult:
    """What an exported file has.

    Attributes:
        path: The file.
        format: As given to `export`.
        bytes: Size of the file, and of the file with its weights beside it.
        dense_bytes: Size of all tensors of the model, dense, in its own types.
        values: Elements of all weights that were compared.
        zeros: Those that are zero, in the model and in the file.
        difference: Largest difference of the outputs on the images, relative to the largest output;
            None where outputs are not compared: for `"packed"`, whose tensors are the same in every
            bit, and for `"coreml"` except on macOS.
    """

    path: str
    format: str
    bytes: int
    dense_bytes: int
    values: int
    zeros: int
    difference: float | None = None

    @property
    def ratio(self) -> float:
        """Size of the file, as a fraction of the dense tensors."""
        return self.bytes / self.dense_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "ratio": self.ratio}


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: ExportFormat = "packed",
    *,
    images: Tensor | None = None,
    dtype: str | None = None,
    tolerance: float | None = None,
) -> ExportResult:
    """Write a model to a file, read the file back and compare.

    Args:
        model: The model, or a wrapper of it; not changed.
        path: The file, written atomically. `.safetensors` for `"packed"`, `.onnx` for `"onnx"`,
            `.xml` for `"openvino"`, whose weights are in a file beside it that ends in `.bin`,
            `.pte` for `"executorch"`, `.mlpackage` for `"coreml"`, a folder, `.tflite` for
            `"litert"`, `.pt` for `"torch-2:4"`.
        format: `"packed"`: a lossless layout without the zeros, which `load_model` reads; `"onnx"`:
            by `torch.onnx`, for any number of images, which requires the extra `export`;
            `"openvino"`: by OpenVINO's converter, in float32, for any number of images, which
            requires the extra `openvino`; `"executorch"`: a program for XNNPACK, for 1 to 64
            images, which requires the extra `executorch`; `"coreml"`: by coremltools, in float32,
            for one image, with sparse weights stored without their zeros, which requires the
            extra `coreml`. Outputs of Core ML are compared on macOS alone. `"litert"`: by LiteRT's
            converter, in float32, for one image, which requires the extra `litert`.
            `"torch-2:4"`: a state dict for `torch.load` in 16 bits, whose linear layers with 2:4
            zeros are compressed by PyTorch, which requires a GPU of CUDA.
        images: Images `[n, ...]` on which the outputs of the file are compared, at the size that it
            is made for; two at least. Not for `"packed"`.
        dtype: For `"packed"` and `"torch-2:4"`: type that weights are rounded to, `"float16"` or
            `"bfloat16"`; None keeps every bit, or is float16 for `"torch-2:4"`.
        tolerance: Largest allowed difference of the outputs of the file, relative to the largest
            output; None is 1e-4, or 1e-2 for a model with weights in float16, and for
            `"torch-2:4"`, which is compared with the model in the same 16 bits.

    Returns:
        Sizes, zeros, and the difference of outputs.

    Raises:
        InvalidArgument: An argument is invalid, a package of the extra is missing, or there is no
            GPU that a format needs.
        FastsalError: The file differs from the model. It is removed.
    """
    check_choice("format", format, EXPORT_FORMATS)
    path = user_path(path)
    suffix = _SUFFIXES[format]
    if path.suffix != suffix:
        raise InvalidArgument(f"path must end in {suffix} for format {format!r}, got {path}")
    if path.is_dir() and format != "coreml":
        raise InvalidArgument(f"path must be a file, got the folder {path}")
    model = unwrapped(model)
    if format == "packed":
        if tolerance is not None:
            raise InvalidArgument(
                f"tolerance must be None for format 'packed', which is exact, got {tolerance!r:.80}"
            )
        return _packed(model, path, dtype)
    is_half = format == "torch-2:4"
    if is_half:
        dtype = "float16" if dtype is None else dtype
        if dtype not in ("float16", "bfloat16"):
            raise InvalidArgument(f"dtype must be float16 or bfloat16, got {dtype!r}")
    elif dtype is not None:
        raise InvalidArgument(f"dtype must be None for format {format!r}, got {dtype!r}")
    if tolerance is None:
        is_half = is_half or any(p.dtype == torch.float16 for p in model.parameters())
        tolerance = _TOLERANCE_16 if is_half else _TOLERANCE
    tolerance = real("tolerance", tolerance, least=0)
    if not isinstance(images, Tensor) or images.ndim < 2 or len(images) < 2:
        came = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InvalidArgument(
            f"images must have at least two images for format {format!r}, a tensor [n, ...], got "
            f"{came}"
        )
    with evaluating(model):
        _, write = _converter(format, dtype)
        size, difference, values, zeros = write(model, path, images, tolerance)
    return ExportResult(str(path), format, size, _dense_bytes(model), values, zeros, difference)


def require_packages(format: str) -> None:
    """Raise InvalidArgument if a package that a format needs is not installed, or a GPU."""
    if format in _SUFFIXES and format != "packed":
        require, _ = _converter(format, "float16")
        require()


def _converter(format: str, dtype: str | None) -> tuple[Callable[[], object], Writer]:
    """Return the function that raises if a format cannot be written here, and the one that does."""
    require: Callable[[], object]
    writer: Writer
    if format == "onnx":
        from fastsal.deploy.onnx_files import export_onnx as writer
        from fastsal.deploy.onnx_files import require_packages as require
    elif format == "openvino":
        from fastsal.deploy.openvino_files import export_openvino as writer
        from fastsal.deploy.openvino_files import require_package as require
    elif format == "executorch":
        from fastsal.deploy.executorch_files import export_executorch as writer
        from fastsal.deploy.executorch_files import require_package as require
    elif format == "coreml":
        from fastsal.deploy.coreml_files import export_coreml as writer
        from fastsal.deploy.coreml_files import require_package as require
    elif format == "litert":
        from fastsal.deploy.litert_files import export_litert as writer
        from fastsal.deploy.litert_files import require_package as require
    else:
        from fastsal.deploy.semi_structured import export_semi_structured
        from fastsal.deploy.semi_structured import require_gpu as require

        assert dtype is not None
        writer = partial(export_semi_structured, dtype=_TYPES[dtype])
    return require, writer


def _packed(model: nn.Module, path: Path, dtype: str | None) -> ExportResult:
    if dtype is not None and dtype not in _TYPES:
        raise InvalidArgument(f"dtype must be one of {', '.join(_TYPES)}, got {dtype!r}")
    check_savable(model)
    kind = None if dtype is None else _TYPES[dtype]
    save_packed(model, path, kind)
    state = tensors_in(model.state_dict())
    found = read_weights(path)
    try:
        values, zeros = _compare(state, found, kind)
    except FastsalError:
        path.unlink(missing_ok=True)
        raise
    return ExportResult(
        str(path), "packed", path.stat().st_size, _dense_bytes(model), values, zeros
    )


def _compare(
    state: Mapping[str, Tensor], found: Mapping[str, Tensor], kind: torch.dtype | None
) -> tuple[int, int]:
    """Return how many elements a file has and how many are zero; all must be those of the model."""
    values = zeros = 0
    for name, stored in found.items():
        own = state[name].detach().cpu()
        if kind is not None and own.is_floating_point():
            own = own.to(kind)
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (own, stored)]
        if own.dtype != stored.dtype or own.shape != stored.shape or not torch.equal(*bits):
            raise FastsalError(f"the file differs from the model in {name!r}")
        values += own.numel()
        zeros += int((own == 0).sum())
    return values, zeros


def _dense_bytes(model: nn.Module) -> int:
    seen = {t.data_ptr(): t.nbytes for t in tensors_in(model.state_dict()).values()}
    return sum(seen.values())
