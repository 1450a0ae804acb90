"""Numeric arguments: which types are accepted, and the messages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastsal.errors import InvalidArgument
from fastsal.utils.numbers import as_integer, as_real, real, whole


@pytest.mark.parametrize(
    "value",
    [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.int16)],
)
def test_whole_takes_integer_scalars(value):
    found = whole("epochs", value, 1)
    assert found == 3
    assert type(found) is int
    assert real("lr", value) == 3.0
    assert type(real("lr", value)) is float


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5)])
def test_real_takes_real_scalars(value):
    found = real("lr", value, above=0)
    assert found == 0.5
    assert type(found) is float
    assert as_integer(value) is None


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.bool_(True),
        torch.tensor(True),
        np.array([3]),
        torch.tensor([3]),
        "3",
        b"3",
        None,
        [3],
        1j,
    ],
)
def test_neither_takes_anything_else(value):
    assert as_integer(value) is None
    assert as_real(value) is None
    with pytest.raises(InvalidArgument, match="epochs must be an integer, got"):
        whole("epochs", value)
    with pytest.raises(InvalidArgument, match="lr must be a number, got"):
        real("lr", value)


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("inf"), torch.tensor(math.nan)])
def test_as_real_is_finite(value):
    assert as_real(value) is None


def test_whole_rejects_floats_without_a_fraction():
    with pytest.raises(InvalidArgument, match=r"epochs must be an integer, got 3\.0"):
        whole("epochs", 3.0)


@pytest.mark.parametrize(
    ("value", "least", "most", "message"),
    [
        (0, 1, None, "n must be at least 1, got 0"),
        (np.int64(0), 1, None, "n must be at least 1, got 0"),
        (torch.tensor(6), 1, 5, "n must be in [1, 5], got 6"),
        (-1, 0, 5, "n must be in [0, 5], got -1"),
    ],
)
def test_whole_names_the_range(value, least, most, message):
    with pytest.raises(InvalidArgument) as error:
        whole("n", value, least, most)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (1.2, {"least": 0, "most": 1}, "s must be in [0, 1], got 1.2"),
        (0.0, {"above": 0, "most": 1}, "s must be in (0, 1], got 0.0"),
        (1.0, {"least": 0, "below": 1}, "s must be in [0, 1), got 1.0"),
        (0, {"above": 0}, "s must be positive, got 0"),
        (1, {"above": 2.5}, "s must be greater than 2.5, got 1"),
        (-1, {"least": 0}, "s must be at least 0, got -1"),
        (3, {"most": 2}, "s must be at most 2, got 3"),
        (3, {"below": 3}, "s must be less than 3, got 3"),
        (math.nan, {}, "s must be finite, got nan"),
        (math.inf, {"above": 0}, "s must be positive, got inf"),
        (math.nan, {"least": 0, "most": 1}, "s must be in [0, 1], got nan"),
    ],
)
def test_real_names_the_range(value, bounds, message):
    with pytest.raises(InvalidArgument) as error:
        real("s", value, **bounds)
    assert str(error.value) == message
