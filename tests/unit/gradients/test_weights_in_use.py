"""Zeros of a parameter are told from zeros of the weight that its layer uses."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d, StdConv2d
from timm.models.resnetv2 import ResNetV2
from torch import nn
from torch.nn.utils import parametrizations

import fastsal
from fastsal.gradients.weights_in_use import indirect, warn_if_computed, zeros_in_use
from fastsal.pruning.masks.masks import Masks


class Computed(nn.Linear):
    """A linear map whose weight is a function of the parameter."""

    def __init__(self, function, product=F.linear):
        super().__init__(12, 6)
        self.function, self.product = function, product
        self.more = nn.Parameter(torch.randn(6, 12))

    def forward(self, x):
        return self.product(x, self.function(self.weight, self.more)) + self.bias


def centered(w, more):
    return w - w.mean(1, keepdim=True)


class Halves(torch.autograd.Function):
    """A fake quantization: unseen by interception, and zeros remain."""

    @staticmethod
    def forward(ctx, w):
        return (2 * w).round() / 2

    @staticmethod
    def backward(ctx, grad):
        return grad


LOST = {
    "StdConv2d": StdConv2d(3, 4, 2),
    "ScaledStdConv2d": ScaledStdConv2d(3, 4, 2),
    "linear": Computed(centered),
    "product": Computed(centered, lambda x, w: x @ w.T),
    "operator": Computed(centered, lambda x, w: torch.einsum("ni,oi->no", x, w)),
    "keyword": Computed(centered, lambda x, w: F.linear(input=x, weight=w)),
    "low rank": Computed(lambda w, more: w + more),
}
KEPT = {
    "conv": nn.Conv2d(3, 4, 2),
    "subclass": timm.layers.Linear(12, 6),
    "scaled": Computed(lambda w, more: 3 * w / w.norm()),
    "turned": Computed(lambda w, more: w.T.contiguous(), lambda x, w: x @ w),
    "part": Computed(lambda w, more: w[:3], lambda x, w: F.linear(x, w).repeat(1, 2)),
    "quantized": Computed(lambda w, more: Halves.apply(w)),
    "spectral": parametrizations.spectral_norm(nn.Linear(12, 6)),
    "data": Computed(
        lambda w, more: w,
        lambda x, w: F.linear((x[:, :, None] @ (x[:, None] @ x[:, :, None]))[..., 0], w),
    ),
}


def net(layer):
    is_conv = isinstance(layer, nn.Conv2d)
    return nn.Sequential(*(() if is_conv else (nn.Flatten(),)), layer, nn.Flatten())


def name_of(layer):
    return next(n for n, p in net(layer).named_parameters() if p.dim() > 1 and "more" not in n)


def images(n=4):
    return torch.randn(n, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def sparse(layer):
    """A model with seven tenths of the layer's parameter pruned, and the mask."""
    model, name = net(layer), name_of(layer)
    parameter = dict(model.named_parameters())[name]
    generator = torch.Generator().manual_seed(1)
    masks = Masks({name: torch.rand(parameter.shape, generator=generator) > 0.7})
    masks.apply(model)
    return model, masks


@pytest.mark.parametrize("case", LOST)
def test_zeros_that_are_lost(case):
    model, masks = sparse(LOST[case])
    found = masks.in_use(model, images())
    assert found.sparsity < 0.3 < 0.6 < masks.sparsity
    assert list(found.computed) == list(masks)
    with pytest.warns(
        UserWarning, match=rf"^weights in use: sparsity 0\.[0-2].*{next(iter(masks))}.*masks"
    ):
        masks.verify(model, images())  # fmt: skip
    masks.check(model)


@pytest.mark.parametrize("case", KEPT)
def test_zeros_that_are_kept(case):
    model, masks = sparse(KEPT[case])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        masks.verify(model, images())
        fastsal.collect(model, [(images(), torch.arange(4))], parameters=list(masks))
    assert not [w for w in seen if "in use" in str(w.message)]
    found = masks.in_use(model, images())
    assert found.sparsity == pytest.approx(masks.sparsity)
    assert found.computed == {}


def test_the_count_is_that_of_the_weight_in_use():
    model, masks = sparse(StdConv2d(3, 4, 2))
    layer = model[0]
    used = F.batch_norm(layer.weight.reshape(1, 4, -1), None, None, training=True, eps=layer.eps)
    expected = float((used == 0).float().mean())
    assert masks.in_use(model, images()).computed == {"0.weight": expected}


@pytest.mark.parametrize("case", LOST)
def test_collect_warns_once_before_anything_is_pruned(case):
    model = net(LOST[case])
    with pytest.warns(UserWarning, match="zeros of the weight in use") as seen:
        fastsal.collect(model, [(images(), torch.arange(4))], parameters=name_of(LOST[case]))
    seen = [str(w.message) for w in seen if "zeros of the weight in use" in str(w.message)]
    assert len(seen) == 1
    assert "effective_sparsity" in seen[0]


def test_prune_of_a_network_with_standardized_weights():
    model = ResNetV2([1, 1], [128, 128], num_classes=5, stem_chs=32, stem_type="fixed").eval()
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(2, 3, 64, 64, generator=generator), torch.arange(2)
    with pytest.warns(UserWarning, match="is computed from its parameter") as seen:
        result = fastsal.prune(model, [batch], 0.7, rounds=2, criterion="taylor", compensate=False)
    assert len(seen) == 1
    assert result.masks.sparsity == pytest.approx(0.7, abs=1e-4)
    assert result.effective_sparsity == result.in_use.sparsity < 0.2
    layers = [n for n, m in model.named_modules() if type(m).__name__ == "StdConv2d"]
    assert set(result.in_use.computed) == {f"{name}.weight" for name in layers}


def test_nothing_runs_where_layers_of_pytorch_use_their_parameters():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MultiheadAttention(4, 1), nn.Linear(4, 4))
    model.forward = None  # it cannot run
    names = [name for name, _ in model.named_parameters()]
    assert indirect(model, names) == []
    assert zeros_in_use(model, dict(model.named_parameters())) == {}


def test_a_model_that_does_not_run_on_made_up_images():
    model, masks = sparse(Computed(centered))
    assert masks.in_use(model) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks.verify(model)


class Keeping(nn.Module):
    """Keeps a value of its weights in evaluation mode, as the attention of timm's LeViT does."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 4))
        self.bias_cache = {}

    def forward(self, x):
        if "sum" not in self.bias_cache:
            self.bias_cache["sum"] = self.table.sum()
        return x.mean((1, 2, 3)) + self.bias_cache["sum"]


def test_values_of_replaced_weights_are_not_kept():
    model, x = Keeping().eval(), torch.zeros(2, 3, 4, 4)
    expected = model.table.sum().detach()
    warn_if_computed(model, ["table"], lambda: x)
    assert torch.equal(model(x), expected.expand(2))
    model.bias_cache["sum"] = torch.zeros(())  # the pass does not use what is there either
    warn_if_computed(model, ["table"], lambda: x)
    assert torch.equal(model(x), expected.expand(2))
