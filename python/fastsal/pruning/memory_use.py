"""Memory that pruning uses in addition to the statistics."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fastsal.data.held_out import HELD_OUT_EVERY, HELD_OUT_MOST
from fastsal.fisher.memory_plan import Use


def use_by_pruning(
    chosen: Mapping[str, nn.Parameter],
    *,
    is_auto: bool,
    rounds: int,
    has_scratch: bool,
    needs_fisher: bool = True,
    joins: bool = False,
    ranks: int = 1,
    gathered: int = 0,
    images: int = 0,
) -> Use:
    """Return the memory that pruning uses in addition to the statistics.

    It holds scores and two masks, copies of the original and of the compensated weights and, where
    a damping is chosen, the best attempt. With a scratch folder, copies of weights and scores are
    stored there. During collection it holds the masks of the previous round or of the best attempt.

    Args:
        chosen: Name to parameter to be pruned.
        is_auto: Whether a damping is chosen on held-out images.
        rounds: Number of rounds.
        has_scratch: Whether copies are stored in a scratch folder.
        needs_fisher: Whether the scores are computed from statistics.
        joins: Whether held-out samples are added to the statistics.
        ranks: Number of processes, which divide scores and updated weights among themselves.
        gathered: Bytes of weights that are gathered from other processes.
        images: Bytes of held-out images that are kept.
    """
    weights = sum(p.numel() for p in chosen.values())
    copies = sum(p.numel() * p.element_size() for p in chosen.values())
    own = -(-weights // ranks)
    kept, collecting = 4 * (own if needs_fisher else weights) + 2 * weights, 0
    if is_auto:
        kept += weights
    if is_auto or rounds > 1:
        collecting += 2 * weights
    if not has_scratch:
        tries = 2 * copies + 4 * own if is_auto else 0
        kept += copies + 4 * own + tries
        collecting += copies + tries
    return Use(
        kept + gathered, collecting + gathered, images=images, joins=joins, again=not has_scratch
    )


def tuning_bytes(images: Tensor, samples: int | None) -> int:
    """Return the bytes of the held-out images that a damping is chosen on, if they are kept.

    Args:
        images: The first images, of the type and shape of all.
        samples: Number of samples that they are held out of; None if unknown.
    """
    most = HELD_OUT_MOST if samples is None else -(-samples // HELD_OUT_EVERY)
    return min(most, HELD_OUT_MOST) * sample_bytes(images)


def sample_bytes(images: Tensor) -> int:
    """Return the bytes of one of images `[n, ...]`."""
    return images.nbytes // len(images)
