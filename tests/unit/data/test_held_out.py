"""Held-out samples: which ones, how many, and what is kept of them."""

from __future__ import annotations

import pytest
import torch

from fastsal.data.held_out import HeldOutSamples, require_some
from fastsal.errors import DataError, InvalidArgument


class Numbers:
    """A source of images that are their own places; counts its passes."""

    def __init__(self, n, size=None, labels=None):
        self.x = torch.arange(n, dtype=torch.float64)[:, None]
        self.y = torch.arange(n) % 10 if labels is None else labels
        self.size, self.passes = size or max(7, n // 100 - 1), 0

    def __call__(self):
        self.passes += 1
        for start in range(0, len(self.x), self.size):
            some = slice(start, start + self.size)
            yield self.x[some], self.y[some]


def places(pairs):
    return [int(place) for images, _ in pairs for place in images[:, 0].tolist()]


@pytest.mark.parametrize("n", [1, 7, 8, 9, 63, 64, 1000, 8191, 8200, 20_000])
def test_every_sample_is_held_out_or_not(n):
    held = HeldOutSamples(Numbers(n), 8, most=1024)
    others = places(held.others)
    found = places(held)
    assert sorted(others + found) == list(range(n))
    assert found == sorted(found)
    assert len(found) == held.samples <= 1024
    assert abs(len(found) - n // 8) <= 1 or len(found) >= 512
    assert places(held) == found


@pytest.mark.parametrize("n", [64, 1000, 8191, 8192, 8193, 20_000, 40_000])
@pytest.mark.parametrize("seed", [0, -3, 2**64 - 1])
def test_the_samples_do_not_depend_on_what_is_kept(n, seed):
    """In one pass of unknown length, or with places only: the same samples."""
    once = HeldOutSamples(Numbers(n), 8, seed=seed, most=1024)
    list(once.others)
    again = HeldOutSamples(Numbers(n, size=500), 8, seed=seed, most=1024, total=n, room=0)
    assert places(once) == places(again)
    assert again.count_of(n) == again.samples == once.samples
    assert set(places(again)) | set(places(again.others)) == set(range(n))


def test_they_are_spread_over_a_large_source_in_class_order():
    """The first 1,024 of them were of 164 of 1,000 classes."""
    n, classes = 50_000, 1000
    held = HeldOutSamples(Numbers(n, 1000, torch.arange(n) // (n // classes)), 8, most=1024)
    list(held.others)
    labels = torch.cat([y for _, y in held])
    found = places(held)
    assert 512 <= len(found) <= 1024
    assert max(b - a for a, b in zip(found, found[1:])) <= 2 * n / len(found) + 8
    assert found[0] < 200
    assert found[-1] > n - 200
    assert len(labels.unique()) > 500


@pytest.mark.parametrize("classes", [2, 4, 8, 10, 16, 100])
@pytest.mark.parametrize("every", [4, 8])
def test_classes_in_turn_are_all_held_out(classes, every):
    """Every fourth of classes in turn was one of some classes only, and always the same ones."""
    n = 400 * classes
    held = HeldOutSamples(Numbers(n, 64, torch.arange(n) % classes), every)
    list(held.others)
    counts = torch.bincount(torch.cat([y for _, y in held]), minlength=classes)
    assert int(counts.min()) > 0.5 * 400 / every
    assert int(counts.max()) < 1.6 * 400 / every


def test_they_depend_on_the_seed():
    found = {tuple(places(HeldOutSamples(Numbers(200), 8, seed=seed))) for seed in range(5)}
    assert len(found) == 5


def test_images_are_kept_only_where_there_is_room():
    nbytes = 100 // 4 * 8
    for room, passes in ((None, 1), (nbytes, 1), (nbytes - 1, 4), (0, 4)):
        source = Numbers(100)
        held = HeldOutSamples(source, 4, room=room)
        list(held.others)
        wanted = places(held)
        for _ in range(2):
            assert places(held) == wanted
        assert held.samples == 25
        assert source.passes == passes


def test_only_the_samples_are_read_again_where_they_can_be_picked():
    source = Numbers(300)
    asked = []

    def pick(some):
        asked.append(some.tolist())
        return [(source.x[some], source.y[some])]

    held = HeldOutSamples(source, 8, total=300, room=0, pick=pick)
    others = places(held.others)
    assert places(held) == places(held) == asked[0] == asked[1]
    assert sorted(asked[0] + others) == list(range(300))
    assert source.passes == 1
    assert places(HeldOutSamples(Numbers(5), 8, total=5, room=0, pick=pick)) == []


def test_all_samples_may_be_held_out():
    held = HeldOutSamples(Numbers(20), 1, room=0)
    assert places(held) == list(range(20))
    assert places(held.others) == []


def test_samples_of_another_order_are_recognized():
    source = Numbers(200)
    held = HeldOutSamples(source, 8)
    list(held.others)
    assert places(held.without(source())) == places(held.others)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    other = held.without(zip(source.x[order].split(9), source.y[order].split(9), strict=True))
    assert not set(places(other)) & set(places(held))


def test_too_few_are_refused():
    held = HeldOutSamples(Numbers(7), 8)
    list(held.others)
    with pytest.raises(InvalidArgument, match="at least 8 samples"):
        require_some(held)
    require_some(HeldOutSamples(Numbers(8), 8))


def test_errors_of_the_source_are_passed_on():
    def source():
        raise DataError("broken")
        yield

    with pytest.raises(DataError, match="broken"):
        list(HeldOutSamples(source, 8))
