"""Ten tasks of ten ImageNet classes each.

Source: "A Second-Order Perspective on Pruning at Initialization and Knowledge Transfer"
(arXiv 2509.24066). Classes are numbered 0 to 999 in the order of their WordNet ids, as are the
folders of ImageNet (ILSVRC2012) and the logits of timm's models.
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
        images: ImageNet, with 1,000 classes in the order of their WordNet ids, as `load_images`
            reads it from a folder with a subfolder per class.

    Returns:
        Task name, "t0" to "t9", to the images of its ten classes, in the order of
        `IMAGENET_TASKS`. Split each into disjoint sets with `Task.cut`.

    Raises:
        DataError: There are not 1,000 classes, the WordNet ids are not sorted, or a class of a
            task has no images.
    """
    classes = images.classes
    if len(classes) != IMAGENET_CLASSES:
        raise DataError(
            f"images must have the {IMAGENET_CLASSES} classes of ImageNet, got {len(classes)} in "
            f"{images.source}"
        )
    if all(re.fullmatch(r"n\d{8}", name) for name in classes) and list(classes) != sorted(classes):
        first = next(a for a, b in zip(classes, sorted(classes), strict=True) if a != b)
        raise DataError(
            f"images must have classes sorted by WordNet id, got {first!r} out of order in "
            f"{images.source}"
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
