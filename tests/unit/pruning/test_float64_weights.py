"""Models in float64: compensated in float64, and written back in it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastsal

BLOCK = 8


def fisher_of(d, seed, precision="float64"):
    torch.manual_seed(seed)
    fisher = fastsal.BlockFisher({"weight": (3, d)}, block_size=BLOCK, precision=precision)
    fisher.update({"weight": torch.randn(40, 3, d, dtype=torch.float64)})
    return fisher


def layer(d, seed, dtype=torch.float64):
    torch.manual_seed(seed)
    model = nn.Linear(d, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, d, dtype=torch.float64))
    return model.to(dtype)


def slow(weights, fisher, kept, damping, before=None):
    """`θ_K + A_KK⁻¹ A_KP θ_P`, block by block, in float64."""
    flat, mask = weights.reshape(-1).clone(), kept.reshape(-1)
    there = torch.ones_like(mask) if before is None else before.reshape(-1)
    for b, f in enumerate(fisher.blocks("weight")):
        part = slice(b * BLOCK, min(len(flat), (b + 1) * BLOCK))
        w, k = flat[part], mask[part] & there[part]
        p = ~mask[part] & there[part]
        a = f[: len(w), : len(w)] + damping * torch.eye(len(w), dtype=torch.float64)
        if k.any():
            w[k] += torch.linalg.solve(a[k][:, k], a[k][:, p] @ w[p])
        w[~mask[part]] = 0
    return flat.reshape(weights.shape)


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 21), st.integers(0, 99), st.floats(0.1, 0.9), st.booleans())
def test_float64_weights_are_compensated_in_float64(d, seed, share, again):
    fisher, model = fisher_of(d, seed), layer(d, seed + 1)
    kept = torch.rand(3, d) > share
    before = torch.rand(3, d) > 0.2 if again else None
    if before is not None:
        kept &= before
        with torch.no_grad():
            model.weight.mul_(before)
    expected = slow(model.weight.detach(), fisher, kept, 0.05, before)
    fastsal.compensate(
        model,
        fisher,
        {"weight": kept},
        0.05,
        before=before if before is None else {"weight": before},
    )
    assert model.weight.dtype == torch.float64
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-12, atol=1e-13)


def test_without_a_pruned_weight_nothing_moves():
    """Float32 in between would round every weight."""
    fisher, model = fisher_of(10, 0), layer(10, 1)
    start = model.weight.detach().clone()
    fastsal.compensate(model, fisher, {"weight": torch.ones(3, 10, dtype=torch.bool)}, 0.05)
    assert torch.equal(model.weight.detach(), start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_keep_their_type(dtype):
    fisher, model = fisher_of(12, 2), layer(12, 3, dtype)
    kept = torch.rand(3, 12) > 0.5
    expected = slow(model.weight.detach().double(), fisher, kept, 0.05)
    fastsal.compensate(model, fisher, {"weight": kept}, 0.05)
    assert model.weight.dtype == dtype
    torch.testing.assert_close(model.weight.detach(), expected.to(dtype))


@pytest.mark.parametrize("scratch", [False, True])
def test_pruned_models_are_compensated_in_float64(tmp_path, scratch):
    """Also where the new weights are stored in a scratch folder, beside others in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    images = [(torch.randn(60, 3, 2, 2, dtype=torch.float64), torch.arange(60) % 3)]
    budget = {"memory_budget": "300MiB", "scratch": tmp_path} if scratch else {}
    how = {"criterion": "magnitude", "damping": 0.01, "block_size": BLOCK, "precision": "float64"}
    dense = copy.deepcopy(model)
    result = fastsal.prune(model, images, 0.5, **how, **budget)
    fisher = fastsal.collect(dense, images, block_size=BLOCK, precision="float64")
    for name in result.masks:
        only = fastsal.BlockFisher({"weight": result.masks[name].shape}, block_size=BLOCK)
        only.blocks = lambda _, name=name: fisher.blocks(name)
        expected = slow(dense.state_dict()[name], only, result.masks[name], 0.01)
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-11, atol=1e-13)
