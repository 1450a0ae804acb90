"""A model without units equals the model with zeros for them, on many families of timm."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import fastsal
from fastsal.models.evaluating import set_modes
from fastsal.pruning.structured.find import find
from fastsal.pruning.structured.groups import cut, silence

pytestmark = pytest.mark.usefixtures("one_thread")

VIT = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
# Model, arguments, side of the images, structure, least number of groups.
FAMILIES = [
    ("vit_tiny_patch16_224", VIT, 32, "mlp", 2),
    ("vit_tiny_patch16_224", VIT, 32, "heads", 2),
    ("vit_small_patch14_dinov2", {**VIT, "num_classes": 0}, 32, "mlp", 2),
    ("deit3_small_patch16_224", VIT, 32, "heads", 2),
    ("eva02_tiny_patch14_224", {**VIT, "embed_dim": 48}, 32, "mlp", 2),
    ("beit_base_patch16_224", {**VIT, "patch_size": 8}, 32, "mlp", 2),
    ("cait_xxs24_224", {**VIT, "num_heads": 2}, 32, "mlp", 3),
    ("mixer_s32_224", dict(img_size=64), 64, "mlp", 16),
    ("gmixer_12_224", dict(img_size=32), 32, "mlp", 12),
    ("convnext_atto", dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), 32, "mlp", 4),
    ("convnext_tiny", dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)), 32, "mlp", 4),
    (
        "swin_tiny_patch4_window7_224",
        dict(img_size=32, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 4)),
        32, "mlp", 4,
    ),
    (
        "swin_tiny_patch4_window7_224",
        dict(img_size=32, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 4)),
        32, "heads", 4,
    ),
    (
        "levit_128s",
        dict(embed_dim=(16, 24, 32), key_dim=8, num_heads=(2, 2, 2), depth=(1, 1, 1)),
        224, "mlp", 3,
    ),
    ("poolformer_s12", {}, 32, "mlp", 12),
    (
        "pvt_v2_b0",
        dict(depths=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 2, 4)),
        64, "mlp", 4,
    ),
    ("resnet18", dict(layers=(1, 1, 1, 1), channels=(8, 12, 16, 24)), 32, "channels", 4),
    ("resnet50", dict(layers=(1, 1, 1, 1), channels=(8, 12, 16, 24)), 32, "channels", 8),
    ("seresnet50", dict(layers=(1, 1, 1, 1), channels=(8, 12, 16, 24)), 32, "channels", 8),
    ("resnetv2_50", dict(layers=(1, 1, 1, 1), channels=(8, 12, 16, 24)), 32, "channels", 0),
    ("efficientnet_lite0", {}, 32, "channels", 8),
    ("efficientnet_b0", {}, 32, "channels", 8),
    ("mobilenetv2_035", {}, 32, "channels", 8),
    ("mobilenetv3_small_050", {}, 32, "channels", 8),
    ("densenet121", dict(growth_rate=4, block_config=(2, 2, 2, 2)), 32, "channels", 8),
]  # fmt: skip


def build(name, arguments, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(name, **{"num_classes": 3, **arguments})
        with torch.no_grad():  # initial values such as zero would hide mistakes
            for p in model.parameters():
                p.add_(0.02 * torch.randn(p.shape))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    set_modes(model, False)
    return model


@pytest.mark.parametrize(
    ("name", "arguments", "side", "structure", "least"),
    FAMILIES,
    ids=[f"{case[0]}-{case[3]}" for case in FAMILIES],
)
def test_cut_equals_masked(name, arguments, side, structure, least):
    model = build(name, arguments)
    x = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    units = find(model, x, structure)
    assert len(units.groups) >= least, units.left_out
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    draw = torch.Generator().manual_seed(7)
    kept = [
        (g, torch.randperm(g.units, generator=draw)[: max(1, g.units // 3)].sort().values)
        for g in units.groups
    ]
    masked = copy.deepcopy(model).double()
    silence(masked, kept)
    smaller = copy.deepcopy(model).double()
    cut(smaller, kept)
    assert list(smaller.state_dict()) == list(before)
    with torch.no_grad():
        wanted, found = masked(x.double()), smaller(x.double())
    scale = wanted.abs().max()
    assert (found - wanted).abs().max() <= 1e-4 * scale
    if kept:
        count = [sum(p.numel() for p in m.parameters()) for m in (smaller, model)]
        assert count[0] < count[1]
    # Twice: what is left has units too.
    again = find(smaller.float(), x, structure)
    assert {g.name: g.units for g in again.groups if g.units > 1} == {
        g.name: len(keep) for g, keep in kept if len(keep) > 1
    }


class Odd(nn.Module):
    """Layers whose outputs are no units, each for another reason."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.after_grouped = nn.Conv2d(8, 8, 1)
        self.twice = nn.Conv2d(8, 8, 1)
        self.normal1 = nn.Conv2d(8, 12, 1)
        self.over = nn.GroupNorm(1, 12)
        self.normal2 = nn.Conv2d(12, 8, 1)
        self.good1 = nn.Conv2d(8, 10, 3, padding=1)
        self.good2 = nn.Conv2d(10, 8, 1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.after_grouped(torch.relu(self.grouped(torch.relu(self.stem(x)))))
        x = self.twice(torch.relu(self.twice(x)))
        x = x + self.normal2(torch.relu(self.over(self.normal1(x))))
        x = x + self.good2(torch.relu(self.good1(x)))
        return self.fc(x.mean(dim=(2, 3)))


def test_what_cannot_be_proven_is_listed():
    torch.manual_seed(0)
    units = find(Odd().eval(), torch.randn(2, 3, 8, 8), "channels")
    assert [g.name for g in units.groups] == ["good1"]
    assert "grouped" in units.left_out["stem"]
    assert "grouped" in units.left_out["grouped"]
    assert "2 times" in units.left_out["twice"]
    everything = {**units.left_out, **find(Odd(), torch.randn(2, 3, 8, 8), "mlp").left_out}
    assert "normalization" in everything["normal1"]


class Hidden(nn.Module):
    """A head with a hidden layer of its own, after the features."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 9), nn.Linear(9, 12)
        self.head1, self.head2 = nn.Linear(12, 8), nn.Linear(8, 2)

    def forward_features(self, x):
        x = x.flatten(1)
        return x + self.fc2(torch.relu(self.fc1(x)))

    def forward(self, x):
        return self.head2(torch.relu(self.head1(self.forward_features(x))))


def test_units_after_the_features_are_left():
    units = find(Hidden(), torch.randn(2, 3, 2, 2), "mlp")
    assert [group.name for group in units.groups] == ["fc1"]
    assert "features" in units.left_out["head1"]


class Sneaky(nn.Module):
    """A hidden layer whose softmax in plain arithmetic only a check of values finds."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = x.flatten(1)[:, :6]
        h = self.fc1(x).exp()
        return self.head(torch.relu(self.fc2(h / h.sum(dim=1, keepdim=True))))


def test_a_mixture_of_units_fails_the_check():
    units = find(Sneaky(), torch.randn(2, 3, 4, 4), "mlp")
    assert "not as with zeros" in units.left_out["fc1"]
    assert not any(g.name == "fc1" for g in units.groups)


def test_functional_activations_and_no_bias():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(12, 9, bias=False), nn.Linear(9, 12, bias=False)
            self.head = nn.Linear(12, 2)

        def forward(self, x):
            x = x.flatten(1)
            return self.head(x + self.fc2(torch.nn.functional.silu(self.fc1(x))))

    torch.manual_seed(0)
    model = Plain()
    x = torch.randn(40, 3, 2, 2)
    result = fastsal.prune_structure(model, [x], 0.5, multiple=1)
    assert result.widths == {"fc1": (9, 4)}
    assert model.fc1.out_features == model.fc2.in_features == 4
    assert model(x).shape == (40, 2)
