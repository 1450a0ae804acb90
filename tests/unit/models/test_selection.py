from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from fastsal.errors import InvalidArgument, UnknownParameter
from fastsal.gradients import select_parameters


def net():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 2), nn.Flatten(),
        nn.Linear(8, 5), nn.LayerNorm(5), nn.Linear(5, 2),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (None, ["0.weight", "4.weight", "6.weight"]),
        ("4.weight", ["4.weight"]),
        (["6.weight", "0.weight"], ["0.weight", "6.weight"]),
        ("*", ["0.weight", "4.weight", "6.weight"]),
        ("[46].*", ["4.weight", "6.weight"]),
        (["*", "!6.*"], ["0.weight", "4.weight"]),
        ("!0.*", ["4.weight", "6.weight"]),
        ("2.*", ["2.weight", "2.bias"]),
        ("4.bias", ["4.bias"]),
    ],
)
def test_names_and_patterns(parameters, expected):
    model = net()
    selected = select_parameters(model, parameters)
    assert list(selected) == expected
    owned = dict(model.named_parameters())
    assert all(selected[name] is owned[name] for name in selected)


def test_unknown_name_suggests_close_ones():
    with pytest.raises(UnknownParameter, match=r"parameters: '4\.weigth'.*4\.weight"):
        select_parameters(net(), "4.weigth")
    with pytest.raises(KeyError):
        select_parameters(net(), ["!nothing.*"])


def test_nothing_left():
    with pytest.raises(InvalidArgument, match="must select at least one parameter"):
        select_parameters(net(), ["4.weight", "!4.*"])
    with pytest.raises(InvalidArgument, match="no weight"):
        select_parameters(nn.LayerNorm(3))
    with pytest.raises(InvalidArgument, match="int"):
        select_parameters(net(), [3])


def test_attention_projections_are_in_the_default():
    model = nn.MultiheadAttention(4, 2)
    assert list(select_parameters(model)) == ["in_proj_weight", "out_proj.weight"]
    assert list(select_parameters(model, "!in_proj_weight")) == ["out_proj.weight"]
    assert list(select_parameters(model, "*in_proj_weight")) == ["in_proj_weight"]


def test_shared_parameter_has_one_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert list(select_parameters(model)) == ["0.weight"]
    assert list(select_parameters(model, "1.weight")) == ["0.weight"]


def test_parametrized_weight_is_reported():
    model = nn.Sequential(nn.Linear(3, 3), weight_norm(nn.Linear(3, 3)))
    with pytest.warns(UserWarning, match="'1'"):
        assert list(select_parameters(model)) == ["0.weight"]


def test_lazy_parameter():
    with pytest.raises(InvalidArgument, match="lazy"):
        select_parameters(nn.Sequential(nn.LazyLinear(3)))


def test_complex_parameter():
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(InvalidArgument, match="complex64"):
        select_parameters(model)
