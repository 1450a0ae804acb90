"""Image sets with imbalanced classes."""

from __future__ import annotations

import numpy as np

from fastsal.data.image_set import ImageSet
from fastsal.errors import InvalidArgument
from fastsal.utils.numbers import real, whole


def imbalanced(images: ImageSet, ratio: float, seed: int = 0) -> ImageSet:
    """Subsample the classes to an exponential long tail (Cui et al., 2019, section 5.1).

    Of the n images of the k-th class of a random order, k = 0 .. K − 1, `n · ratio^(k / (K − 1))`
    are kept, rounded, and at least one.

    Args:
        images: Images of K >= 2 classes.
        ratio: Fraction of the images that the rarest class keeps, in (0, 1]. The imbalance factor
            of Cui et al. is `1 / ratio`.
        seed: Seed of the order of the classes and of the choice of images.

    Returns:
        The kept images, in the order of `images`.

    Raises:
        InvalidArgument: `ratio` is out of range, or there is only one class.
    """
    ratio, seed = real("ratio", ratio, above=0, most=1), whole("seed", seed)
    count = len(images.classes)
    if count < 2:
        raise InvalidArgument(
            f"images must have at least 2 classes, got {count} in {images.source}"
        )
    rng = np.random.default_rng(seed)
    kept = []
    for rank, k in enumerate(rng.permutation(count)):
        members = rng.permutation(np.flatnonzero(images.y == k))
        share = ratio ** (rank / (count - 1))
        kept.append(members[: max(1, round(share * len(members)))])
    return images.subset(np.sort(np.concatenate(kept)))
