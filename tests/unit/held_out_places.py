"""The places of the samples that are held out for the choice of a damping, as a mask."""

from __future__ import annotations

import torch

from fastsal.data.held_out import HeldOutSamples


def held_out_mask(n, seed=0):
    """Whether each of n samples is held out, `[n]`."""
    pairs = [(torch.arange(n)[:, None], None)]
    mask = torch.zeros(n, dtype=torch.bool)
    for places, _ in HeldOutSamples(lambda: pairs, seed=seed):
        mask[places[:, 0]] = True
    assert mask.any()
    return mask
