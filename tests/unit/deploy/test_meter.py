"""Sizes are those counted by hand; the words about speed follow from the ratios."""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import nn

import fastsal
from fastsal.deploy.sizes import model_size
from fastsal.deploy.timing import Timing, time_pair
from fastsal.errors import DataError, InvalidArgument

pytestmark = pytest.mark.usefixtures("one_thread")


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, groups=4, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def test_sizes_by_hand():
    model = net()
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[5].weight[0, 0] = 0
    size = model_size(model, torch.randn(2, 3, 8, 8), has_values=True)
    assert size.parameters == 4 * 27 + 8 + 36 + 4 + 20 + 5
    assert size.nonzeros == size.parameters - 2 * 27 - 1 - 4  # biases of batch normalization
    assert size.macs == 16 * 4 * 27 + 16 * 36 + 20
    assert size.nonzero_macs == 16 * 2 * 27 + 16 * 36 + 19
    state = model.state_dict()
    assert size.dense_bytes == sum(t.nbytes for t in state.values())
    raw = b"".join(t.numpy().tobytes() for t in state.values())
    assert size.zipped_bytes == len(zlib.compress(raw, 6))
    assert size.packed_bytes < size.dense_bytes


@pytest.mark.parametrize(
    ("ratios", "words"),
    [((1.5, 1.4, 1.6), "1.50 times as fast"), ((1.01, 0.95, 1.1), "no faster here"),
     ((0.8, 0.7, 0.9), "slower here"), ((1.7, 0.9, 2.2), "not measurable here")],
)  # fmt: skip
def test_words(ratios, words):
    timing = Timing(1, (1, 1, 1), (1, 1, 1), ratios, 7)
    assert timing.verdict.startswith(words)
    assert timing.is_faster == (ratios[1] > 1)
    assert timing.as_dict()["verdict"] == timing.verdict


def test_calls_alternate():
    calls = []
    timing = time_pair(lambda: calls.append("d"), lambda: calls.append("p"), 3, seconds=0, least=4)
    assert "".join(calls) == "dpdp" + "pd" + "dp" + "pd" + "dp"
    assert timing.rounds == 4
    assert timing.batch == 3


def test_a_masked_model_is_said_to_be_as_it_is():
    dense, pruned = net(), net()
    with torch.no_grad():
        pruned[0].weight[:2] = 0
    found = fastsal.measure_against(
        dense, pruned, torch.randn(2, 3, 8, 8), batches=[3], seconds=0.01
    )
    assert "58 of 181 parameters are zero, and PyTorch computes with them" in found.zeros
    assert found.timings[0].batch == 3
    assert found.machine["threads"] == 1
    assert found.as_dict()["pruned"]["nonzeros"] == 123
    # The original of a run is built with random values.
    assert found.dense.nonzeros is None
    assert found.dense.nonzero_macs is None


def test_arguments():
    with pytest.raises(InvalidArgument, match="runtime must be"):
        fastsal.measure_against(net(), net(), runtime="tensorrt")
    with pytest.raises(InvalidArgument, match="batches must be"):
        fastsal.measure_against(net(), net(), batches=[0])
    with pytest.raises(InvalidArgument, match="batches must have"):
        fastsal.measure_against(net(), net(), batches=[])
    with pytest.raises(InvalidArgument, match="batches must be numbers of images, got 4"):
        fastsal.measure_against(net(), net(), batches=4)
    with pytest.raises(InvalidArgument, match="seconds must be"):
        fastsal.measure_against(net(), net(), seconds=0)
    with pytest.raises(DataError, match="images must contain at least one"):
        fastsal.measure_against(net(), net(), torch.zeros(0, 3, 8, 8))
    with pytest.raises(DataError, match="images must be a tensor"):
        fastsal.measure_against(net(), net(), [1])


def test_files_of_models_of_two_types():
    pytest.importorskip("openvino", reason="needs the extra 'openvino'")
    found = fastsal.measure_against(
        net().eval(), net().eval().half(), torch.randn(2, 3, 8, 8), batches=[1], seconds=0.01,
        runtime="openvino",
    )  # fmt: skip
    assert found.pruned.dense_bytes < found.dense.dense_bytes
