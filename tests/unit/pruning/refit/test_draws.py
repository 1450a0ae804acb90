"""Draws: every image once per permutation, a bounded buffer, shifts that are only shifts."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from fastsal.pruning.refit.draws import Draws, flip_and_shift


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(count, size):
    """Batches of images `[size, 1]` that contain their own numbers."""
    return [(x[:, None], None) for x in torch.arange(float(count)).split(size)]


def flat(batches):
    return torch.cat(list(batches)).flatten().tolist()


@pytest.mark.parametrize("split", [1, 5, 12])
def test_a_source_that_fits_is_drawn_in_permutations(split):
    seen = flat(islice(Draws(numbered(12, split), 4, generator()), 6))
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert seen[:12] != seen[12:]
    assert seen == flat(islice(Draws(numbered(12, 7), 4, generator()), 6))  # any batches


def test_batches_may_be_larger_than_the_source():
    batches = list(islice(Draws(numbered(3, 2), 8, generator()), 2))
    assert [sorted(b.flatten().tolist()) for b in batches] == [[0, 1, 2]] * 2


def test_a_bounded_buffer_yields_every_image_equally_often():
    class Counted:
        most = 0

        def __iter__(self):
            yield from numbered(100, 10)

    seen = flat(islice(Draws(Counted(), 5, generator(), room=20 * 4), 400))
    counts = torch.tensor(seen).long().bincount(minlength=100)
    assert counts.sum() == 2000
    assert counts.min() >= 15  # twenty each, but for the images in the buffer
    assert counts.max() <= 25
    first = seen[:50]
    assert first != sorted(first)  # mixed, though the source is sorted


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 5, 9)])
def test_every_image_is_a_mirrored_or_shifted_one(shape):
    c, h, w = shape
    images = torch.randn(24, c, h, w)
    found = flip_and_shift(images, generator(3))
    assert found.shape == images.shape
    up, left = max(1, h // 8), max(1, w // 8)
    kinds = set()
    for image, out in zip(images, found, strict=True):
        options = {
            (mirror, dy, dx): shifted(image.flip(2) if mirror else image, dy, dx)
            for mirror in (False, True)
            for dy in range(-up, up + 1)
            for dx in range(-left, left + 1)
        }
        same = [key for key, option in options.items() if option.equal(out)]
        assert len(same) == 1
        kinds.add(same[0])
    assert {mirror for mirror, _, _ in kinds} == {False, True}
    assert len(kinds) > 8


def shifted(image, dy, dx):
    """One pixel at a time; pixels outside repeat the edge."""
    out = torch.empty_like(image)
    _, h, w = image.shape
    for y in range(h):
        for x in range(w):
            out[:, y, x] = image[:, min(max(y + dy, 0), h - 1), min(max(x + dx, 0), w - 1)]
    return out


def test_token_ids_are_as_they_were():
    ids = torch.arange(12).reshape(3, 4)
    assert flip_and_shift(ids, generator()) is ids
