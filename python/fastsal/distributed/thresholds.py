"""Find a threshold over scores that are distributed over ranks, from histograms of their keys.

A key is a score as an integer, in the same order. Keys and the order of equal scores are those of
`fastsal._core`, so that the masks equal those of `fastsal.rank` for all scores in one process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastsal._core as _core
from fastsal.distributed.ranks import Ranks
from fastsal.fisher.parts import Part
from fastsal.pruning.masks.costs import checked_costs, counts_by_cost, priced
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.masks.ranking import check_ranking, floor_counts, global_count, layer_counts
from fastsal.pruning.masks.shares import Sparsity, divided

Scores = Mapping[str, NDArray[np.float32]]
_ALL = 2**64 - 1


@dataclass(frozen=True)
class Cut:
    """A threshold: keys below `key` are pruned, and the first `ties` of those equal to it."""

    key: int
    ties: int


def masks_of_shards(
    scores: Mapping[str, Tensor],
    shares: Sequence[Sequence[Part]],
    shapes: Mapping[str, Sequence[int]],
    ranks: Ranks,
    sparsity: Sparsity | None,
    *,
    scope: str = "global",
    floor: float = 0.0,
    costs: Mapping[str, float] | None = None,
) -> Masks:
    """Turn the scores of all ranks into the masks of the whole model.

    Args:
        scores: Key to the scores of this rank's parts.
        shares: Parts of every rank.
        shapes: Name to shape, of the whole model.
        ranks: The processes.
        sparsity: Fraction of the weights to prune, or name or pattern to that of its parameters.
        scope: Weights that compete with each other, see `fastsal.rank`.
        floor: Least fraction of any parameter to keep.
        costs: Name to the cost of one weight that `sparsity` is a fraction of, see `fastsal.rank`.

    Returns:
        The masks, the same on every rank.

    Raises:
        InvalidArgument: An argument is invalid, see `fastsal.rank`.
    """
    check_ranking(shapes, sparsity, scope, None, floor, costs=costs)
    assert sparsity is not None
    mine = {key: s.reshape(-1).contiguous().numpy() for key, s in scores.items()}
    by_name: dict[str, list[Part]] = {name: [] for name in shapes}
    for part in sorted((p for share in shares for p in share), key=lambda p: p.start):
        by_name[part.name].append(part)
    recipe: dict[str, object] = {"scope": scope, "floor": floor, "sparsity": sparsity}
    if costs is not None:
        recipe["costs"] = costs = checked_costs(costs, list(shapes), scope, None)
    cuts_of = partial(
        _cuts, mine, shapes=shapes, ranks=ranks, scope=scope, floor=floor, costs=costs
    )
    cuts: dict[str, Cut] = {}
    if isinstance(sparsity, Mapping):
        recipe["thresholds"] = thresholds = {}
        for pattern, names in divided(sparsity, shapes).items():
            some = {name: by_name.pop(name) for name in names}
            found, thresholds[pattern] = cuts_of(some, sparsity[pattern])
            cuts |= found
        cuts |= {part.key: Cut(0, 0) for parts in by_name.values() for part in parts}
    else:
        cuts, threshold = cuts_of(by_name, sparsity)
        if scope == "global":
            recipe["threshold"] = threshold
    kept = {key: _core.mask_below(s, cuts[key].key, cuts[key].ties) for key, s in mine.items()}
    return Masks(assembled(kept, shares, shapes, ranks), recipe, copy=False)


def _cuts(
    mine: Scores,
    by_name: Mapping[str, Sequence[Part]],
    sparsity: float,
    *,
    shapes: Mapping[str, Sequence[int]],
    ranks: Ranks,
    scope: str,
    floor: float,
    costs: Mapping[str, float] | None,
) -> tuple[dict[str, Cut], float | None]:
    """Return the cut of each part of some parameters, and the threshold; None without one."""
    order = [part for parts in by_name.values() for part in parts]
    shapes = {name: shapes[name] for name in by_name}
    floors = floor_counts(shapes, floor)
    cuts: dict[str, Cut] = {}
    counts: dict[str, int] = {}
    threshold = None
    if costs is not None:
        count = partial(_priced, mine, by_name, ranks)
        counts, threshold = counts_by_cost(shapes, costs, sparsity, floors, count)
    elif scope == "global":
        caps = {
            name: _find(mine, by_name[name], by_name[name][0].size - least, ranks, {})
            for name, least in floors.items()
            if least > 0
        }
        cut = _find(mine, order, global_count(shapes, sparsity), ranks, caps)
        cuts = _divided(mine, order, cut, ranks, caps)
        threshold = _core.score_of_key(cut.key) if cut.ties else None
    else:
        counts = layer_counts(shapes, sparsity, scope, floor)
    for name, number in counts.items():
        cut = _find(mine, by_name[name], number, ranks, {})
        cuts |= _divided(mine, by_name[name], cut, ranks, {})
    return cuts, threshold


def _priced(
    mine: Scores,
    by_name: Mapping[str, Sequence[Part]],
    ranks: Ranks,
    name: str,
    price: np.float32,
    upper: int | None,
) -> NDArray[np.uint64]:
    """Count the halves of the keys of a parameter's scores, divided by a price, of all ranks."""
    counts = np.zeros(2**16, np.uint64)
    for part in by_name[name]:
        if part.key in mine:
            counts += _core.count_keys(priced(mine[part.key], price), upper)
    return ranks.all_reduce(counts)


def _find(
    mine: Scores, parts: Sequence[Part], k: int, ranks: Ranks, caps: Mapping[str, Cut]
) -> Cut:
    """Return the cut after the `k` smallest scores of parts, with a cap on some parameters."""
    if k == 0:
        return Cut(0, 0)
    upper, left = _bin(mine, parts, None, k, ranks, caps)
    lower, ties = _bin(mine, parts, upper, left, ranks, caps)
    return Cut(upper << 16 | lower, ties)


def _bin(
    mine: Scores,
    parts: Sequence[Part],
    upper: int | None,
    k: int,
    ranks: Ranks,
    caps: Mapping[str, Cut],
) -> tuple[int, int]:
    """Return one half of the `k`-th smallest key, and how many of the `k` smallest share it."""
    counts = np.zeros(2**16, np.uint64)
    for part in parts:
        if part.key in mine:
            below = caps[part.name].key if part.name in caps else _ALL
            counts += _core.count_keys(mine[part.key], upper, below)
    counts = ranks.all_reduce(counts)
    for cap in caps.values():
        if upper is None:
            counts[cap.key >> 16] += np.uint64(cap.ties)
        elif cap.key >> 16 == upper:
            counts[cap.key & 0xFFFF] += np.uint64(cap.ties)
    reached = np.cumsum(counts)
    at = int(np.searchsorted(reached, k))
    before = int(reached[at - 1]) if at else 0
    return at, k - before


def _divided(
    mine: Scores, parts: Sequence[Part], cut: Cut, ranks: Ranks, caps: Mapping[str, Cut]
) -> dict[str, Cut]:
    """Return the cut of each part; equal scores are pruned in the order of parts, within caps."""
    lower = {name: cap for name, cap in caps.items() if cap.key < cut.key}
    equal: dict[str, int] = {}
    for part in parts:
        if part.key in mine:
            key = lower[part.name].key if part.name in lower else cut.key
            equal[part.key] = int(_core.count_keys(mine[part.key], key >> 16, _ALL)[key & 0xFFFF])
    for found in ranks.all_gather(equal):
        equal |= found
    left = cut.ties
    room = {name: cap.ties for name, cap in caps.items() if cap.key <= cut.key}
    cuts = {}
    for part in parts:
        if part.name in lower:
            ties = min(equal[part.key], room[part.name])
            cuts[part.key] = Cut(lower[part.name].key, ties)
        else:
            ties = min(equal[part.key], left, room.get(part.name, equal[part.key]))
            left -= ties
            cuts[part.key] = Cut(cut.key, ties)
        if part.name in room:
            room[part.name] -= ties
    return cuts


def assembled(
    kept: Mapping[str, NDArray[np.bool_]],
    shares: Sequence[Sequence[Part]],
    shapes: Mapping[str, Sequence[int]],
    ranks: Ranks,
) -> dict[str, Tensor]:
    """Return the masks of all parameters, from the bits of every rank's parts."""
    masks = {
        name: torch.empty(tuple(shape), dtype=torch.bool, device="cpu")
        for name, shape in shapes.items()
    }
    for owner, share in enumerate(shares):
        count = sum(map(len, share))
        if owner == ranks.rank and share:
            bits = torch.from_numpy(np.packbits(np.concatenate([kept[p.key] for p in share])))
        else:
            bits = torch.empty(-(-count // 8), dtype=torch.uint8, device="cpu")
        bits = ranks.broadcast(bits, owner, "masks")
        flat = torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool))
        start = 0
        for part in share:
            part.of(masks[part.name]).copy_(flat[start : start + len(part)])
            start += len(part)
    return masks
