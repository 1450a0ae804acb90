"""Input rows times the weight are the output rows, for every layer with a rule."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastsal.gradients.capture import Capture
from fastsal.gradients.rules.windows import InputRows, output_rows

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = {
    "linear": (nn.Linear(5, 4), (3, 5)),
    "tokens": (nn.Linear(5, 4, bias=False), (3, 6, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv2d": (
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
        (2, 4, 9, 8),
    ),
    "same": (nn.Conv2d(4, 6, (3, 5), padding="same"), (2, 4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (2, 4, 6, 5)),
    "pointwise": (nn.Conv2d(4, 6, 1, stride=2), (2, 4, 7, 7)),
    "conv3d": (nn.Conv3d(2, 3, 2, padding=(1, 0, 1)), (2, 2, 4, 5, 3)),
    "channels last": (
        nn.Conv2d(4, 6, 3, padding=1).to(memory_format=torch.channels_last),
        (2, 4, 6, 6),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows(name):
    layer, shape = LAYERS[name]
    layer = layer.double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    calls = []
    with Capture({"weight": layer.weight}, lambda *given: calls.append(given) or given[-1]):
        layer(x)
    _, _, call, output = calls[0]
    total = output.numel() // len(layer.weight)
    places = torch.randperm(total, generator=generator)[: max(1, total - 2)]
    rows = InputRows(call, output.shape).at(places)
    weight = layer.weight.reshape(call.groups, -1, rows.shape[2])
    found = torch.einsum("rgd,god->rgo", rows, weight).reshape(len(places), -1)
    if layer.bias is not None:
        found = found + layer.bias
    torch.testing.assert_close(found, output_rows(call.op, output, places))
