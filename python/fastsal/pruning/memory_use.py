"""Memory that pruning holds beside the statistics."""

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
    """What pruning keeps beside statistics.

    Scores and two masks; weights to go back to and those that compensation finds, and the best try
    where a damping is chosen. With a scratch folder copies of weights and of scores lie there.
    While sums are made there are the masks of the round before, or of the best try. Several `ranks`
    share out what is scored by statistics and moved; `gathered` is the memory of weights that lie
    on other processes else.
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
