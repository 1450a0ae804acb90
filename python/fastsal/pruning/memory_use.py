"""Memory that pruning uses in addition to the statistics."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

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
    return Use(kept + gathered, collecting + gathered, joins=joins, again=not has_scratch)
