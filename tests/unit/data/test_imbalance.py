from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsal.data.image_set import ImageSet
from fastsal.data.imbalance import imbalanced
from fastsal.errors import InvalidArgument


def images(counts, seed=0):
    y = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng(seed).shuffle(y)
    x = np.arange(len(y), dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    return ImageSet(x, y, tuple(f"class{k}" for k in range(len(counts))))


@settings(deadline=None, max_examples=50)
@given(
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    ratio=st.floats(1e-3, 1.0),
    seed=st.integers(0, 100),
)
def test_classes_keep_what_the_formula_says(counts, ratio, seed):
    whole = images(counts)
    kept = imbalanced(whole, ratio, seed)
    K = len(counts)
    order = np.random.default_rng(seed).permutation(K)
    for rank, k in enumerate(order):
        want = max(1, round(counts[k] * ratio ** (rank / (K - 1))))
        assert (kept.y == k).sum() == want
    # A part of what there was, in its order, nothing twice, and labels as they were.
    assert (np.diff(kept.index) > 0).all()
    assert np.array_equal(kept.y, whole.y[kept.index])
    assert np.array_equal(kept.x, whole.x[kept.index])
    assert (kept.source, kept.classes) == (whole.source, whole.classes)


def test_the_ends_of_the_tail():
    kept = imbalanced(images([50] * 5), 0.1, seed=3)
    counts = sorted(np.bincount(kept.y), reverse=True)
    assert counts == [50, 28, 16, 9, 5]


def test_the_seed_draws_order_and_images():
    whole = images([50, 50, 50])
    first = imbalanced(whole, 0.2, seed=0)
    assert np.array_equal(first.index, imbalanced(whole, 0.2, seed=0).index)
    others = [imbalanced(whole, 0.2, seed=s) for s in range(1, 12)]
    assert len({int(np.bincount(o.y).argmin()) for o in others}) == 3
    same_order = [o for o in others if np.array_equal(np.bincount(o.y), np.bincount(first.y))]
    assert same_order
    assert all(not np.array_equal(o.index, first.index) for o in same_order)


def test_a_ratio_of_one_keeps_all():
    whole = images([7, 3])
    assert np.array_equal(imbalanced(whole, 1).index, whole.index)


@pytest.mark.parametrize("ratio", [0, -0.5, 1.5, float("nan"), "0.5", None, True])
def test_ratios_that_are_not_taken(ratio):
    with pytest.raises(InvalidArgument, match="^ratio must be .*, got"):
        imbalanced(images([5, 5]), ratio)


def test_one_class_has_no_tail():
    with pytest.raises(InvalidArgument, match="must have at least 2 classes, got 1"):
        imbalanced(images([5]), 0.5)


def test_numpy_and_torch_scalars_are_numbers():
    some = images([20, 20, 20])
    expected = imbalanced(some, 0.5, seed=3).index
    for ratio, seed in ((np.float64(0.5), np.int64(3)), (torch.tensor(0.5), torch.tensor(3))):
        assert np.array_equal(imbalanced(some, ratio, seed=seed).index, expected)
