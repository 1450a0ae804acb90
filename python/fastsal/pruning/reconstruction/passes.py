"""The two forward passes of a reconstruction: over the dense model, then over the pruned one.

Axes: n images, G groups, d inputs of a row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fastsal.data.batches import Pair
from fastsal.errors import DataError
from fastsal.models.evaluating import (
    differentiable,
    evaluating,
    first_layer_parameter,
    plain_call,
    to_model,
)
from fastsal.pruning.reconstruction.dense_outputs import DenseTrace
from fastsal.pruning.reconstruction.rebuilding import RebuildingTrace, chunk_bytes
from fastsal.pruning.reconstruction.tracing import Trace
from fastsal.pruning.shelf import copies, restore
from fastsal.utils.live_memory import LiveMemory

# Layers of vision transformers overfit a few hundred images with less: of a ViT-S/14, 256 images,
# 0.01 leaves a sixth more error, on held-out images and on those of another data set. A ResNet-20
# is as accurate with 0.01 as with 0.1.
DAMPING = 0.1
# Bytes for images, activations and rows without a budget; fixed, so that results do not depend on
# the memory of the machine.
_ROOM = 2**32


def reconstruct_on(
    model: nn.Module,
    dense: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    source: Iterable[Pair],
    *,
    autocast: torch.dtype | None = None,
    damping: float = DAMPING,
    seed: int = 0,
    room: int | None = None,
) -> tuple[list[str], int]:
    """Solve for the kept weights of a pruned model, in place.

    All other parameters and buffers become those of the dense model, then biases and running means
    are fitted.

    Args:
        model: The pruned model.
        dense: Name to the parameters and buffers of the dense model that may differ from those of
            `model`.
        masks: Name to mask, True = kept.
        source: Images.
        autocast: dtype of the passes under `torch.autocast`, or None.
        damping: Multiple of the mean second moment of the inputs of a layer, on the squared move of
            its weights.
        seed: Seed of the places whose outputs are compared.
        room: Bytes for images and activations; None chooses.

    Returns:
        Names of the weights that were changed, and the number of images.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tracked = {name: p for name, p in model.named_parameters() if name in masks}
    pruned = copies(tracked)
    room = _ROOM if room is None else room - moment_bytes(tracked.values())
    restore(tensors, dense)
    images = _images(model, source, room // 2)
    # A number in half precision for each row and output.
    width = max((p.element_size() for p in tracked.values()), default=4) // 2
    most_rows = max(1, room // 2 // (width * max(1, sum(len(p) for p in tracked.values()))))
    trace = DenseTrace(model, tracked, torch.Generator().manual_seed(seed), most_rows)
    _pass(model, images, trace, autocast)
    restore(tracked, pruned)
    rebuilding = RebuildingTrace(model, tracked, masks, trace.targets, damping)
    _pass(model, images, rebuilding, autocast)
    return rebuilding.solved, len(images)


def moment_bytes(weights: Iterable[Tensor]) -> int:
    """Return the bytes of the moments of the inputs of one layer, and of chunks of its inputs."""
    # Moments, their sum, products and moves; all float64.
    layers = (
        4 * 8 * _inputs(p) * max(_inputs(p), len(p)) + chunk_bytes(_inputs(p)) for p in weights
    )
    return max(layers, default=0)


def _inputs(weight: Tensor) -> int:
    return weight[0].numel() if weight.ndim > 1 else weight.numel()


def _images(model: nn.Module, source: Iterable[Pair], room: int) -> Tensor:
    """Return as many images as run at once within some memory.

    Args:
        model: The model.
        source: Images.
        room: Bytes for their activations.
    """
    chosen: list[Tensor] = []
    count = most = 0
    for images, _ in source:
        if not most:
            most = max(2, int(room // max(1, _bytes_of_an_image(model, images[:2]))))
        chosen.append(images[: most - count])
        count += len(chosen[-1])
        if count >= most:
            break
    if not count:
        raise DataError("batches must contain at least one image to reconstruct on, got none")
    return torch.cat(chosen)


def _bytes_of_an_image(model: nn.Module, images: Tensor) -> int:
    """Return the memory that one image takes in a forward pass without gradients."""
    live = LiveMemory()
    with torch.no_grad(), evaluating(model), live:
        model(to_model(images, model))
    return live.peak // len(images)


def _pass(model: nn.Module, images: Tensor, trace: Trace, autocast: torch.dtype | None) -> None:
    first = first_layer_parameter(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(differentiable())  # not compiled
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        is_mixed = autocast is not None
        stack.enter_context(torch.autocast(first.device.type, dtype=autocast, enabled=is_mixed))
        stack.enter_context(trace)
        plain_call(model, to_model(images, model))
