"""Image sets in which some classes are rare."""

from __future__ import annotations

import numpy as np

from fastsal.data.image_set import ImageSet
from fastsal.errors import InvalidArgument


def imbalanced(images: ImageSet, ratio: float, seed: int = 0) -> ImageSet:
    """Thin classes out to an exponential long tail, as Cui et al. (2019), section 5.1, do.

    Of the `n` images of the k-th class `n · ratio^(k / (K − 1))` stay, k from 0, rounded, one at
    least: the first class keeps all, the last one `ratio` of them.

    Args:
        images: K classes, two or more.
        ratio: what the rarest class keeps, above 0, to 1 (Cui's imbalance factor is `1 / ratio`).
        seed: of the order of the classes and of which images stay.

    Returns:
        The images that stay, in the order of `images`.

    Raises:
        InvalidArgument: `ratio` is out of range, or there is one class.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise InvalidArgument(f"ratio: got {ratio!r}; takes a number above 0, to 1")
    count = len(images.classes)
    if count < 2:
        raise InvalidArgument(f"images: {images.source} has {count} class; takes two or more")
    rng = np.random.default_rng(seed)
    kept = []
    for rank, k in enumerate(rng.permutation(count)):
        members = rng.permutation(np.flatnonzero(images.y == k))
        share = ratio ** (rank / (count - 1))
        kept.append(members[: max(1, round(share * len(members)))])
    return images.subset(np.sort(np.concatenate(kept)))
