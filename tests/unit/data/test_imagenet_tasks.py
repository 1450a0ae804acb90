from __future__ import annotations

import numpy as np
import pytest

from fastsal.data.image_set import ImageSet
from fastsal.data.imagenet_tasks import IMAGENET_TASKS, imagenet_tasks
from fastsal.errors import DataError
from fastsal.transfer.tasks import Task


def imagenet(classes=1000, each=2, names=None):
    y = np.repeat(np.arange(classes), each)
    x = np.zeros((len(y), 1, 1, 3), np.uint8)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = y // 256, y % 256
    return ImageSet(x, y, names or tuple(f"n{k:08d}" for k in range(classes)), "imagenet")


def test_ten_tasks_of_ten_classes():
    assert list(IMAGENET_TASKS) == [f"t{i}" for i in range(10)]
    numbers = [number for task in IMAGENET_TASKS.values() for number in task]
    assert len(numbers) == len(set(numbers)) == 100
    assert all(0 <= number < 1000 for number in numbers)
    tasks = imagenet_tasks(imagenet())
    for name, images in tasks.items():
        assert len(images) == 20
        assert [int(c.removeprefix("n")) for c in images.classes] == list(IMAGENET_TASKS[name])
        pixels = images.x[:, 0, 0].astype(int)
        assert (pixels[:, 0] * 256 + pixels[:, 1] == np.array(IMAGENET_TASKS[name])[images.y]).all()


def test_tasks_are_cut_as_imagenet_is():
    whole = imagenet(each=12)
    tasks = imagenet_tasks(whole)
    place = {i: part for part, where in Task.cut("all", whole).indices().items() for i in where}
    for name, images in tasks.items():
        for part, where in Task.cut(name, images).indices().items():
            assert {place[i] for i in where} == {part}


def test_other_images_than_those_of_imagenet():
    with pytest.raises(
        DataError, match="must have the 1000 classes of ImageNet, got 100 in imagenet"
    ):
        imagenet_tasks(imagenet(100))
    turned = imagenet(names=tuple(f"n{k:08d}" for k in range(999, -1, -1)))
    with pytest.raises(DataError, match="got 'n00000999' out of order"):
        imagenet_tasks(turned)
    some = imagenet()
    some = some.subset(np.flatnonzero(some.y != 483))
    with pytest.raises(
        DataError, match=r"no image of class 'n00000483' \(number 483\) of task 't3'"
    ):
        imagenet_tasks(some)
