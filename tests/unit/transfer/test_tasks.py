from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsal.data.image_set import ImageSet
from fastsal.errors import DataError, InvalidArgument
from fastsal.transfer.splits import SPLITS, Shares
from fastsal.transfer.tasks import Task


def images(counts=(40, 40, 40, 40), source="file", seed=0, names=None):
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    x = np.zeros((len(y), 1, 1, 3), np.uint8)
    classes = names or tuple("abcdefghij"[: len(counts)])
    return ImageSet(x, y.astype(np.int64), classes, source)


def place_of(task):
    """Return `{index in the source: part}`."""
    return {i: part for part, indices in task.indices().items() for i in indices}


def test_a_cut_takes_every_image_once_and_the_same_of_every_class():
    task = Task.cut("t", images(), shares=Shares(0.3, 0.3, 0.4, 0.25))
    assert sorted(i for part in task.indices().values() for i in part) == list(range(160))
    for part, each in {"prune": 9, "fit": 9, "tune": 12, "test": 10}.items():
        assert np.bincount(getattr(task, part).y).tolist() == [each] * 4, part


@settings(max_examples=50, deadline=None)
@given(
    counts=st.lists(st.integers(20, 60), min_size=2, max_size=6),
    shares=st.tuples(*[st.integers(1, 8)] * 4),
    seed=st.integers(0, 5),
)
def test_counts_are_the_shares_rounded(counts, shares, seed):
    prune, fit, tune, test = shares
    whole = prune + fit + tune
    given_shares = Shares(prune / whole, fit / whole, tune / whole, test / 16)
    try:
        task = Task.cut("t", images(counts, seed=seed), shares=given_shares, seed=seed)
    except DataError as error:
        # Refused only where a part of some class has less than one image to expect.
        rests = [n - math.floor(n * test / 16 + 0.5) for n in counts]
        assert "too few for split" in str(error)
        assert min(rests) * min(prune, fit, tune) < whole
        return
    for k, n in enumerate(counts):
        found = {part: int((getattr(task, part).y == k).sum()) for part in SPLITS}
        assert sum(found.values()) == n
        assert abs(found["test"] - n * test / 16) <= 0.5 + 1e-9
        rest = n - found["test"]
        for part in ("prune", "fit", "tune"):
            assert abs(found[part] - rest * getattr(given_shares, part)) <= 1, part


@settings(max_examples=30, deadline=None)
@given(chosen=st.sets(st.integers(0, 5), min_size=2), seed=st.integers(0, 3), turn=st.booleans())
def test_the_part_of_an_image_does_not_depend_on_the_other_classes(chosen, seed, turn):
    whole = images((30, 41, 52, 33, 29, 37))
    order = sorted(chosen, reverse=turn)
    some = whole.select_classes(order)
    assert place_of(Task.cut("some", some, seed=seed)).items() <= (
        place_of(Task.cut("all", whole, seed=seed)).items()
    )


def test_the_part_of_an_image_does_not_depend_on_the_order_in_which_images_come():
    whole = images()
    turned = whole.subset(np.arange(len(whole))[::-1])
    assert place_of(Task.cut("t", whole)) == place_of(Task.cut("t", turned))


def test_a_cut_is_the_same_on_every_machine():
    few = Task.cut("t", images((8, 8), "anywhere", names=("cat", "dog")), seed=3).indices()
    # Written down once: another way to hash or to round would move images between parts.
    assert few == {
        "prune": [1, 3, 7, 10],
        "fit": [6, 11, 13, 14],
        "tune": [4, 5, 8, 9],
        "test": [0, 2, 12, 15],
    }
    assert Task.cut("t", images((8, 8), "elsewhere", names=("cat", "dog")), seed=3).indices() == few
    assert Task.cut("t", images((8, 8), names=("cat", "dog")), seed=4).indices() != few


def test_images_of_their_own_to_test_on_leave_all_others_to_the_other_parts():
    train, test = images(source="train"), images((5, 5, 5, 5), source="test")
    task = Task.cut("t", train, test=test, shares=Shares(0.5, 0.5, 0.0, 0.0))
    assert task.test is test
    assert task.tune is None
    assert len(task.prune) == len(task.fit) == 80
    assert Task.cut("t", train, test=test).indices()["test"] == list(range(20))
    assert len(Task.cut("t", train, test=test).prune) == 48


def test_indices_go_through_json_and_back():
    whole = images().select_classes([3, 1])
    task = Task.cut("t", whole, seed=2)
    again = Task.from_indices("t", whole, json.loads(json.dumps(task.indices())))
    for part in SPLITS:
        a, b = getattr(task, part), getattr(again, part)
        assert (a.index == b.index).all()
        assert (a.y == b.y).all()
        assert a.classes == b.classes == ("d", "b")
    own = images((5, 5), "test", names=("d", "b"))
    task = Task.cut("t", whole, test=own, shares=Shares(0, 1, 0, 0))
    again = Task.from_indices("t", whole, task.indices(), own)
    assert again.prune is None
    assert again.indices() == task.indices()
    assert again.test.source == "test"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fit": [0, 999]}, r"split 'fit' of task 't' has image 999, one of 1 that are not among"),
        ({"fit": [-1, 3]}, "has image -1"),
        ({"fit": [0, 1.5]}, "must hold integers, got 1.5"),
        ({"fit": [0, True]}, "must hold integers, got True"),
        ({"fit": []}, r"must be a non-empty list of integers, got \[\]"),
        ({"fit": "01"}, "'fit' of task 't' must hold integers, got '0'"),
        ({"fit": 7}, "'fit' of task 't' must be a non-empty list of integers, got 7"),
        ({"fit": [0, 0, 1, 2, 3, 4]}, "has a duplicate image"),
        ({"fit": "one class"}, r"has no image of class 'b' \(10 images, 1 of 4 classes\)"),
        ({"fit": None}, r"must have 'fit' and 'test'"),
        ({"train": [1]}, r"must have 'fit' and .*, got .*'train'"),
        ({"tune": "fit"}, "tune: .* must be disjoint, but 'tune' and 'fit' share 36 images"),
    ],
)
def test_a_stored_split_that_does_not_fit(change, message):
    whole = images()
    stored = Task.cut("t", whole).indices()
    for part, value in change.items():
        if value is None:
            del stored[part]
        elif value == "one class":
            stored[part] = np.flatnonzero(whole.y == 0)[:10].tolist()
        else:
            stored[part] = stored["fit"] if value == "fit" else value
    with pytest.raises(DataError, match=message):
        Task.from_indices("t", whole, stored)


@pytest.mark.parametrize(
    ("a", "b"),
    [(a, b) for i, a in enumerate(SPLITS) for b in SPLITS[:i]],
)
def test_all_parts_are_disjoint(a, b):
    parts = Task.cut("t", images()).splits()
    parts[a] = parts[b].subset([3, 5, *range(20, len(parts[b]))])
    with pytest.raises(DataError, match=rf"{a}: .* but '{a}' and '{b}' share \d+ images"):
        Task("t", **parts)
    elsewhere = images(source="elsewhere")
    parts[a] = elsewhere  # the same places of another file are other images
    Task("t", **parts)


@pytest.mark.parametrize("part", SPLITS)
def test_all_parts_have_the_same_classes(part):
    parts = Task.cut("t", images()).splits()
    other = images(names=("a", "b", "c", "z"), source="other")
    with pytest.raises(DataError, match=r"task 't' must have the same classes, got .* in '"):
        Task("t", **{**parts, part: other})
    with pytest.raises(InvalidArgument, match=rf"{part} must be .*, got a generator, which can"):
        Task("t", **{**parts, part: (x for x in [])})


def test_parts_may_be_batches():
    batches = [(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))]
    task = Task("t", batches, batches, prune=batches)
    assert list(task.splits()) == ["prune", "fit", "test"]
    with pytest.raises(
        DataError, match="prune of task 't' must be an ImageSet to have indices, got a list"
    ):
        task.indices()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prune": -0.1, "fit": 0.7}, r"shares.prune must be in \[0, 1\], got -0.1"),
        ({"prune": float("nan")}, r"prune must be in \[0, 1\], got nan"),
        ({"test": "half"}, "test must be a number, got 'half'"),
        ({"fit": True}, "fit must be a number, got True"),
        ({"prune": 0.5}, r"prune \+ fit \+ tune of shares must be 1, got 1.2"),
        ({"prune": 0.5, "fit": 0.0, "tune": 0.5}, "shares.fit must be above 0, got 0"),
        ({"test": 1.0}, "shares.test must be below 1, got 1"),
    ],
)
def test_bad_shares(given, message):
    with pytest.raises(InvalidArgument, match=message):
        Shares(**given)


def test_classes_too_small_to_cut():
    with pytest.raises(DataError) as error:
        Task.cut("small", images((40, 2, 40)))
    assert str(error.value) == (
        "shares: class 'b' of file has 2 images, too few for split 'prune' with a share of 0.3 "
        "(task 'small')"
    )
    with pytest.raises(
        DataError, match=r"test: split 'test' of task 't' has no image of class 'c'"
    ):
        Task.cut("t", images((9, 9, 9)), test=images((4, 4, 0), "other"))
    with pytest.raises(InvalidArgument, match="shares.test must be above 0 for task 't'"):
        Task.cut("t", images(), shares=Shares(test=0))
    with pytest.raises(InvalidArgument, match="seed must be an integer, got 0.5"):
        Task.cut("t", images(), seed=0.5)
    twice = images().subset([*range(160), 7])
    with pytest.raises(DataError, match="image 7 of file is duplicated"):
        Task.cut("t", twice)


@pytest.mark.parametrize("scalar", [lambda v: np.array(v)[()], torch.tensor])
def test_shares_and_seeds_may_be_scalars_of_arrays(scalar):
    shares = Shares(scalar(0.5), scalar(0.25), scalar(0.25), test=scalar(0.5))
    assert shares == Shares(0.5, 0.25, 0.25, 0.5)
    task = Task.cut("t", images(), shares=shares, seed=scalar(3))
    assert task.indices() == Task.cut("t", images(), shares=shares, seed=3).indices()
