"""What pays on a runtime: the layers whose zeros it uses, their pattern, and how many it takes.

- XNNPACK multiplies by sparse 1×1 convolutions that are at least two thirds zero (Google AI Blog,
  "Accelerating Neural Networks on Mobile and Web with Sparse Inference", 2021).
- Core ML's Neural Engine may skip zeros from about 75 % (coremltools guide, "Performance" of
  pruning); its CPU uses n:m patterns of linear layers whose m divides 16, half zeros at least.
- OpenVINO packs the weights of matrix products whose sparsity reaches the property
  `CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE`, which quantized models use on recent Xeons; published
  models have 70 % and more.
- TensorRT and `torch.sparse.to_sparse_semi_structured` use 2:4 on NVIDIA GPUs.

No target promises a speed-up: `fastsal measure` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from fastsal.errors import InvalidArgument
from fastsal.models.selection import select_parameters
from fastsal.pruning.masks.patterns import Pattern
from fastsal.pruning.masks.shares import Sparsity
from fastsal.utils.choices import TARGETS, Target
from fastsal.utils.suggestions import check_choice


def _is_pointwise(layer: nn.Module) -> bool:
    return (
        isinstance(layer, nn.Conv2d)
        and set(layer.kernel_size) == {1}
        and layer.groups == 1
        and layer.weight.numel() > 1
    )


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear)


def _has_inputs_by_four(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim > 1 and weight.shape[1] % 4 == 0


def _is_any(layer: nn.Module) -> bool:
    del layer
    return True


@dataclass(frozen=True)
class _Use:
    """What a target uses: the layers, in words too, the least sparsity, and the pattern."""

    layers: Callable[[nn.Module], bool]
    words: str
    least: float = 0.0
    pattern: str | None = None


_USES: Mapping[Target, _Use] = {
    "xnnpack": _Use(_is_pointwise, "convolutions of kernel size 1", 2 / 3),
    "coreml": _Use(_is_any, "layers", 0.75),
    "openvino": _Use(_is_linear, "linear layers", 0.7),
    "tensorrt": _Use(_has_inputs_by_four, "layers with a multiple of four inputs", 0.5, "2:4"),
    "torch": _Use(_has_inputs_by_four, "layers with a multiple of four inputs", 0.5, "2:4"),
}


def target_ranking(
    target: Target, sparsity: Sparsity | None, pattern: str | None
) -> tuple[float | None, str | None]:
    """Return the sparsity and the pattern for a target, from those that were given.

    Raises:
        InvalidArgument: They do not pay on the target; the message states what does. Or the
            sparsity is one of patterns of names.
    """
    check_choice("target", target, TARGETS)
    use = _USES[target]
    if isinstance(sparsity, Mapping):
        raise InvalidArgument(f"sparsity must be a number for target {target}, got {sparsity}")
    if use.pattern is not None:
        if sparsity is not None or pattern not in (None, use.pattern):
            got = pattern if sparsity is None else f"sparsity {sparsity:g}"
            raise InvalidArgument(f"pattern must be {use.pattern} for target {target}, got {got}")
        return None, use.pattern
    if pattern is not None:
        found = Pattern.parse(pattern)
        if target != "coreml":
            raise InvalidArgument(f"pattern must be None for target {target}, got {pattern}")
        if found.is_whole or 16 % found.m or 2 * found.n > found.m:
            raise InvalidArgument(
                "pattern must be N:M for target coreml, M a divisor of 16 and N at most half of "
                f"it, got {pattern}"
            )
    elif sparsity is not None and sparsity < use.least:
        raise InvalidArgument(
            f"sparsity must be at least {use.least:.2g} for target {target}, which computes with "
            f"fewer zeros as with other values, got {sparsity:g}"
        )
    return sparsity, pattern


def target_parameters(target: Target, model: nn.Module) -> list[str]:
    """Return the names of the weights whose zeros a target uses.

    Raises:
        InvalidArgument: The model has none.
    """
    check_choice("target", target, TARGETS)
    use = _USES[target]
    fitting = {
        id(layer.weight) for layer in model.modules() if _weighs(layer) and use.layers(layer)
    }
    chosen = [name for name, p in select_parameters(model).items() if id(p) in fitting]
    if not chosen:
        raise InvalidArgument(f"model must have {use.words} for target {target}, got none")
    return chosen


def _weighs(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "weight", None), nn.Parameter)
