"""Windows are blocks with a nonlinearity inside, and are compared by their relative error."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from fastsal.pruning.refit.windows import capturing, find_blocks


def nested(name):
    return [f"{name}.{i}.blocks.{j}" for i, n in enumerate((2, 2, 6, 2)) for j in range(n)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]),
        ("vit_tiny_patch16_224", [f"blocks.{i}" for i in range(12)]),
        ("convnext_atto", nested("stages")),
        ("swin_tiny_patch4_window7_224", nested("layers")),
    ],
)  # fmt: skip
def test_blocks_of_timm(name, expected):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert find_blocks(model) == expected


def test_inverted_residuals():
    with torch.device("meta"):
        model = timm.create_model("tf_efficientnet_lite0")
    found = find_blocks(model)
    assert len(found) == 16
    assert all(name.startswith("blocks.") and name.count(".") == 2 for name in found)


def test_a_flat_model_has_no_blocks():
    assert find_blocks(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))) == []


class Several(nn.Module):
    def forward(self, x):
        return {"none": None, "out": (2 * x, x)}


def test_capturing_takes_the_first_tensor_and_leaves_no_hook():
    model = nn.Sequential(Several())
    with capturing(model, ["0"]) as caught:
        model(torch.ones(2))
        assert caught["0"].tolist() == [2, 2]
    assert not model[0]._forward_hooks


def test_hooks_are_removed_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError), capturing(model, ["0"]):
        model(torch.ones(2, 5))
    assert not model[0]._forward_hooks
