"""Commands under `torchrun`: the process group and the output of rank 0."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


def world_size() -> int:
    """Return the number of processes of this job; 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def joined() -> Iterator[int]:
    """Join the process group of the job inside the block and yield the rank; 0 for one process.

    Only rank 0 prints to stdout. An error of one rank is raised on all.
    """
    if world_size() == 1:
        yield 0
        return
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl"
    dist.init_process_group(backend)
    from fastsal.distributed.ranks import Ranks

    ranks = Ranks()
    rank = ranks.rank
    with contextlib.ExitStack() as stack:
        # Also before and after the model is pruned: a file may be missing on one machine, and only
        # rank 0 writes the result.
        stack.enter_context(ranks.together("the command"))
        if rank:
            silent = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silent))
        yield rank
    sys.stdout.flush()
    # Not in a `finally`: after the loss of a rank this call would wait for it forever.
    dist.destroy_process_group()
