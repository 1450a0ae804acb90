"""Commands under `torchrun`: who does the talking, and what ends together."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


def world_size() -> int:
    """Processes of this job, 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def joined() -> Iterator[int]:
    """Join the other ranks of a job inside the block, if there are some; yields this one's number.

    All but rank 0 are silent on stdout.
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
    rank = dist.get_rank()
    with contextlib.ExitStack() as stack:
        if rank:
            silent = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silent))
        yield rank
    sys.stdout.flush()
    # Not in a `finally`: where a rank was lost this would wait for it.
    dist.destroy_process_group()
