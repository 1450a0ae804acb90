"""Rules and fallback against the loop, float64, over a table of layers."""

# ruff: noqa: E501 (one case a line)
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, StdConv2d
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastsal.errors import UnsupportedLayer
from fastsal.gradients import GradientEngine, select_parameters

from .oracle import Fn, loop, randomize

CLASSES = 3


class Head(nn.Module):
    """Any features to logits."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        x = self.body(x).flatten(1)
        # Uneven fixed weights, so that no two features share a gradient.
        ramp = torch.arange(x.shape[1] * CLASSES, dtype=x.dtype).view(x.shape[1], CLASSES)
        return torch.sin(x) @ torch.cos(ramp)


def linear(**kw):
    return nn.Linear(4, 5, **kw)


def shared():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    return Fn(lambda m, x: m.b(torch.tanh(m.a(x))), a=a, b=b)


def attention(batch_first):
    def forward(m, x):
        y = x if batch_first else x.transpose(0, 1)
        y = m.a(y, y, y, need_weights=False)[0]
        return y if batch_first else y.transpose(0, 1)

    return Fn(forward, a=nn.MultiheadAttention(4, 2, batch_first=batch_first))


def both_layouts(m, x):
    return m.a(x) + m.a(x.transpose(0, 1)).transpose(0, 1)


def first_token(m, x):
    # Only step 0 of a sequence-first layer reaches the loss.
    return m.a(x.transpose(0, 1))[0]


# name: (module, shape of a sample, parameters or None, operation in the plan)
FAST = {
    "linear 2-D": (linear, (4,), None, "linear"),
    "linear 3-D": (linear, (6, 4), None, "linear"),
    "linear 4-D": (linear, (2, 3, 4), None, "linear"),
    "linear no bias": (lambda: linear(bias=False), (6, 4), None, "linear"),
    "linear tokens folded": (lambda: Fn(lambda m, x: m.a(x.flatten(0, 1)).view(-1, 6, 5), a=linear()), (6, 4), None, "linear"),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 9), None, "conv1d"),
    "conv1d same, even": (lambda: nn.Conv1d(3, 4, 4, padding="same"), (3, 9), None, "conv1d"),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 6, 5), None, "conv2d"),
    "conv2d large map": (lambda: nn.Conv2d(1, 2, 3, padding=1), (1, 28, 28), None, "conv2d"),
    "conv2d rectangle": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(0, 1), bias=False), (3, 6, 5), None, "conv2d"),
    "conv2d dilated": (lambda: nn.Conv2d(3, 4, 3, dilation=2, padding="same"), (3, 6, 5), None, "conv2d"),
    "conv2d valid": (lambda: nn.Conv2d(3, 4, 2, padding="valid"), (3, 6, 5), None, "conv2d"),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2), (4, 6, 7), None, "conv2d"),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 4, 5, groups=4, padding=2), (4, 14, 14), None, "conv2d"),
    "conv2d depthwise x2": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (4, 6, 6), None, "conv2d"),
    "conv2d 1x1 strided": (lambda: nn.Conv2d(4, 3, 1, stride=2), (4, 6, 7), None, "conv2d"),
    "conv2d patches": (lambda: nn.Conv2d(3, 4, 4, stride=4), (3, 9, 8), None, "conv2d"),
    "conv2d reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 6, 5), None, "conv2d"),
    "conv2d circular": (lambda: nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="circular"), (3, 6, 5), None, "conv2d"),
    "conv2d replicate": (lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="replicate"), (3, 6, 5), None, "conv2d"),
    "conv3d": (lambda: nn.Conv3d(2, 4, (2, 3, 2), stride=(1, 2, 1), groups=2), (2, 3, 5, 4), None, "conv3d"),
    "Conv2dSame": (lambda: Conv2dSame(3, 4, 3, stride=2), (3, 7, 6), None, "conv2d"),
    "video frames": (lambda: Fn(lambda m, x: m.a(x.flatten(0, 1)).view(len(x), -1), a=nn.Conv2d(2, 3, 3)), (3, 2, 5, 5), None, "conv2d"),
    "called twice": (lambda: Fn(lambda m, x: m.a(torch.tanh(m.a(x))), a=nn.Linear(4, 4)), (4,), None, "linear"),
    "called twice, once for nothing": (lambda: Fn(lambda m, x: (m.a(x), m.a(2 * x))[0], a=nn.Linear(4, 4)), (4,), None, "linear"),
    "shared": (shared, (4,), None, "linear"),
    "used elsewhere": (lambda: Fn(lambda m, x: F.linear(m.a(x), weight=m.b.weight), a=nn.Linear(4, 4), b=nn.Linear(4, 5)), (4,), None, "linear"),
    "conv1d as linear": (lambda: Fn(lambda m, x: F.conv1d(x.unsqueeze(-1), m.a.weight) + m.b(x).unsqueeze(-1), a=nn.Conv1d(4, 5, 1), b=linear()), (4,), None, None),
    "relu in place": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 2)), (3, 6, 5), None, "conv2d"),
    "relu in place, 3-D": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2), nn.ReLU(inplace=True)), (6, 4), None, "linear"),
    "residual in place": (lambda: Fn(lambda m, x: m.b(m.a(x).tanh()).add_(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4)), (6, 4), None, "linear"),
    "attention": (lambda: attention(True), (5, 4), ["body.a.in_proj_weight", "body.a.out_proj.weight"], "linear"),
    "attention, sequence first": (lambda: attention(False), (5, 4), ["body.a.in_proj_weight", "body.a.out_proj.weight"], "linear"),
    "attention, sequence first, L = 2": (lambda: attention(False), (2, 4), ["body.a.in_proj_weight", "body.a.out_proj.weight"], "linear"),
    "attention, sequence first, L = n": (lambda: attention(False), (4, 4), None, "linear"),
    "first token of a sequence": (lambda: Fn(first_token, a=linear()), (2, 4), None, "linear"),
    "checkpoint": (lambda: Fn(lambda m, x: checkpoint(lambda z: m.b(m.a(z).relu()), x, use_reentrant=False), a=linear(), b=nn.Linear(5, 2)), (4,), None, "linear"),
}  # fmt: skip

FALLBACK = {
    "x @ w.t()": (lambda: Fn(lambda m, x: x @ m.a.weight.t(), a=linear()), (4,), None, "used by"),
    "rule and matmul": (lambda: Fn(lambda m, x: m.a(x) + x @ m.a.weight.t(), a=linear()), (4,), None, "used by"),
    "table that samples share": (lambda: Fn(lambda m, x: x + m.a(torch.eye(4, dtype=x.dtype)), a=nn.Linear(4, 4)), (4, 4), None, "first axis"),
    "both layouts": (lambda: Fn(both_layouts, a=linear()), (3, 4), None, "differ"),
    "StdConv2d": (lambda: StdConv2d(3, 4, 3), (3, 5, 5), None, "used by"),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), (3, 4, 4), "body.weight", "used by conv_transpose2d"),
    "bias": (linear, (6, 4), "body.bias", "an argument other than the weight"),
    "LayerNorm": (lambda: nn.LayerNorm(4), (6, 4), "body.weight", "used by"),
    "vector weight": (lambda: Fn(lambda m, x: F.linear(x, m.a.weight), a=nn.LayerNorm(4)), (6, 4), "body.a.weight", "one axis"),
    "sample by sample in the model": (lambda: Fn(lambda m, x: torch.stack([m.a(v) for v in x]), a=nn.Conv2d(3, 2, 2)), (3, 4, 4), None, "without a sample axis"),
}  # fmt: skip


def engine_rows(model, images, labels, parameters=None, **options):
    rows = {}

    def sink(name, value):
        assert value.is_contiguous()
        rows.setdefault(name, []).append(value.clone())

    with GradientEngine(model, select_parameters(model, parameters), **options) as engine:
        losses = engine.run(images, labels, sink)
    assert losses.shape == (len(images),)
    assert losses.dtype == torch.float32
    return {name: torch.cat(values) for name, values in rows.items()}, engine


def check(make, shape, parameters, n=4, **options):
    torch.manual_seed(0)
    model = Head(make()).double()
    images = torch.randn(n, *shape, dtype=torch.float64)
    labels = torch.arange(n) % CLASSES
    rows, engine = engine_rows(model, images, labels, parameters, **options)
    names = list(select_parameters(model, parameters))
    expected = loop(model, images, labels, names)
    assert set(rows) == set(names) == set(engine.operations)
    for name in names:
        torch.testing.assert_close(rows[name], expected[name], rtol=1e-9, atol=1e-12)
        assert expected[name].any()
    return engine.operations


@pytest.mark.parametrize("case", FAST)
def test_rule_equals_loop(case):
    make, shape, parameters, operation = FAST[case]
    plan = check(make, shape, parameters)
    if operation is not None:
        assert set(plan.values()) == {operation}


@pytest.mark.parametrize("case", FALLBACK)
def test_fallback_equals_loop(case):
    make, shape, parameters, reason = FALLBACK[case]
    plan = check(make, shape, parameters)
    assert all(p.startswith("torch.func: ") and reason in p for p in plan.values()), plan


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.parametrize("case", ["conv2d", "linear 2-D", "called twice", "video frames"])
def test_micro_batches(case, micro_batch):
    make, shape, parameters, _ = FAST[case]
    check(make, shape, parameters, micro_batch=micro_batch)


@pytest.mark.parametrize("case", ["conv2d", "linear 2-D", "attention"])
def test_batch_of_one(case):
    make, shape, parameters, _ = FAST[case]
    check(make, shape, parameters, n=1)


def test_mixed_plan():
    def forward(m, x):
        return m.b(m.a(x)) @ m.c.weight.t()

    modules = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)}
    plan = check(lambda: Fn(forward, **modules), (4,), None)
    assert plan["body.a.weight"] == plan["body.b.weight"] == "linear"
    assert plan["body.c.weight"].startswith("torch.func")


def test_custom_autograd_function_is_not_missed():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w.t()

        @staticmethod
        def backward(ctx, dy):
            x, w = ctx.saved_tensors
            return dy @ w, dy.t() @ x

    # No use that a rule sees, and one use that it sees of two; torch.func cannot run either.
    for function in (
        lambda m, x: Product.apply(x, m.a.weight),
        lambda m, x: m.a(x) + Product.apply(x, m.a.weight),
    ):
        plan = check(lambda f=function: Fn(f, a=linear()), (4,), None)
        assert "one sample at a time" in plan["body.a.weight"]


def test_reentrant_checkpoint_is_refused():
    def forward(m, x):
        return checkpoint(m.a, x, use_reentrant=True)

    with pytest.raises(UnsupportedLayer, match="reentrant"):
        check(lambda: Fn(forward, a=linear()), (4,), None)


def test_fallback_in_chunks(monkeypatch):
    monkeypatch.setattr("fastsal.gradients.fallback._ROW_BYTES", 1)
    make, shape, parameters, _ = FALLBACK["x @ w.t()"]
    check(make, shape, parameters)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("resnet18", 32, {}),
        ("vit_tiny_patch16_224", 32, {"img_size": 32, "depth": 2}),
        ("swin_tiny_patch4_window7_224", 32, {"img_size": 32, "window_size": 2, "depths": (1, 2), "num_heads": (2, 4), "embed_dim": 16}),
        ("mobilenetv3_small_050", 32, {}),
    ],
)  # fmt: skip
def test_timm_models(name, size, options):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = randomize(timm.create_model(name, num_classes=CLASSES, **options)).double()
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2])
    rows, engine = engine_rows(model, images, labels)
    expected = loop(model, images, labels, list(rows))
    assert list(select_parameters(model)) == list(engine.operations)
    assert not any(how.startswith("torch.func") for how in engine.operations.values())
    for name, value in rows.items():
        scale = float(expected[name].norm()) + 1e-30
        assert float((value - expected[name]).norm()) < 1e-9 * scale, name
