"""Shares of ranks: every weight once, even, between units, in parts that are not too long."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsal.fisher.memory_plan import Share
from fastsal.fisher.parts import Part, block_unit, cut, packed_bytes, row_unit, uncut
from fastsal.fisher.shares import regrouped, shares

SHAPES = st.lists(
    st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6
).map(lambda shapes: {f"w{i}": shape for i, shape in enumerate(shapes)})


def in_bytes(block_size):
    return lambda part: packed_bytes(part, block_size, 4)


def check_complete(found, shapes, unit):
    """Parts cover every weight once and are cut between units."""
    seen = dict.fromkeys(shapes, 0)
    for part in sorted((p for share in found for p in share), key=lambda p: p.start):
        assert part.start == seen[part.name]
        assert part.start % unit(part) == 0
        # A rest of less than a unit goes with the part before it.
        assert len(part) >= unit(part)
        seen[part.name] = part.stop
    assert seen == {name: math.prod(shape) for name, shape in shapes.items()}


@given(SHAPES, st.sampled_from([1, 3, 16, 64, None]), st.integers(1, 9), st.booleans(), st.data())
def test_every_weight_has_one_owner(shapes, block_size, ranks, by_rows, data):
    unit = row_unit(shapes, block_size) if by_rows else block_unit(block_size)
    most = data.draw(st.none() | st.integers(1, 3000))
    found = shares(uncut(shapes), block_size, ranks, unit=unit, most=most)
    assert len(found) == ranks
    check_complete(found, shapes, unit)
    for part in (p for share in found for p in share):
        assert most is None or len(part) < most + 2 * unit(part)


@given(SHAPES, st.sampled_from([1, 16, 64]), st.integers(1, 5), st.integers(20_000, 200_000))
def test_groups_are_shared_out_one_by_one(shapes, block_size, ranks, room):
    unit = row_unit(shapes, block_size)
    groups = cut(shapes, block_size, in_bytes(block_size), room, unit=unit)
    if groups is None:
        return
    by_group = [shares(group, block_size, ranks, unit=unit) for group in groups]
    check_complete([p for group in by_group for p in group], shapes, unit)


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("most", [None, 2048])
def test_shares_are_even(ranks, most):
    shapes = {"a": (64, 3, 7, 7), "b": (512, 256), "c": (256,), "d": (1000, 512)}
    found = shares(uncut(shapes), 64, ranks, most=most)
    cost = in_bytes(64)
    sizes = [sum(map(cost, share)) for share in found]
    assert max(sizes) - min(sizes) <= 3 * cost(Part("b", 0, 64, 512 * 256))
    # The same boundaries, however finely shares are cut.
    assert [sum(map(len, s)) for s in found] == [
        sum(map(len, s)) for s in shares(uncut(shapes), 64, ranks)
    ]


@given(SHAPES, st.integers(1, 4), st.integers(1, 4000))
def test_groups_of_shares_keep_owners_and_fit(shapes, ranks, room):
    found = shares(uncut(shapes), 16, ranks, most=200)
    groups = regrouped(found, len, room)
    for rank in range(ranks):
        assert [p for group in groups for p in group[rank]] == found[rank]
        for group in groups:
            assert sum(map(len, group[rank])) <= room or len(group[rank]) == 1


def test_rows_of_patterns_stay_together():
    unit = row_unit({"conv": (64, 64, 3, 3), "stem": (64, 3, 7, 7), "bias": (64,)}, 64)
    assert unit(Part("conv", 0, 36864, 36864)) == 576
    assert unit(Part("stem", 0, 9408, 9408)) == math.lcm(147, 64)
    assert unit(Part("bias", 0, 64, 64)) == 64


@given(SHAPES, st.sampled_from([1, 16, 64, None]), st.integers(2, 9))
def test_what_a_rank_takes_is_not_planned_too_small(shapes, block_size, ranks):
    share, cost = Share(ranks), in_bytes(block_size)
    planned = sum(share.of(cost(part), part, block_size) for part in uncut(shapes))
    for owned in shares(uncut(shapes), block_size, ranks):
        # But for a unit, by which shares differ.
        largest = max(
            cost(Part(p.name, 0, block_unit(block_size)(p), p.size)) for p in uncut(shapes)
        )
        assert sum(map(cost, owned)) <= planned + 2 * largest


def test_one_process_takes_everything():
    part = Part("a", 0, 1000, 1000)
    assert Share().of(4321, part, 64) == 4321
    assert Share().longest(8, 64, None) is None
    assert Share().sent(2**30) == 0


def test_little_is_on_its_way_at_a_time():
    for ranks, micro_batch, budget in [(2, 8, None), (64, 8, None), (64, 8, 2**30)]:
        share = Share(ranks)
        rows_of_part = 4 * ranks * micro_batch * share.longest(micro_batch, 64, budget)
        assert 3 * rows_of_part <= share.sent(budget) <= 3 * 2**27
    assert Share(64).longest(8, 64, 2**30) < Share(64).longest(8, 64, None)
