"""Ranks that iterate over other images than the others are noticed."""

from __future__ import annotations

import pytest
import torch

from fastsal.data.batches import Source
from fastsal.distributed.collecting import _check_images
from fastsal.errors import DataError


class Two:
    """This rank and another one, which has seen something else or the same."""

    def __init__(self, other):
        self.other = other

    def all_gather(self, value):
        return [value, self.other]


def seen(order):
    x, y = torch.arange(20.0)[:, None], torch.arange(20)
    source = Source([(x[order], y[order])], None)
    assert sum(len(images) for images, _ in source) == 20
    return source


def test_another_order_on_another_rank_is_refused():
    """Only the number of samples was compared."""
    straight, reverse = torch.arange(20), torch.arange(20).flip(0)
    mine = seen(straight)
    _check_images(Two(seen(straight).seen.value()), mine)
    with pytest.raises(DataError, match="batches must be the same on every rank, got other"):
        _check_images(Two(seen(reverse).seen.value()), mine)
