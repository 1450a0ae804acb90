"""The layer says which axis of its weight is its input."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from fastsal.errors import InvalidArgument
from fastsal.models.input_axis import Axes, known_axes, layer_axes


class InOut(nn.Module):
    """A linear map of another library, `x @ weight`."""

    def __init__(self, said=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.bias = nn.Parameter(torch.randn(4))
        if said is not None:
            self.input_axis = said

    def forward(self, x):
        return x @ self.weight + self.bias


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


LAYERS = {
    "linear": (nn.Linear(4, 6), {"weight": (6, 4, 1), "bias": (1, 6, 1)}),
    "conv2d": (nn.Conv2d(4, 6, 3, groups=2), {"weight": (6, 2, 9)}),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3), {"weight": (1, 4, 18)}),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, (3, 2)), {"weight": (1, 4, 36)}),
    "transposed 3d": (nn.ConvTranspose3d(4, 6, 2, bias=False), {"weight": (1, 4, 48)}),
    "transposed in groups": (nn.ConvTranspose2d(8, 6, 3, groups=2), {"weight": (2, 4, 27)}),
    "embedding": (nn.Embedding(10, 4), {"weight": (1, 10, 4)}),
    "attention": (
        nn.MultiheadAttention(4, 2),
        {"in_proj_weight": (12, 4, 1), "out_proj.weight": (4, 4, 1)},
    ),
    "attention of other sizes": (
        nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
        {"q_proj_weight": (4, 4, 1), "k_proj_weight": (4, 3, 1), "v_proj_weight": (4, 5, 1)},
    ),
    "recurrent": (nn.LSTM(3, 5), {"weight_ih_l0": (20, 3, 1), "weight_hh_l0": (20, 5, 1)}),
    "cell": (nn.GRUCell(3, 5), {"weight_ih": (15, 3, 1)}),
    "bilinear": (nn.Bilinear(3, 4, 5), {"weight": (5, 3, 4)}),
    "parametrized": (
        parametrizations.weight_norm(nn.ConvTranspose2d(4, 6, 3)),
        {"parametrizations.weight.original1": (1, 4, 54)},
    ),
    "pruned by torch": (
        prune.identity(nn.ConvTranspose2d(4, 6, 3), "weight"),
        {"weight_orig": (1, 4, 54)},
    ),
    "said": (InOut(0), {"weight": (1, 6, 4), "bias": (1, 4, 1)}),
    "said for one": (InOut({"weight": 0}), {"weight": (1, 6, 4)}),
}


@pytest.mark.parametrize("case", LAYERS)
def test_axes_of_layers(case):
    model, expected = LAYERS[case]
    found = known_axes(model, shapes(model))
    assert {name: found[name] for name in expected} == {n: Axes(*a) for n, a in expected.items()}


def test_a_tied_table_has_the_axes_of_the_linear_map():
    model = nn.ModuleDict({"table": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["table"].weight
    assert layer_axes(model, {"table.weight": (10, 4)}) == {"table.weight": Axes(10, 4, 1)}


def test_a_layer_that_does_not_say_it_is_refused():
    model = nn.Sequential(InOut(), nn.LayerNorm([3, 3]))
    assert list(known_axes(model, shapes(model))) == ["0.bias"]
    message = (
        r"^pattern: the input axis of '0.weight' is unknown, as InOut is not a layer .*"
        r"set input_axis .*parameters='!0.weight'$"
    )
    with pytest.raises(InvalidArgument, match=message):
        layer_axes(model, shapes(model))
    with pytest.raises(InvalidArgument, match="input_axis must be"):
        layer_axes(InOut(2), {"weight": (6, 4)})


def test_a_module_without_forward_has_no_other_axis():
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(6, 4))
    model.more = nn.ParameterList([nn.Parameter(torch.randn(2, 3, 4))])
    expected = {"w": Axes(6, 4, 1), "more.0": Axes(2, 3, 4)}
    assert layer_axes(model, {"w": (6, 4), "more.0": (2, 3, 4)}) == expected
