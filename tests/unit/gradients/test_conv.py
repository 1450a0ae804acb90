from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsal.gradients.rules.conv import IMPLEMENTATIONS, choose, conv_rule, implementations_for
from fastsal.gradients.rules.operations import OPERATIONS, Call
from fastsal.gradients.workspace import Workspace

FUNCTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def obvious(function, x, weight, dy, **options):
    rows = []
    for i in range(x.shape[0]):
        w = weight.clone().requires_grad_()
        y = function(x[i : i + 1], w, None, **options)
        rows.append(torch.autograd.grad(y, w, dy[i : i + 1])[0])
    return torch.stack(rows)


@st.composite
def cases(draw):
    spatial = draw(st.integers(1, 3))
    small = st.integers(1, 3)
    kernel = tuple(draw(small) for _ in range(spatial))
    stride = tuple(draw(small) for _ in range(spatial))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(spatial))
    same = all(s == 1 for s in stride) and draw(st.booleans())
    padding = "same" if same else tuple(draw(st.integers(0, 2)) for _ in range(spatial))
    groups = draw(st.integers(1, 3))
    depthwise = draw(st.booleans())
    c, o = (1, 1) if depthwise else (draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    size = tuple(
        (k - 1) * d + 1 + draw(st.integers(0, 3)) for k, d in zip(kernel, dilation, strict=True)
    )
    return {
        "spatial": spatial,
        "x": (draw(st.integers(1, 3)), groups * c, *size),
        "weight": (groups * o, c, *kernel),
        "options": {
            "stride": stride, "padding": padding, "dilation": dilation, "groups": groups
        },
        "channels_last": spatial == 2 and draw(st.booleans()),
    }  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_implementation_equals_the_loop(case):
    function = FUNCTIONS[case["spatial"]]
    x = torch.randn(case["x"], dtype=torch.float64)
    weight = torch.randn(case["weight"], dtype=torch.float64)
    dy = torch.randn_like(function(x, weight, None, **case["options"]))
    if case["channels_last"]:
        x = x.contiguous(memory_format=torch.channels_last)
        dy = dy.contiguous(memory_format=torch.channels_last)
    expected = obvious(function, x, weight, dy, **case["options"])
    call = OPERATIONS[function].parse(x, weight, None, **case["options"])
    for name in implementations_for(call):
        out = torch.full(expected.shape, float("nan"), dtype=torch.float64)
        IMPLEMENTATIONS[name](call, dy, out, Workspace())
        torch.testing.assert_close(out, expected, msg=lambda text, n=name: f"{n}: {text}")


def test_expanded_gradient():
    # Mean pooling hands back a gradient with strides of 0.
    x, weight = torch.randn(2, 3, 5, 5).double(), torch.randn(4, 3, 3, 3).double()
    dy = torch.randn(2, 4, 1, 1).double().expand(2, 4, 3, 3)
    call = OPERATIONS[F.conv2d].parse(x, weight)
    expected = obvious(F.conv2d, x, weight, dy)
    for name in implementations_for(call):
        out = torch.empty_like(expected)
        IMPLEMENTATIONS[name](call, dy, out, Workspace())
        torch.testing.assert_close(out, expected)


def test_frames_of_one_sample_are_summed():
    x, weight = torch.randn(6, 3, 5, 5).double(), torch.randn(4, 3, 3, 3).double()
    dy = torch.randn(6, 4, 3, 3).double()
    out = torch.empty(2, 4, 3, 3, 3).double()
    conv_rule(OPERATIONS[F.conv2d].parse(x, weight), dy, out, Workspace())
    expected = obvious(F.conv2d, x, weight, dy).view(2, 3, 4, 3, 3, 3).sum(1)
    torch.testing.assert_close(out, expected)


def test_columns_in_chunks(monkeypatch):
    monkeypatch.setattr("fastsal.gradients.rules.conv._COLUMN_BYTES", 1)
    x, weight = torch.randn(3, 4, 5, 5).double(), torch.randn(4, 2, 3, 3).double()
    dy = torch.randn(3, 4, 3, 3).double()
    out = torch.empty(3, 4, 2, 3, 3).double()
    call = OPERATIONS[F.conv2d].parse(x, weight, groups=2)
    IMPLEMENTATIONS["columns"](call, dy, out, Workspace())
    torch.testing.assert_close(out, obvious(F.conv2d, x, weight, dy, groups=2))


@pytest.mark.parametrize(
    ("layer", "x", "weight", "stride", "padding", "groups", "expected"),
    [
        ("resnet stem", (3, 224), (64, 3, 7), 2, 3, 1, "each"),
        ("resnet 3x3 at 56", (64, 56), (64, 64, 3), 1, 1, 1, "each"),
        ("resnet 3x3 at 28", (128, 28), (128, 128, 3), 1, 1, 1, "each"),
        ("resnet18 3x3 to 14", (128, 28), (256, 128, 3), 2, 1, 1, "columns"),
        ("resnet 3x3 at 7", (512, 7), (512, 512, 3), 1, 1, 1, "columns"),
        ("resnet50 1x1", (256, 56), (64, 256, 1), 1, 0, 1, "pointwise"),
        ("resnet50 1x1 strided", (1024, 14), (2048, 1024, 1), 2, 0, 1, "pointwise"),
        ("vit_small patches", (3, 224), (384, 3, 16), 16, 0, 1, "columns"),
        ("convnext stem", (3, 224), (96, 3, 4), 4, 0, 1, "columns"),
        ("convnext 7x7 at 56", (96, 56), (96, 1, 7), 1, 3, 96, "offsets"),
        ("convnext 7x7 at 14", (384, 14), (384, 1, 7), 1, 3, 384, "offsets"),
        ("convnext 7x7 at 7", (768, 7), (768, 1, 7), 1, 3, 768, "grouped"),
        ("lite0 3x3 at 112", (32, 112), (32, 1, 3), 1, 1, 32, "each"),
        ("lite0 3x3 at 14", (480, 14), (480, 1, 3), 1, 1, 480, "grouped"),
        ("lite0 5x5 at 28", (240, 28), (240, 1, 5), 1, 2, 240, "offsets"),
        ("lite0 5x5 at 7", (1152, 7), (1152, 1, 5), 1, 2, 1152, "grouped"),
    ],
)
def test_chooser(layer, x, weight, stride, padding, groups, expected):
    (channels, size), (o, c, k) = x, weight
    out = (size + 2 * padding - k) // stride + 1
    call = Call(
        "conv2d", torch.empty(8, channels, size, size, device="cpu"), (o, c, k, k),
        (stride, stride), ((padding, padding),) * 2, (1, 1), groups,
    )  # fmt: skip
    assert choose(call, torch.empty(8, o, out, out)) == expected
    assert expected in implementations_for(call)
