"""Models in 16 bits, and under autocast, against float64 at the same weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastsal
from fastsal.errors import InvalidArgument, NonFiniteGradient
from fastsal.gradients import GradientEngine, per_sample_gradients, select_parameters
from fastsal.gradients.scaling import LossScale

from .oracle import Fn, cross_entropy, loop, randomize

pytestmark = pytest.mark.usefixtures("one_thread")

TYPES = [torch.bfloat16, torch.float16]
# Of relative norms: a few roundings of activations and of gradients in each of a few layers.
ROUNDOFFS = 12


def conv():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, groups=2), nn.GELU(), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


def perceptron():
    return nn.Sequential(
        nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32), nn.ReLU(),
        nn.Linear(32, 5),
    )  # fmt: skip


def twice():
    return Fn(lambda m, x: m.b(m.a(torch.tanh(m.a(x)))), a=nn.Linear(16, 16), b=nn.Linear(16, 5))


def without_rule():
    return Fn(lambda m, x: m.b(x @ m.a.weight.t()), a=nn.Linear(16, 12), b=nn.Linear(12, 5))


def recomputed():
    return Fn(
        lambda m, x: m.b(checkpoint(lambda z: F.gelu(m.a(z)), x, use_reentrant=False)),
        a=nn.Linear(16, 12),
        b=nn.Linear(12, 5),
    )


def tokens():
    return nn.Sequential(
        nn.Embedding(9, 8), nn.Linear(8, 8), nn.Tanh(), nn.Flatten(), nn.Linear(32, 5)
    )


# name: (module, inputs, parameters)
MODELS = {
    "conv": (conv, (2, 6, 6), None),
    "perceptron": (perceptron, (16,), None),
    "called twice": (twice, (16,), None),
    "without a rule": (without_rule, (16,), None),
    "recomputed": (recomputed, (16,), None),
    "tokens": (tokens, 4, ["*", "0.weight"]),
}


def make(case, dtype=torch.float32, n=6):
    build, shape, parameters = MODELS[case]
    torch.manual_seed(0)
    model = randomize(build()).to(dtype)
    x = torch.randint(9, (n, shape)) if isinstance(shape, int) else torch.randn(n, *shape).to(dtype)
    return model, x, torch.arange(n) % 5, parameters


def truth(model, x, y, names, loss=cross_entropy):
    """Float64 at the weights and inputs that the model has, rounded as they are."""
    return loop(model.double(), x.double() if x.is_floating_point() else x, y, names, loss)


def assert_close(rows, expected, dtype, factor=ROUNDOFFS):
    roundoff = torch.finfo(dtype).eps / 2
    for name, value in rows.items():
        assert value.dtype == torch.float32
        error = float((value - expected[name]).norm() / expected[name].norm())
        assert error < factor * roundoff, (name, error / roundoff)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", MODELS)
def test_sixteen_bit_weights(case, dtype):
    model, x, y, parameters = make(case, dtype)
    rows = per_sample_gradients(model, x, y, parameters=parameters, micro_batch=4)
    assert_close(rows, truth(model, x, y, list(rows)), dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", MODELS)
def test_autocast(case, dtype):
    model, x, y, parameters = make(case)
    rows = per_sample_gradients(model, x, y, parameters=parameters, autocast=dtype, micro_batch=4)
    assert_close(rows, truth(model, x, y, list(rows)), dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_that_reach_a_sink_are_float32(dtype):
    model, x, y, _ = make("conv", dtype)
    seen = []
    with GradientEngine(model, select_parameters(model), micro_batch=4) as engine:
        losses = engine.run(x, y, lambda name, rows: seen.append((name, rows.dtype, len(rows))))
    assert losses.dtype == torch.float32
    assert seen == [
        (name, torch.float32, n) for n in (4, 2) for name in ("6.weight", "3.weight", "0.weight")
    ]


@pytest.mark.parametrize("case", ["perceptron", "without a rule"])
@pytest.mark.parametrize("autocast", [None, *TYPES])
def test_losses_are_given_float32_outside_of_autocast(case, autocast):
    model, x, y, _ = make(case, torch.float32 if autocast else torch.bfloat16)
    seen = set()

    def loss(outputs, labels):
        product = outputs @ torch.eye(5)
        seen.add((outputs.dtype, product.dtype))
        return cross_entropy(product, labels)

    per_sample_gradients(model, x, y, loss=loss, autocast=autocast)
    assert seen == {(torch.float32, torch.float32)}


# Loss scaling.


def small(factor):
    return lambda outputs, labels: factor * cross_entropy(outputs, labels)


def diagonals(rows):
    return {name: value.double().square().mean(0) for name, value in rows.items()}


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("case", ["conv", "perceptron", "without a rule", "tokens"])
def test_small_gradients_in_float16(case, size):
    model, x, y, parameters = make(case, torch.float16)
    rows = per_sample_gradients(model, x, y, parameters=parameters, loss=small(size))
    want = diagonals(truth(model, x, y, list(rows), small(size)))
    for name, value in diagonals(rows).items():
        assert float((value - want[name]).norm()) < 0.01 * float(want[name].norm()), name


def test_gradients_of_1e_9_vanish_without_a_scale():
    model, x, y, _ = make("perceptron", torch.float16)
    vanished = fastsal.collect(model, [(x, y)], loss=small(1e-8), loss_scale=1)
    assert not any(v.any() for v in vanished.diagonal().values())
    scaled = fastsal.collect(model, [(x, y)], loss=small(1e-8)).diagonal()
    want = truth(model, x, y, list(scaled), small(1e-8))
    assert 1e-10 < float(want["3.weight"].abs().mean()) < 2e-9
    for name, value in diagonals(want).items():
        assert float((scaled[name] - value).norm()) < 0.01 * float(value.norm()), name


@pytest.mark.parametrize("case", ["conv", "called twice", "without a rule", "recomputed"])
def test_undoing_a_scale_is_exact(case):
    model, x, y, parameters = make(case)
    plain, scaled = (
        per_sample_gradients(model, x, y, parameters=parameters, loss_scale=scale)
        for scale in (None, 2.0**20)
    )
    for name, rows in plain.items():
        assert torch.equal(rows, scaled[name])


@pytest.mark.parametrize("case", ["conv", "called twice", "without a rule", "recomputed", "tokens"])
def test_a_scale_that_overflows_halves_before_the_sink_sees_anything(case):
    model, x, y, parameters = make(case, torch.float16)
    rows = {}

    def sink(name, value):
        assert value.isfinite().all()
        rows.setdefault(name, []).append(value.clone())

    chosen = select_parameters(model, parameters)
    with GradientEngine(model, chosen, loss_scale=2.0**40, micro_batch=4) as engine:
        engine.run(x, y, sink)
    assert all([len(part) for part in parts] == [4, 2] for parts in rows.values())
    rows = {name: torch.cat(parts) for name, parts in rows.items()}
    assert_close(rows, truth(model, x, y, list(rows)), torch.float16)


def test_an_overflow_is_of_its_micro_batch_only():
    """A later sample whose gradient is 2¹² times as large."""
    model, x, y, _ = make("perceptron", torch.float16, n=8)
    weight = torch.ones(8)
    weight[5] = 2.0**12

    def loss(outputs, labels):
        return labels[:, 1] * cross_entropy(outputs, labels[:, 0].long())

    labels = torch.stack([y.float(), weight], 1)
    rows = per_sample_gradients(model, x, labels, loss=loss, micro_batch=2)
    want = truth(model, x, labels, list(rows), loss)
    for i in range(8):
        assert_close(
            {k: v[i] for k, v in rows.items()},
            {k: v[i] for k, v in want.items()},
            torch.float16,
            factor=3 * ROUNDOFFS,
        )


def test_gradients_that_are_infinite_at_any_scale():
    def loss(outputs, labels):
        return outputs.sum(1).abs().sqrt()

    model = nn.Linear(4, 3, bias=False).half()
    x, y = torch.ones(8, 4).half(), torch.zeros(8, dtype=torch.long)
    x[6] = 0
    before = model.weight.detach().clone()
    with pytest.raises(NonFiniteGradient, match=r"got nan for 'weight', sample 6, at"):
        fastsal.collect(model, [(x, y)], loss=loss, micro_batch=3)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("scale", [0, -2.0, 3.0, math.inf, math.nan, 2.0**60, "2", True])
def test_scales_that_are_not_taken(scale):
    model, x, y, _ = make("perceptron")
    with pytest.raises(InvalidArgument, match="^loss_scale must be a power of two"):
        fastsal.collect(model, [(x, y)], loss_scale=scale)


def test_where_a_scale_begins():
    half, single = [torch.zeros(1).half()], [torch.zeros(1)]
    for asked, autocast, weights, value in (
        (None, None, single, 1),
        (None, torch.bfloat16, single, 1),
        (None, None, [torch.zeros(1).bfloat16()], 1),
        (None, torch.float16, single, 2**16),
        (None, None, single + half, 2**16),
        (1, None, half, 1),
        (2.0**-3, None, single, 2.0**-3),
    ):
        scale = LossScale.of(asked, autocast, weights)
        assert (scale.value, scale.is_active) == (value, value != 1)


def test_a_scale_recovers_but_not_beyond_what_was_asked_for():
    asked, automatic = LossScale.of(2**10, None, []), LossScale(2.0**10)
    for scale in (asked, automatic):
        assert scale.back_off()
        assert scale.value == 2**9
        for _ in range(1000):
            scale.passed()
    assert asked.value == 2**10
    assert automatic.value > 2**10
    while asked.back_off():
        pass
    assert asked.value == 2.0**-16


# The way through the package.


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", ["conv", "perceptron", "tokens"])
def test_collect_score_and_compensate(case, dtype):
    model, x, y, parameters = make(case, dtype, n=40)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fisher = fastsal.collect(model, [(x, y)], block_size=8, parameters=parameters)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype
    scores = fastsal.score(model, fisher, "obs-greedy", damping=1e-3)
    masks = fastsal.rank(scores, 0.5)
    report = fastsal.compensate(model, fisher, masks, damping=1e-3)
    assert report.total < report.total_uncompensated
    masks.verify(model)
    for name, p in model.named_parameters():
        assert p.dtype == dtype
        assert p.isfinite().all()
        if name not in masks:
            assert torch.equal(p, before[name])
        else:
            assert torch.equal(p[~masks[name]], torch.zeros_like(p[~masks[name]]))

    want = diagonals(truth(make(case, dtype, n=40)[0], x, y, fisher.names))
    for name, value in fisher.diagonal().items():
        error = float((value - want[name]).norm() / want[name].norm())
        assert error < 2 * ROUNDOFFS * torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"criterion": "magnitude", "compensate": False},
        {"rounds": 2, "criterion": "block-fisher", "recalibrate": True},
        {"curvature": "features"},
        {"curvature": "sampled", "damping": 1e-3},
    ],
)
def test_prune(dtype, arguments):
    model, x, y, _ = make("conv", dtype, n=48)
    result = fastsal.prune(model, [(x, y)], 0.6, block_size=8, **arguments)
    result.masks.verify(model)
    owned = dict(model.named_parameters())
    total = sum(mask.numel() for mask in result.masks.values())
    pruned = sum(int((~mask).sum()) for mask in result.masks.values())
    assert pruned == round(0.6 * total)
    assert pruned == sum(int((owned[name] == 0).sum()) for name in result.masks)
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", TYPES)
def test_prune_under_autocast(dtype):
    model, x, y, _ = make("perceptron", n=48)
    result = fastsal.prune(model, [(x, y)], 0.5, block_size=8, autocast=dtype)
    result.masks.verify(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
