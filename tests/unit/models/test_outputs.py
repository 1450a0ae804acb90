from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fastsal.errors import InvalidArgument, UnsupportedLayer
from fastsal.models.features import features
from fastsal.models.outputs import described, output_tensor, tensors_within, with_tensors

LOGITS, OTHER = torch.ones(2, 3), torch.zeros(2, 5)
Pair = namedtuple("Pair", ["aux", "logits"])
Plain = namedtuple("Plain", ["first", "second"])


@dataclass
class Output(OrderedDict):
    """Of the shape of ModelOutput of Transformers: a dict and a dataclass."""

    loss: Tensor | None = None
    logits: Tensor | None = None

    def __post_init__(self):
        super().__init__({k: v for k, v in vars(self).items() if v is not None})


@dataclass(frozen=True)
class Fields:
    logits: Tensor
    hidden: Tensor


@pytest.mark.parametrize(
    "found",
    [
        LOGITS,
        {"logits": LOGITS},
        {"hidden": OTHER, "logits": LOGITS},
        {"pred": LOGITS, "aux": OTHER},
        {"aux": OTHER, "out": LOGITS},
        {"scores of mine": LOGITS},
        (LOGITS, OTHER),
        [LOGITS, OTHER],
        ("text", LOGITS, OTHER),
        Pair(OTHER, LOGITS),
        Plain(LOGITS, OTHER),
        Output(logits=LOGITS),
        Output(loss=OTHER, logits=LOGITS),
        Fields(LOGITS, OTHER),
    ],
    ids=str,
)
def test_the_tensor_of_an_output(found):
    assert output_tensor(found) is LOGITS


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": LOGITS, "b": OTHER}, r"got dict with a: tensor \[2, 3\], b: tensor \[2, 5\]"),
        ({"a": "text"}, "got dict with a: str"),
        ({}, "got dict"),
        ((), "got tuple of length 0"),
        (("text", 1), "got tuple of length 2: str, int"),
        ("text", "got str"),
        (None, "got NoneType"),
        ({"logits": [LOGITS, OTHER], "a": 1}, "got dict with logits: list of length 2, a: int"),
    ],
)
def test_an_output_without_one_tensor_is_described(found, message):
    with pytest.raises(InvalidArgument, match=f"model must return logits .*{message}; pass"):
        output_tensor(found)


def test_long_outputs_are_shortened():
    assert described({f"k{i}": LOGITS for i in range(20)}).endswith("k7: tensor [2, 3] and 12 more")
    assert len(described({"x" * 1000: 1})) < 80


@pytest.mark.parametrize(
    "found",
    [
        LOGITS,
        {"logits": LOGITS, "n": 3},
        OrderedDict(a=LOGITS),
        (LOGITS, "text"),
        [LOGITS, (OTHER,)],
        Pair(OTHER, LOGITS),
        Output(logits=LOGITS),
        Fields(LOGITS, OTHER),
        SimpleNamespace(logits=LOGITS, name="text"),
    ],
    ids=str,
)
def test_outputs_are_rebuilt_with_their_types(found):
    assert with_tensors(found, lambda x: x) is found
    changed = with_tensors(found, torch.Tensor.double)
    assert type(changed) is type(found)
    assert output_tensor(changed).dtype is torch.float64
    assert output_tensor(found).dtype is torch.float32
    assert described(changed) == described(found)


class Backbone(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.fc, self.form = nn.Linear(4, 6), form

    def forward_features(self, x):
        return self.form(self.fc(x))


@pytest.mark.parametrize(
    "form",
    [
        lambda f: {"x_norm_clstoken": f, "x_norm_patchtokens": f[:, None] * 2},
        lambda f: {"last_hidden_state": f[:, None] * 2, "pooler_output": f},
        lambda f: (f, f * 2),
        lambda f: {"features": f},
    ],
)
def test_features_in_a_dict_or_a_tuple(form):
    model, x = Backbone(form), torch.randn(3, 4)
    assert torch.equal(features(model, x), model.fc(x))


def test_features_that_are_no_tensor_are_described():
    model = Backbone(lambda f: {"a": f, "b": f})
    with pytest.raises(
        UnsupportedLayer, match=r"features of Backbone must be .*dict with a: tensor"
    ):
        features(model, torch.randn(3, 4))


def test_every_tensor_of_an_output_is_found():
    owner = SimpleNamespace(features=OTHER, layer=nn.Linear(2, 2))
    owner.itself = owner  # an object may refer to itself
    found = {"a": [LOGITS, (owner,)], "b": Fields(LOGITS, LOGITS + 1), "none": None}
    tensors = list(tensors_within(found))
    assert [id(t) for t in tensors[:2]] == [id(LOGITS), id(OTHER)]
    assert len(tensors) == 3
    assert bool((tensors[2] == 2).all())
    assert list(tensors_within(LOGITS)) == [LOGITS]
