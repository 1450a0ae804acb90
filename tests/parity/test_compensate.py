"""Joint compensation = θ_K + A_KK⁻¹ A_KP θ_P, and it is the minimum."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastsal
from fastsal import BlockFisher, Masks
from fastsal.errors import FactorizationError, InvalidArgument, MaskError, UnknownParameter
from fastsal.fisher.block_fisher import sums_of

SHAPES = {"a": (4, 3, 3, 3), "b": (7,), "c": (3, 50)}


pytestmark = pytest.mark.usefixtures("one_thread")


class Holder(nn.Module):
    def __init__(self, weights):
        super().__init__()
        for name, value in weights.items():
            setattr(self, name, nn.Parameter(value.clone()))

    def copy(self):
        return {name: p.detach().clone() for name, p in self.named_parameters()}


def case(n=120, *, shapes=SHAPES, seed=0, block_size=16, precision="float32", sparsity=0.5):
    """Correlated gradients, weights and a random mask."""
    generator = torch.Generator().manual_seed(seed)
    fisher = BlockFisher(shapes, block_size=block_size, precision=precision)
    gradients, weights, masks = {}, {}, {}
    for name, shape in shapes.items():
        d = math.prod(shape)
        mixing = torch.randn(d, d, generator=generator) / math.sqrt(d)
        gradients[name] = (torch.randn(n, d, generator=generator) @ mixing).reshape(n, *shape)
        weights[name] = torch.randn(shape, generator=generator)
        masks[name] = torch.rand(shape, generator=generator) >= sparsity
    fisher.update(gradients)
    return fisher, Holder(weights), masks


def damped_blocks(fisher, name, damping):
    """Slices of the flat parameter and `A_b`."""
    d = math.prod(fisher.shapes[name])
    for b, block in enumerate(fisher.blocks(name)):
        part = slice(b * len(block), min((b + 1) * len(block), d))
        n = part.stop - part.start
        yield part, block[:n, :n] + damping * torch.eye(n, dtype=torch.float64)


def compensated(fisher, name, weight, mask, damping, before=None):
    """The formula: new weights, `δᵀAδ / 2` of the step, and of the mask alone."""
    theta, moved = weight.double().reshape(-1), weight.double().reshape(-1).clone()
    mask = mask.reshape(-1)
    was = torch.ones_like(mask) if before is None else before.reshape(-1)
    increase = alone = 0.0
    for part, a in damped_blocks(fisher, name, damping):
        k, p = mask[part] & was[part], ~mask[part] & was[part]
        new = theta[part].clone()
        if k.any() and p.any():
            new[k] += torch.linalg.solve(a[k][:, k], a[k][:, p] @ theta[part][p])
        new[~mask[part]] = 0
        moved[part] = new
        live = was[part]
        delta = (new - theta[part])[live]
        increase += float(delta @ a[live][:, live] @ delta) / 2
        bare = torch.where(mask[part], 0.0, -theta[part])[live]
        alone += float(bare @ a[live][:, live] @ bare) / 2
    return moved.reshape(weight.shape), increase, alone


def independent(fisher, name, weight, mask, damping):
    """The update that takes each pruned weight as if it were the only one; its `δᵀAδ / 2`."""
    theta, increase = weight.double().reshape(-1), 0.0
    for part, a in damped_blocks(fisher, name, damping):
        inverse, p = torch.linalg.inv(a), ~mask.reshape(-1)[part]
        step = -(inverse[:, p] * (theta[part] / inverse.diagonal())[p]).sum(1)
        step[p] = -theta[part][p]
        increase += float(step @ a @ step) / 2
    return increase


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("damping", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.95])
@pytest.mark.parametrize(
    ("block_size", "n"), [(16, 120), (1, 30), (64, 120), (None, 200), (None, 8)]
)
def test_equals_the_formula(block_size, n, sparsity, damping, precision):
    fisher, model, masks = case(n, block_size=block_size, sparsity=sparsity, precision=precision)
    old = model.copy()
    report = fastsal.compensate(model, fisher, masks, damping)
    for name, p in model.named_parameters():
        want, increase, alone = compensated(fisher, name, old[name], masks[name], damping)
        scale = float(want.abs().max())
        assert ((p.detach().double() - want).abs() <= 1e-6 * max(scale, 1)).all()
        assert not p.detach()[~masks[name]].any()
        assert report.increase[name] == pytest.approx(increase, rel=1e-6, abs=1e-12)
        assert report.uncompensated[name] == pytest.approx(alone, rel=1e-9)
    assert report.total == pytest.approx(sum(report.increase.values()))
    assert report.total_uncompensated == pytest.approx(sum(report.uncompensated.values()))


def test_blocks_of_one_move_nothing():
    fisher, model, masks = case(block_size=1)
    old = model.copy()
    report = fastsal.compensate(model, fisher, masks, 0.1)
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), old[name] * masks[name])
        assert report.increase[name] == pytest.approx(report.uncompensated[name])


@settings(max_examples=1000, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    d=st.integers(1, 20),
    n=st.integers(1, 60),
    share=st.floats(0, 1),
    damping=st.sampled_from([1e-4, 1e-2, 1.0]),
)
def test_never_more_than_the_alternatives(seed, d, n, share, damping):
    fisher, model, masks = case(
        n, shapes={"w": (d,)}, seed=seed, block_size=None, precision="float64", sparsity=share
    )
    old = model.copy()["w"]
    report = fastsal.compensate(model, fisher, masks, damping)
    slack = 1 + 1e-9
    assert report.total <= report.total_uncompensated * slack + 1e-12
    assert report.total <= independent(fisher, "w", old, masks["w"], damping) * slack + 1e-12
    # What is predicted is what the step costs, and no other step of the kept weights costs less.
    ((_, a),) = damped_blocks(fisher, "w", damping)
    delta = model.w.detach().double() - old.double()
    cost = float(delta @ a @ delta) / 2
    assert cost == pytest.approx(report.total, rel=1e-4, abs=1e-6)
    generator = torch.Generator().manual_seed(seed)
    other = torch.randn(d, generator=generator, dtype=torch.float64) * masks["w"]
    for size in (1e-3, 1.0):
        moved = delta + size * other
        assert float(moved @ a @ moved) / 2 >= report.total * (1 - 1e-9) - 1e-9


def test_independent_update_can_raise_the_loss_above_no_update():
    """The reason for joint compensation; and the comparison above is not an empty one."""
    worse = 0
    for seed in range(10):
        fisher, model, masks = case(
            60, shapes={"w": (20,)}, seed=seed, block_size=None, precision="float64"
        )
        old = model.copy()["w"]
        report = fastsal.compensate(model, fisher, masks, 1e-4)
        cost = independent(fisher, "w", old, masks["w"], 1e-4)
        assert report.total < 0.9 * min(cost, report.total_uncompensated)
        worse += cost > report.total_uncompensated
    assert worse > 0


def test_a_second_round_leaves_pruned_weights_out():
    _, model, first = case()
    old = model.copy()  # not zero where pruned before, so that they would count
    generator = torch.Generator().manual_seed(5)
    second = {n: m & (torch.rand(m.shape, generator=generator) < 0.5) for n, m in first.items()}
    # Statistics at the pruned weights: gradients of pruned weights are there, and must not count.
    again, *_ = case(seed=9)
    report = fastsal.compensate(model, again, second, 0.01, before=first)
    for name, p in model.named_parameters():
        want, increase, alone = compensated(again, name, old[name], second[name], 0.01, first[name])
        torch.testing.assert_close(p.detach().double(), want, rtol=1e-6, atol=1e-6)
        assert report.increase[name] == pytest.approx(increase, rel=1e-6)
        assert report.uncompensated[name] == pytest.approx(alone, rel=1e-9)
        without, *_ = compensated(again, name, old[name], second[name], 0.01)
        assert not torch.allclose(p.detach().double(), without, atol=1e-3), "`before` does nothing"


def test_weights_pruned_before_do_not_come_back():
    fisher, model, first = case()
    fastsal.compensate(model, fisher, first, 0.01)
    everything = {name: torch.ones_like(m) for name, m in first.items()}
    old = model.copy()
    report = fastsal.compensate(model, fisher, everything, 0.01, before=first)
    assert report.total == 0
    assert all(torch.equal(p.detach(), old[n]) for n, p in model.named_parameters())


def test_some_parameters_and_other_kinds_of_masks():
    fisher, model, masks = case()
    reference = Holder(model.copy())
    fastsal.compensate(reference, fisher, Masks(masks), 0.01)
    old = model.copy()
    report = fastsal.compensate(model, fisher, {"c": masks["c"].float()}, 0.01)
    assert torch.equal(model.c, reference.c)
    assert torch.equal(model.a.detach(), old["a"])
    assert torch.equal(model.b.detach(), old["b"])
    assert report.increase["a"] == report.uncompensated["b"] == 0
    # Kept and pruned altogether.
    for value in (True, False):
        model = Holder(old)
        full = {name: torch.full(m.shape, value) for name, m in masks.items()}
        report = fastsal.compensate(model, fisher, full, 0.01)
        for name, p in model.named_parameters():
            assert torch.equal(p.detach(), old[name] * value)
            assert report.increase[name] == pytest.approx(report.uncompensated[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_model(dtype):
    fisher, model, masks = case()
    model = model.to(dtype)
    old = model.copy()
    fastsal.compensate(model, fisher, masks, 0.01)
    for name, p in model.named_parameters():
        assert p.dtype == dtype
        want, *_ = compensated(fisher, name, old[name], masks[name], 0.01)
        rounding = max(torch.finfo(dtype).eps, 1e-6)
        torch.testing.assert_close(p.detach().double(), want, rtol=rounding, atol=1e-6)
        assert not p.detach()[~masks[name]].any()


def test_channels_last_weights():
    fisher, model, masks = case()
    plain = Holder(model.copy())
    model.a.data = model.a.data.to(memory_format=torch.channels_last)
    fastsal.compensate(plain, fisher, masks, 0.01)
    fastsal.compensate(model, fisher, masks, 0.01)
    assert model.a.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.a, plain.a)


def test_threads_do_not_matter():
    results = []
    for threads in (1, 2, 7):
        fisher, model, masks = case()
        fastsal.set_num_threads(threads)
        try:
            report = fastsal.compensate(model, fisher, masks, 0.01)
        finally:
            fastsal.set_num_threads(0)
        results.append((model.copy(), report))
    for weights, report in results[1:]:
        assert report == results[0][1]
        assert all(torch.equal(weights[n], w) for n, w in results[0][0].items())


def broken():
    def other_model(fisher, model, masks):
        model.c = nn.Parameter(torch.zeros(3, 51))

    def no_parameter(fisher, model, masks):
        del model.c

    def overflow(fisher, model, masks):
        sums_of(fisher).parameters["c"].fold()[:] = math.inf

    def foreign(fisher, model, masks):
        masks["d"] = torch.ones(3)

    def reshaped(fisher, model, masks):
        masks["c"] = masks["c"].reshape(50, 3)

    return {
        "damping": (None, {"damping": -1.0}, InvalidArgument, "damping must be .*, got -1.0"),
        "damping NaN": (None, {"damping": math.nan}, InvalidArgument, "damping must be .*got nan"),
        "damping auto": (None, {"damping": "auto"}, InvalidArgument, "damping must .*got 'auto'"),
        "shape of the model": (other_model, {}, UnknownParameter, "'c' must have shape"),
        "names of the model": (no_parameter, {}, UnknownParameter, "has no parameter 'c'"),
        "factorization": (overflow, {}, FactorizationError, "blocks of 'c'"),
        "names of masks": (foreign, {}, MaskError, "masks must be of parameters .*got 'd'"),
        "shape of masks": (reshaped, {}, MaskError, "masks: 'c' must have shape"),
        "shape of before": (
            None,
            {"before": {"c": torch.ones(150, dtype=torch.bool)}},
            MaskError,
            "before: 'c' must have shape",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", broken())
def test_errors_leave_the_model_as_it_was(name):
    change, arguments, error, message = broken()[name]
    fisher, model, masks = case()
    if change:
        change(fisher, model, masks)
    old = model.copy()
    with pytest.raises(error, match=message):
        fastsal.compensate(model, fisher, masks, **{"damping": 0.01, **arguments})
    assert all(torch.equal(p.detach(), old[n]) for n, p in model.named_parameters())


def test_no_samples():
    _, model, masks = case()
    with pytest.raises(InvalidArgument, match="fisher has no samples"):
        fastsal.compensate(model, BlockFisher(SHAPES), masks)
