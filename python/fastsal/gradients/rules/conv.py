"""Per-sample gradients of convolution weights, by several equivalent computations.

`G_n[o, c, k] = sum_P dy_n[o, P] · x_n[c, P·stride + k·dilation - padding]`

All implementations compute the same values; `choose` returns the fastest for given shapes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsal.gradients.rules.operations import Call, Operation, UnreadCallError, register
from fastsal.gradients.rules.windows import is_padded, padded, windows
from fastsal.gradients.workspace import Workspace

Implementation = Callable[[Call, Tensor, Tensor, Workspace], None]

# Limit for the unfolded inputs of a chunk of samples; larger chunks do not fit the caches.
_COLUMN_BYTES = 32 * 2**20


def _weight(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    del input, args, kwargs
    return weight


def _parser(name: str, spatial: int) -> Callable[..., Call]:
    def parse(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
    ) -> Call:
        del bias
        if input.dim() != spatial + 2:
            raise UnreadCallError(f"F.{name} on an input without a sample axis")
        steps = _per_axis(dilation, spatial)
        kernel = tuple(weight.shape[2:])
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(steps, kernel, strict=True)]
            pads = tuple((t // 2, t - t // 2) for t in total)
        elif padding == "valid":
            pads = ((0, 0),) * spatial
        elif isinstance(padding, str):
            raise UnreadCallError(f"F.{name} with padding={padding!r}")
        else:
            pads = tuple((p, p) for p in _per_axis(padding, spatial))
        return Call(
            name, input, tuple(weight.shape), _per_axis(stride, spatial), pads, steps, groups
        )

    return parse


def _per_axis(value: int | tuple[int, ...], spatial: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * spatial if len(values) == 1 else values


def conv_rule(call: Call, grad_output: Tensor, out: Tensor, workspace: Workspace) -> None:
    """Compute out `[n, O, C/G, *k]` from input `[n·r, C, ...]`, grad_output `[n·r, O, ...]`."""
    n, leading = out.shape[0], call.input.shape[0]
    implementation = IMPLEMENTATIONS[choose(call, grad_output)]
    if leading == n:
        implementation(call, grad_output, out, workspace)
        return
    # A sample has r frames or windows; samples are outermost.
    frames = workspace.take("frames", (leading, *call.weight_shape), out)
    implementation(call, grad_output, frames, workspace)
    torch.sum(frames.view(n, leading // n, *call.weight_shape), 1, out=out)


def choose(call: Call, grad_output: Tensor) -> str:
    """Return the name of the fastest implementation for the shapes of a call.

    Measured on two x86-64 cores with AVX-512 in float32 at n = 8, over every convolution of
    resnet18, resnet50, convnext_tiny, vit_small and efficientnet_lite0 at 224 px.
    """
    channels_out, channels_in = call.weight_shape[0], call.input.shape[1]
    kernel = math.prod(call.weight_shape[2:])
    positions = math.prod(grad_output.shape[2:])
    if call.groups == 1:
        if kernel == 1 and not is_padded(call):
            return "pointwise"
        overlaps = any(k > s for k, s in zip(call.weight_shape[2:], call.stride, strict=True))
        # Unfolding reads each pixel k² times; direct kernels of the library are faster for large
        # maps (28² and up), and slower once the weight is larger than the map.
        if overlaps and positions >= 28 * 28 and call.input.device.type == "cpu":
            return "each"
        return "columns"
    if call.input.device.type != "cpu":
        return "grouped"
    if call.groups == channels_in == channels_out and kernel > 9 and positions >= 14 * 14:
        # The library has fast depthwise kernels up to 3x3; 5x5 on 28² is 12 times slower there.
        return "offsets"
    return "each" if positions >= 48 * 48 else "grouped"


def pointwise(call: Call, grad_output: Tensor, out: Tensor, workspace: Workspace) -> None:
    """Batched matrix product over strided pixels, for 1x1 kernels without groups or padding."""
    del workspace
    n, channels_out, channels_in = out.shape[:3]
    x = call.input
    for axis, step in enumerate(call.stride):
        if step > 1:
            count = grad_output.shape[axis + 2]
            index = [slice(None)] * (axis + 2) + [slice(0, (count - 1) * step + 1, step)]
            x = x[tuple(index)]
    dy = grad_output.reshape(n, channels_out, -1)
    x = x.reshape(n, channels_in, -1)
    torch.bmm(dy, x.transpose(1, 2), out=out.view(n, channels_out, channels_in))


def columns(call: Call, grad_output: Tensor, out: Tensor, workspace: Workspace) -> None:
    """Unfold into scratch memory, then one batched matrix product, for any shape and groups."""
    n, channels_out = out.shape[:2]
    groups, outputs = call.groups, tuple(grad_output.shape[2:])
    positions = math.prod(outputs)
    per_sample = call.input.shape[1] * math.prod(call.weight_shape[2:]) * positions
    step = max(1, _COLUMN_BYTES // max(1, per_sample * out.element_size()))
    dy = grad_output.reshape(n, groups, channels_out // groups, positions)
    for start in range(0, n, step):
        view = windows(call, padded(call, call.input[start : start + step]), outputs)
        m = view.shape[0]
        unfolded = workspace.take("columns", view.shape, out)
        unfolded.copy_(view)
        torch.bmm(
            dy[start : start + m].reshape(m * groups, channels_out // groups, positions),
            unfolded.view(m * groups, -1, positions).transpose(1, 2),
            out=out[start : start + m].view(m * groups, channels_out // groups, -1),
        )


def each(call: Call, grad_output: Tensor, out: Tensor, workspace: Workspace) -> None:
    """One library call per sample."""
    x, padding = _symmetric(call)
    weight = workspace.take("weight", call.weight_shape, out)  # only its shape is read
    for i in range(out.shape[0]):
        one = slice(i, i + 1)
        gradient = _weight_gradient(
            call, x[one], grad_output[one], weight, padding=padding, samples=1
        )
        out[i].copy_(gradient)


def grouped(call: Call, grad_output: Tensor, out: Tensor, workspace: Workspace) -> None:
    """One library call for all samples, as n·G groups."""
    n = out.shape[0]
    x, padding = _symmetric(call)
    x = x.reshape(1, n * x.shape[1], *x.shape[2:])
    dy = grad_output.reshape(1, n * grad_output.shape[1], *grad_output.shape[2:])
    shape = (n * call.weight_shape[0], *call.weight_shape[1:])
    weight = workspace.take("weight", shape, out)
    out.copy_(_weight_gradient(call, x, dy, weight, padding=padding, samples=n).view_as(out))


def offsets(call: Call, grad_output: Tensor, out: Tensor, workspace: Workspace) -> None:
    """Shift, multiply and sum per kernel offset, for depthwise kernels with G = C = O."""
    spatial = len(call.stride)
    outputs = tuple(grad_output.shape[2:])
    view = windows(call, padded(call, call.input), outputs)
    dy = grad_output.contiguous()
    product = workspace.take("offsets", grad_output.shape, out)
    axes = tuple(range(-spatial, 0))
    for offset in itertools.product(*(range(k) for k in call.weight_shape[2:])):
        shifted: tuple[slice | int, ...] = (slice(None), slice(None), *offset)
        entry: tuple[slice | int, ...] = (slice(None), slice(None), 0, *offset)
        torch.mul(dy, view[shifted], out=product)
        torch.sum(product, axes, out=out[entry])


def _symmetric(call: Call) -> tuple[Tensor, list[int]]:
    """Return an input and a symmetric padding, as the library needs it."""
    if all(before == after for before, after in call.padding):
        return call.input, [before for before, _ in call.padding]
    return padded(call, call.input), [0] * len(call.padding)


def _weight_gradient(
    call: Call, x: Tensor, dy: Tensor, weight: Tensor, *, padding: list[int], samples: int
) -> Tensor:
    gradients = torch.ops.aten.convolution_backward(
        dy,
        x,
        weight,
        None,
        list(call.stride),
        padding,
        list(call.dilation),
        False,
        [0] * len(padding),
        samples * call.groups,
        [False, True, False],
    )
    result: Tensor = gradients[1]
    return result


def implementations_for(call: Call) -> list[str]:
    """Return the names of all implementations that support a call."""
    names = ["columns", "each", "grouped"]
    if call.groups == 1 and math.prod(call.weight_shape[2:]) == 1 and not is_padded(call):
        names.append("pointwise")
    if call.groups == call.input.shape[1] == call.weight_shape[0]:
        names.append("offsets")
    return names


IMPLEMENTATIONS: dict[str, Implementation] = {
    "pointwise": pointwise,
    "columns": columns,
    "each": each,
    "grouped": grouped,
    "offsets": offsets,
}

for _spatial, _functions in (
    (1, (torch.conv1d, F.conv1d)),
    (2, (torch.conv2d, F.conv2d)),
    (3, (torch.conv3d, F.conv3d)),
):
    _name = f"conv{_spatial}d"
    register(Operation(_name, _weight, _parser(_name, _spatial), conv_rule), *_functions)
