"""Sums on the device of the model notice squares that overflow."""

from __future__ import annotations

import pytest
import torch

from fastsal.errors import GradientOverflow, NonFiniteGradient
from fastsal.fisher.model_sums import ModelSums
from fastsal.fisher.sinks.tiles import DeviceTiles


@pytest.fixture
def sums():
    return ModelSums.empty({"w": (5, 7)}, 8, "float32")


def tiles(sums):
    return DeviceTiles(sums, torch.device("cpu"))


@pytest.mark.parametrize("value", [1e20, -1e20])
def test_a_square_that_overflows_is_named(sums, value):
    sink, rows = tiles(sums), torch.randn(4, 5, 7)
    sink("w", rows)
    sink.end_micro_batch(4)
    rows[2, 4, 6] = value
    sink("w", rows)
    message = r"gradient of 1e\+20 for 'w', in one of the samples 4 to 7; scale the loss"
    with pytest.raises(GradientOverflow, match=message):
        sink.end_micro_batch(4)
    assert sums.parameters["w"].is_empty


def test_large_gradients_that_do_not_overflow_are_summed(sums):
    sink, rows = tiles(sums), torch.randn(4, 5, 7)
    rows[2, 4, 6] = 1e18
    sink("w", rows)
    sink.end_micro_batch(4)
    sink.flush()
    found = sums.parameters["w"].packed
    assert found.max() == pytest.approx(1e36)
    # The sums in main memory cannot take many times as much.
    for value in (1.8e19, 1.8e19):
        sink = tiles(sums)
        sink("w", torch.full((1, 5, 7), value))
        sink.end_micro_batch(1)
        if found.max() < 1e38:
            sink.flush()
            continue
        before = found.copy()
        with pytest.raises(GradientOverflow, match="those of 'w' would overflow"):
            sink.flush()
        assert (before == found).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(sums, value):
    sink, rows = tiles(sums), torch.randn(4, 5, 7)
    rows[0, 0, 0] = value
    sink("w", rows)
    with pytest.raises(NonFiniteGradient, match="got NaN or infinity for 'w'") as error:
        sink.end_micro_batch(4)
    assert not isinstance(error.value, GradientOverflow)
