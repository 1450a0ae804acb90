"""The peers of `benches.structured` do what their papers say."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from benches.structured.methods import METHODS
from benches.structured.subjects import Goal, Subject
from benches.structured.torch_pruning import torch_pruning_taylor
from fastsal.models.features import features

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def subject():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=4,
        num_classes=5, mlp_ratio=3,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return Subject(model, torch.randn(64, 3, 16, 16), torch.arange(64) % 5, dict, 48, (), 1)


def hidden(model, images):
    """Return the activations of the hidden units of each block `[rows, units]`."""
    found = []
    handles = [
        block.mlp.fc2.register_forward_pre_hook(lambda _, x: found.append(x[0].flatten(0, 1)))
        for block in model.blocks
    ]
    features(model, images)
    for handle in handles:
        handle.remove()
    return found


def test_vbp_removes_the_least_variance_and_keeps_the_mean(subject):
    model, batches = copy.deepcopy(subject.model), subject.draw(0)
    METHODS["VBP: variance, mean alone"](model, batches, Goal("mlp", 0.5), subject)
    images = torch.cat([x for x, _ in batches])
    activations = hidden(subject.model, images)
    variances = torch.cat([h.var(0, correction=0) for h in activations])
    limit = variances.median()
    for dense, block, h in zip(subject.model.blocks, model.blocks, activations, strict=True):
        kept = h.var(0, correction=0) > limit
        assert block.mlp.fc1.out_features == int(kept.sum())
        torch.testing.assert_close(block.mlp.fc2.weight, dense.mlp.fc2.weight[:, kept])
        bias = dense.mlp.fc2.bias + dense.mlp.fc2.weight[:, ~kept] @ h.mean(0)[~kept]
        torch.testing.assert_close(block.mlp.fc2.bias, bias, rtol=1e-4, atol=1e-5)


def test_corp_is_least_squares_on_the_kept_units(subject):
    model, batches = copy.deepcopy(subject.model), subject.draw(0)
    METHODS["CORP: variance, same width, fold"](model, batches, Goal("mlp", 0.5), subject)
    images = torch.cat([x for x, _ in batches])
    for dense, block, h in zip(
        subject.model.blocks, model.blocks, hidden(subject.model, images), strict=True
    ):
        kept = h.var(0, correction=0).argsort(descending=True)[:48].sort().values
        rows = torch.cat([h[:, kept], torch.ones(len(h), 1)], 1).double()
        wanted = dense.mlp.fc2(h).double()
        best = (wanted - rows @ torch.linalg.lstsq(rows, wanted).solution).square().sum()
        error = (wanted - block.mlp.fc2(h[:, kept])).square().sum()
        assert best <= error <= 1.02 * best


def test_torch_pruning_removes_the_fraction_of_these_layers(subject):
    pytest.importorskip("torch_pruning", reason="needs the extra 'bench'")
    model, batches = copy.deepcopy(subject.model), subject.draw(0)
    layers = [f"blocks.{i}.mlp.fc1" for i in range(2)]
    torch_pruning_taylor(model, batches, Goal("mlp", 0.25), layers, None)
    assert sum(block.mlp.fc1.out_features for block in model.blocks) == pytest.approx(144, abs=4)
    assert model.blocks[0].attn.qkv.out_features == 96
    assert model(batches[0][0]).shape == (48, 5)
