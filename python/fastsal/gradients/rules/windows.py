"""The inputs of the outputs of a layer: windows of a convolution, vectors of a linear layer.

Axes: n samples, C channels, k kernel, P output pixels, R rows, G groups, d inputs of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastsal.gradients.rules.operations import Call


def is_padded(call: Call) -> bool:
    """Whether a convolution adds pixels around its input."""
    return any(before or after for before, after in call.padding)


def padded(call: Call, x: Tensor) -> Tensor:
    """Return an input with the padding of a convolution, contiguous."""
    # F.pad keeps the memory format; windows over channels-last memory are slow to read.
    x = x.contiguous()
    if not is_padded(call):
        return x
    # F.pad counts from the last axis backwards.
    return F.pad(x, [side for pair in reversed(call.padding) for side in pair])


def windows(call: Call, x: Tensor, outputs: tuple[int, ...]) -> Tensor:
    """View a padded input as `[n, C, *k, *P]`, without a copy."""
    spatial = x.stride()[2:]
    return x.as_strided(
        (*x.shape[:2], *call.weight_shape[2:], *outputs),
        (
            *x.stride()[:2],
            *(s * d for s, d in zip(spatial, call.dilation, strict=True)),
            *(s * t for s, t in zip(spatial, call.stride, strict=True)),
        ),
        x.storage_offset(),
    )


def output_rows(op: str, output: Tensor, places: Tensor) -> Tensor:
    """Return the outputs `[R, O]` of a layer at some places.

    Args:
        op: Name of the operation, as `Call.op`.
        output: Its output, or a tensor of that shape.
        places: `[R]`, numbers of vectors of a linear layer, or of pixels of all samples.
    """
    if op == "linear":
        return output.reshape(-1, output.shape[-1])[places]
    pixels = math.prod(output.shape[2:])
    return output.flatten(2)[places // pixels, :, places % pixels]


class InputRows:
    """The inputs of a layer, by the places of its outputs.

    Args:
        call: The call.
        outputs: Shape of its output.
    """

    def __init__(self, call: Call, outputs: Sequence[int]) -> None:
        self._groups = call.groups
        self._sizes: tuple[int, ...] = ()
        self._view = call.input
        if call.op == "linear":
            self._view = call.input.reshape(-1, call.input.shape[-1])
            return
        spatial = len(outputs) - 2
        view = windows(call, padded(call, call.input), tuple(outputs[2:]))
        # Axes that are indexed come first: [n, P..., C, k...].
        axes = (0, *range(2 + spatial, 2 + 2 * spatial), *range(1, 2 + spatial))
        self._view = view.permute(axes)
        self._sizes = (len(view), *outputs[2:])

    def at(self, places: Tensor) -> Tensor:
        """Return the rows `[R, G, d]` whose products with a weight `[O, d]` are the outputs.

        Args:
            places: `[R]`, as for `output_rows`.
        """
        if not self._sizes:
            return self._view[places].unsqueeze(1)
        index = []
        rest = places
        for size in reversed(self._sizes):
            index.append(rest % size)
            rest = rest // size
        return self._view[tuple(reversed(index))].reshape(len(places), self._groups, -1)
