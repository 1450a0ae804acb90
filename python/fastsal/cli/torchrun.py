"""Commands under `torchrun`: the process group and the output of rank 0."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from fastsal.errors import InvalidArgument
from fastsal.utils.devices import resolve_device


def world_size() -> int:
    """Return the number of processes of this job; 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def joined(device: str) -> Iterator[int]:
    """Join the process group of the job inside the block and yield the rank; 0 for one process.

    Only rank 0 prints to stdout. An error of one rank is raised on all. With GPUs each process has
    the one of its LOCAL_RANK as the current device, which `"auto"` and `"cuda"` name.

    Args:
        device: `--device`.

    Raises:
        InvalidArgument: Processes of this machine would share a GPU.
    """
    if world_size() == 1:
        yield 0
        return
    import torch.distributed as dist

    dist.init_process_group("nccl" if _own_gpu(device) else "gloo")
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


def _own_gpu(device: str) -> bool:
    """Make the GPU of this process the current one; False if the job runs without GPUs."""
    import torch

    if device in ("cpu", "mps") or (device == "auto" and not torch.cuda.is_available()):
        return False
    rank, processes = (int(os.environ.get(f"LOCAL_{n}", "0")) for n in ("RANK", "WORLD_SIZE"))
    if device not in ("auto", "cuda") and processes > 1:
        raise InvalidArgument(
            f"--device must be auto, cpu or cuda under torchrun, got {device!r}, which "
            f"{processes} processes of this machine would share"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count and processes > count:
        raise InvalidArgument(
            f"--device must be cpu for more processes than GPUs, got {device!r} for {processes} "
            f"processes and {count} GPUs on this machine"
        )
    place = resolve_device(device)
    torch.cuda.set_device(rank if processes > 1 else place)
    return True
