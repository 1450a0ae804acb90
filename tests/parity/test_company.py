"""What is computed for a block does not depend on the blocks beside it, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastsal
from fastsal import BlockFisher

B = 64
DAMPING = 1e-8

pytestmark = pytest.mark.usefixtures("one_thread")


class Holder(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w.clone())


def everything(gradients, weights, mask):
    """Scores, compensated weights and inverses of one parameter, each `[d]`."""
    fisher = BlockFisher({"w": weights.shape}, block_size=B, precision="float64")
    fisher.update({"w": gradients})
    model = Holder(weights)
    found = {
        criterion: fastsal.score(model, fisher, criterion, DAMPING)["w"]
        for criterion in ("diag-fisher", "block-fisher", "obs-greedy")
    }
    found["inverse"] = torch.from_numpy(fisher.inverse_diagonals(DAMPING)["w"].values)
    fastsal.compensate(model, fisher, {"w": mask}, DAMPING)
    found["compensated"] = model.w.detach()
    return found


@pytest.mark.parametrize("full", [1, 2, 3])
def test_a_short_last_block_beside_others(full):
    """All sizes of the last block; the full ones before it are an even and an odd number."""
    generator = torch.Generator().manual_seed(full)
    for last in range(1, B + 1):
        d = full * B + last
        # More samples than a block's dual form takes, so that both sides keep packed blocks.
        gradients = torch.randn(40, d, generator=generator)
        weights = torch.randn(d, generator=generator)
        mask = torch.rand(d, generator=generator) < 0.5
        together = everything(gradients, weights, mask)
        for part in (slice(full * B, d), slice((full - 1) * B, full * B)):
            alone = everything(gradients[:, part], weights[part], mask[part])
            for name, values in alone.items():
                assert torch.equal(values, together[name][part]), (name, last)
