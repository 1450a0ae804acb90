from __future__ import annotations

import operator
from collections import UserDict, namedtuple

import pytest
import torch
from torch.utils.data import DataLoader

from fastsal.data.batches import as_batches
from fastsal.data.unpacking import ruled, unpack, unpacked
from fastsal.errors import DataError, InvalidArgument

X, Y = torch.randn(4, 3, 8, 8), torch.arange(4)
Named = namedtuple("Named", ["label", "image"])
Unnamed = namedtuple("Unnamed", ["first", "second"])


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        (X, Y.tolist()),
        {"pixel_values": X, "labels": Y},
        {"image": X, "label": Y},
        {"images": X, "targets": Y, "id": ["a"] * 4, "path": None},
        {"x": X, "y": Y},
        {"img": X, "target": Y, "labels": None},
        UserDict(image=X, label=Y),
        Named(Y, X),
        Unnamed(X, Y),
    ],
    ids=lambda batch: type(batch).__name__,
)
@pytest.mark.parametrize("use", ["required", "optional", "ignored"])
def test_images_and_labels_of_a_batch(batch, use):
    images, labels = unpack(batch, 0, use)
    assert images is X
    if use != "ignored":
        assert torch.equal(labels, Y)


@pytest.mark.parametrize("batch", [X, (X,), [X], {"image": X}, {"x": X, "y": None}])
def test_images_alone(batch):
    for use in ("optional", "ignored"):
        assert unpack(batch, 0, use)[0] is X
        assert unpack(batch, 0, use)[1] is None
    with pytest.raises(DataError):
        unpack(batch, 0, "required")


@pytest.mark.parametrize("batch", [(X, Y, Y), [X, "text", None], (X, X, Y, Y)])
def test_further_parts_are_ignored_only_with_the_labels(batch):
    images, labels = unpack(batch, 0, "ignored")
    assert images is X
    assert labels is None
    for use in ("required", "optional"):
        message = rf"batch 2 must be .*pair.*of length {len(batch)}: tensor \[4, 3, 8, 8\].*batch="
        with pytest.raises(DataError, match=message):
            unpack(batch, 2, use)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"picture": X, "label": Y}, r"one entry of images \(pixel_values, .*got no in dict with "
         r"picture: tensor \[4, 3, 8, 8\], label: tensor \[4\]; pass batch="),
        ({"image": X, "x": X, "label": Y}, "one entry of images .*, got several in dict"),
        ({"image": X}, r"one entry of labels \(labels, .*, got no in dict with image: tensor"),
        ({"image": X, "label": Y, "target": Y}, "one entry of labels .*, got several"),
        ("text", "must be a pair .images, labels., got str; pass batch="),
        (None, "must be a pair .images, labels., got NoneType"),
        ({"image": "text", "label": Y}, "must have a tensor of images .*, got str"),
        ({"image": X, "label": Y[:2]}, r"one label per image, got labels \[2\] for 4 images"),
    ],
)  # fmt: skip
def test_other_batches_are_described(batch, message):
    with pytest.raises(DataError, match=message):
        unpack(batch, 0, "required")


def test_labels_that_are_none_are_told():
    assert torch.equal(next(unpacked([{"x": X, "y": Y}]))[1], Y)
    with pytest.raises(DataError, match="labels: batch 1 must have a tensor of labels, got None"):
        list(unpacked([(X, Y), (X, None)]))


def test_a_rule_is_applied_in_every_iteration():
    loader = DataLoader([(i, X[i], Y[i]) for i in range(4)], batch_size=2)
    batches = ruled(loader, lambda batch: batch[1:])
    assert operator.length_hint(batches) == 2
    for _ in range(2):
        found = list(as_batches(batches, None))
        assert torch.equal(torch.cat([x for x, _ in found]), X)
        assert torch.equal(torch.cat([y for _, y in found]), Y)
    once = ruled(iter([(X, Y, 0)]), lambda batch: batch[:2])
    assert len(list(once)) == 1
    assert not list(once)


def test_a_rule_may_return_a_dict_and_is_checked():
    batches = ruled([(Y, X)], lambda b: {"x": b[1], "y": b[0]})
    assert len(next(as_batches(batches, 2))[0]) == 2
    with pytest.raises(DataError, match="batch 0 must be a pair .*got tuple of length 3"):
        list(as_batches(ruled([X], lambda batch: (batch, Y, 0)), None))
    with pytest.raises(InvalidArgument, match="batch must be a function .*, got 'image'"):
        ruled([X], "image")
    assert ruled(None, lambda batch: batch) is None
    batches = [(X, Y)]
    assert ruled(batches, None) is batches
