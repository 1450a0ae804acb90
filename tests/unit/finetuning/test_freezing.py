"""What fine-tuning leaves alone: heads and normalisation, found in models of many kinds."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from fastsal.errors import InvalidArgument
from fastsal.finetuning.freezing import normalization_layers, trained_parameters
from fastsal.models.classifier import find_head


def test_heads():
    resnet = timm.create_model("test_resnet", num_classes=3)
    assert find_head(resnet) == [resnet.get_classifier()]
    assert find_head(nn.Sequential(resnet)) == [resnet.get_classifier()]
    deit = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=2, depth=1, img_size=32)
    assert find_head(deit) == [deit.head, deit.head_dist]
    plain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.ReLU())
    assert find_head(plain) == [plain[2]]
    with pytest.raises(
        InvalidArgument, match="^train_head must be True for Conv2d, which has neither"
    ):
        find_head(nn.Conv2d(3, 3, 3))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_normalisation_of_timm(name):
    model = timm.create_model(name)
    layers = normalization_layers(model)
    vectors = {p for layer in layers for p in layer.parameters()}
    for parameter, p in model.named_parameters():
        if "norm" in parameter or "bn" in parameter:
            assert p in vectors, parameter
        if p.ndim > 1:
            assert p not in vectors, parameter
    trained = trained_parameters(model)
    assert not vectors & set(trained.values())


def test_other_normalisation():
    class RootMeanNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    class NormFreeBlock(nn.Linear):
        pass

    model = nn.ModuleList([RootMeanNorm(), NormFreeBlock(3, 3), nn.LayerNorm([3, 3])])
    assert normalization_layers(model) == [model[0], model[2]]
