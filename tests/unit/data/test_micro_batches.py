"""Micro-batches: the images in order, whatever batches they come in, each copied once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastsal.data.batches import in_micro_batches
from fastsal.distributed.exchange import StepSums


class Copied(TorchDispatchMode):
    """Counts the numbers that concatenations copy."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default:
            self.numbers += found.numel()
        return found


@pytest.mark.parametrize("size", [8, 64])
def test_single_images_are_copied_once(size):
    """Joined one by one, the 64th would be the 64th copy of the first."""
    pairs = [(torch.full((1, 5), float(n)), torch.tensor([n])) for n in range(128)]
    with Copied() as copied:
        found = list(in_micro_batches(pairs, size, size))
    assert torch.equal(torch.cat([y for _, y in found]), torch.arange(128))
    assert copied.numbers == 128 * (5 + 1)


class Added:
    """Stands for the sums."""

    def __init__(self):
        self.rows_seen, self.rows = 0, []

    def add(self, key, rows, expected):
        self.rows.append(rows.clone())

    def count(self, n):
        self.rows_seen += n


def test_rows_of_single_images_are_copied_once():
    added = Added()
    sums = StepSums(added, 32, None)
    with Copied() as copied:
        for n in range(70):
            sums.add("w", torch.full((1, 5), float(n)))
            sums.end_micro_batch(1)
        sums.flush()
    assert [len(rows) for rows in added.rows] == [32, 32, 6]
    assert torch.equal(torch.cat(added.rows)[:, 0], torch.arange(70.0))
    assert copied.numbers == 70 * 5


def slow(pairs, size, step):
    """One image at a time."""
    total, group = 0, []
    for images, labels in pairs:
        for n in range(len(images)):
            one = images[n : n + 1], None if labels is None else labels[n : n + 1]
            alike = not group or (
                group[0][0].shape == one[0].shape
                and group[0][0].dtype == one[0].dtype
                and (group[0][1] is None) == (one[1] is None)
            )
            if group and (len(group) == min(size, step - total % step) or not alike):
                yield group
                total, group = total + len(group), []
            group.append(one)
    if group:
        yield group


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.booleans()), max_size=8),
    st.integers(1, 6),
    st.integers(0, 9),
)
def test_micro_batches_equal_one_image_at_a_time(batches, size, more):
    pairs, start = [], 0
    for n, is_wide, has_labels in batches:
        x = torch.arange(start, start + n).float()[:, None].expand(n, 2 + is_wide)
        pairs.append((x, torch.arange(start, start + n) if has_labels else None))
        start += n
    found = list(in_micro_batches(pairs, size, size + more))
    expected = list(slow(pairs, size, size + more))
    assert [len(x) for x, _ in found] == [len(group) for group in expected]
    for (x, y), group in zip(found, expected, strict=True):
        assert torch.equal(x, torch.cat([image for image, _ in group]))
        assert (y is None) == (group[0][1] is None)
        if y is not None:
            assert torch.equal(y, torch.cat([label for _, label in group]))
