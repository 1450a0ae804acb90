"""A model in parts: cut between blocks, complete, and within the room that there is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsal.fisher.parts import Part, by_key, cut, packed_bytes, slices, uncut

SHAPES = st.lists(
    st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple), min_size=1, max_size=6
)


def in_bytes(block_size):
    return lambda part: packed_bytes(part, block_size, 4)


@given(SHAPES, st.sampled_from([1, 3, 16, 64, None]), st.integers(1, 200_000))
def test_groups_hold_every_weight_once_and_fit(shapes, block_size, room):
    named = {f"w{i}": shape for i, shape in enumerate(shapes)}
    cost = in_bytes(block_size)
    groups = cut(named, block_size, cost, room)
    least = max(
        cost(Part(name, 0, min(block_size or math.prod(s), math.prod(s)), math.prod(s)))
        for name, s in named.items()
    )
    if least > room:
        assert groups is None
        return
    parts = [part for group in groups for part in group]
    seen = dict.fromkeys(named, 0)
    for part in parts:
        assert part.start == seen[part.name]
        seen[part.name] = part.stop
        if block_size is not None:
            assert part.start % block_size == 0
    assert seen == {name: math.prod(shape) for name, shape in named.items()}
    for group in groups:
        # A rest of less than a block goes with the part before it.
        assert sum(map(cost, group)) <= room + len(group) * least
        assert len(by_key(group)) == len(group)


def test_groups_are_even():
    groups = cut({f"w{i}": (64, 64) for i in range(9)}, 64, len, 4 * 64 * 64)
    assert [sum(map(len, g)) // 4096 for g in groups] == [3, 3, 3]


def test_a_parameter_stays_whole_where_it_fits():
    assert cut({"a": (64,), "b": (128,)}, 64, len, 128) == [
        [Part("a", 0, 64, 64)],
        [Part("b", 0, 128, 128)],
    ]
    assert cut({"b": (130,)}, 64, len, 100) == [[Part("b", 0, 64, 130)], [Part("b", 64, 130, 130)]]


def test_slices():
    tensors = {"a": torch.arange(6).reshape(2, 3), "c": torch.ones(2)}
    parts = by_key([*uncut({"a": (2, 3)}), Part("a", 2, 4, 6), Part("b", 0, 1, 1)])
    found = slices(tensors, parts)
    assert list(found) == ["a", "a[2:4]"]
    assert found["a"].shape == (2, 3)
    assert found["a[2:4]"].tolist() == [2, 3]


@pytest.mark.parametrize("room", [0, 1])
def test_nothing_fits(room):
    assert cut({"a": (64,)}, 64, in_bytes(64), room) is None
