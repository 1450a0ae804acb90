"""Ten tasks of ten ImageNet classes each.

The split of "A Second-Order Perspective on Pruning at Initialization and Knowledge Transfer"
(arXiv 2509.24066). Classes are numbered 0 to 999 in the order of their WordNet ids, as in the
folders of ImageNet (ILSVRC2012) and in the logits of timm's models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from fastsal.data.image_set import ImageSet
from fastsal.errors import DataError

IMAGENET_CLASSES = 1000

IMAGENET_TASKS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "t0": (933, 959, 934, 963, 928, 965, 935, 943, 932, 940),
        "t1": (977, 973, 980, 976, 979, 975, 971, 974, 972, 970),
        "t2": (24, 15, 7, 8, 9, 10, 11, 16, 22, 17),
        "t3": (483, 706, 821, 682, 863, 536, 437, 562, 634, 525),
        "t4": (869, 617, 735, 457, 841, 614, 610, 655, 445, 465),
        "t5": (861, 495, 846, 526, 831, 827, 559, 736, 453, 894),
        "t6": (487, 485, 688, 742, 732, 508, 505, 673, 605, 696),
        "t7": (466, 779, 734, 569, 555, 717, 627, 407, 573, 866),
        "t8": (56, 35, 340, 291, 292, 277, 269, 264, 296, 294),
        "t9": (0, 1, 2, 3, 4, 5, 6, 121, 124, 107),
    }
)


def imagenet_tasks(images: ImageSet) -> dict[str, ImageSet]:
    """Select the classes of each of the ten tasks.

    Args:
        images: ImageNet, its 1,000 classes in the order of their WordNet ids, as a folder with a
            folder per class gives them.

    Returns:
        `{"t0" .. "t9": images of ten classes}`; cut each with `Task.cut`. The classes keep their
        names and take the order of `IMAGENET_TASKS`, whose numbers are those of logits.

    Raises:
        DataError: another number of classes, WordNet ids in another order, or a class of a task
            without images.
    """
    classes = images.classes
    if len(classes) != IMAGENET_CLASSES:
        raise DataError(
            f"images: {images.source} has {len(classes)} classes; takes ImageNet's "
            f"{IMAGENET_CLASSES}, a folder of images each"
        )
    if all(re.fullmatch(r"n\d{8}", name) for name in classes) and list(classes) != sorted(classes):
        first = next(a for a, b in zip(classes, sorted(classes), strict=True) if a != b)
        raise DataError(
            f"images: {images.source} has class {first!r} out of order; takes WordNet ids in order"
        )
    there = set(images.y.tolist())
    for task, numbers in IMAGENET_TASKS.items():
        absent = [number for number in numbers if number not in there]
        if absent:
            raise DataError(
                f"images: {images.source} has no image of class {classes[absent[0]]!r} "
                f"(number {absent[0]}) of task {task!r}"
            )
    return {task: images.select_classes(numbers) for task, numbers in IMAGENET_TASKS.items()}
