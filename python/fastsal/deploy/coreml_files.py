"""Packages of Core ML: written by coremltools, with the zeros of weights left out of the file."""

from __future__ import annotations

import sys
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
from fastsal.deploy.staged import staged
from fastsal.errors import InvalidArgument

_INPUT, _OUTPUT = "images", "outputs"
# A weight with fewer zeros is stored densely: Core ML's sparse layout has a bit for each element.
_LEAST_SPARSITY = 0.5


def require_package() -> None:
    """Raise InvalidArgument unless coremltools is installed."""
    if find_spec("coremltools") is None:
        raise InvalidArgument("Core ML requires coremltools: pip install 'fastsal[coreml]'")


def export_coreml(
    model: nn.Module, path: Path, images: Tensor, tolerance: float
) -> tuple[int, float | None, int, int]:
    """Write a package of Core ML for one image at a time, and compare it with the model.

    Args:
        model: The model, in evaluation mode.
        path: The package, `.mlpackage`, a folder.
        images: `[n, ...]`, n >= 2; their size is fixed.
        tolerance: Largest difference of outputs, relative to the largest output.

    Returns:
        Bytes of the package, the difference, the weights in it, and how many of them are zero. The
        difference is None except on macOS: nothing else runs Core ML.

    Raises:
        InvalidArgument: coremltools is not installed.
        FastsalError: The model cannot be exported, or the package differs from it.
    """
    require_package()
    images = images_of_type(model, images, "Core ML")
    with staged(path) as made:
        with quiet():
            written = _write(model, made, images)
            values, zeros = _compare_weights(model, written)
        difference = None
        if sys.platform == "darwin":
            difference = _difference(model, written, images, tolerance)
        size = sum(part.stat().st_size for part in made.rglob("*") if part.is_file())
    return size, difference, values, zeros


def _write(model: nn.Module, path: Path, images: Tensor) -> Any:
    import coremltools
    from coremltools.optimize.coreml import (
        OpThresholdPrunerConfig,
        OptimizationConfig,
        prune_weights,
    )

    with converting(model, "coremltools"):
        with torch.no_grad():
            program = torch.export.export(OneOutput(model), (images[:1],))
            program = program.run_decompositions({})
            _without_aliases(program)
            made = coremltools.convert(
                program,
                inputs=[coremltools.TensorType(_INPUT, images[:1].shape)],
                outputs=[coremltools.TensorType(_OUTPUT)],
                minimum_deployment_target=coremltools.target.iOS17,
                compute_precision=coremltools.precision.FLOAT32,
            )
        how = OpThresholdPrunerConfig(
            threshold=float(np.finfo(np.float32).tiny), minimum_sparsity_percentile=_LEAST_SPARSITY
        )
        made = prune_weights(made, OptimizationConfig(global_config=how))
        made.save(str(path))
    return made


def _without_aliases(program: torch.export.ExportedProgram) -> None:
    """Remove operations that return their input, which the converter does not know."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    program.graph_module.recompile()


def _compare_weights(model: nn.Module, written: Any) -> tuple[int, int]:
    """Return how many weights a package has, and how many are zero, where the model's are zero."""
    from coremltools.optimize.coreml import decompress_weights, get_weights_metadata

    found = get_weights_metadata(decompress_weights(written), weight_threshold=0)
    return compare_zeros(model, (each.val for each in found.values()), "Core ML package")


def _difference(model: nn.Module, written: Any, images: Tensor, tolerance: float) -> float:
    def run(x: NDArray[np.float32]) -> NDArray[np.float32]:
        each = [written.predict({_INPUT: image[None]})[_OUTPUT] for image in x]
        return np.concatenate(each)

    return compare_outputs(model, run, images, tolerance, "Core ML")
