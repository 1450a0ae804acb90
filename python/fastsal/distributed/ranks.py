"""The processes of a job, and what they tell each other; every byte is counted."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from fastsal.errors import FactorizationError, FastsalError, InvalidArgument
from fastsal.fisher.statistics import Statistics

_Item = TypeVar("_Item")


class LostRankError(FastsalError, ConnectionError):
    """Another process of the job ended, or cannot be reached."""


class Ranks:
    """A group of processes.

    Args:
        group: Of `torch.distributed`; None is all processes.

    Attributes:
        rank: This process, from 0.
        size: Number of processes.
        sent: What was sent to bytes that left this process.
        in_flight: The most bytes of rows from all ranks that came here at once.

    Raises:
        InvalidArgument: `torch.distributed` is not set up.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise InvalidArgument(
                "group: torch.distributed is not set up; run under torchrun and call "
                "torch.distributed.init_process_group first"
            )
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.sent: Counter[str] = Counter()
        self.in_flight = 0
        is_nccl = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if is_nccl else "cpu"

    def gather(self, rows: Tensor, owner: int) -> list[Tensor] | None:
        """Rows of every rank, at their owner; None elsewhere. All have the same shape and type."""
        mine = rows.to(self._device).contiguous()
        there = [torch.empty_like(mine) for _ in range(self.size)] if owner == self.rank else None
        with self._told():
            dist.gather(mine, there, self._global(owner), group=self._group)
        if owner == self.rank:
            self.in_flight = max(self.in_flight, self.size * mine.nbytes)
        else:
            self.sent["rows"] += mine.nbytes
        return there

    def add(self, counts: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The sum of counts over all ranks."""
        mine = torch.from_numpy(counts.astype(np.int64)).to(self._device)
        with self._told():
            dist.all_reduce(mine, group=self._group)
        self.sent["counts"] += self._reduced(mine)
        return mine.cpu().numpy().astype(np.uint64)

    def reduce(self, values: Tensor, owner: int) -> Tensor:
        """The sum over all ranks, at its owner; others get their own values back."""
        mine = values.to(self._device).clone()
        with self._told():
            dist.reduce(mine, self._global(owner), group=self._group)
        if owner != self.rank:
            self.sent["sums"] += values.numel() * values.element_size()
        return mine.cpu()

    def give(self, tensor: Tensor, owner: int, what: str) -> Tensor:
        """The owner's tensor; others give one of the same shape and type to be filled."""
        there = tensor.to(self._device).contiguous()
        with self._told():
            dist.broadcast(there, self._global(owner), group=self._group)
        if owner == self.rank:
            self.sent[what] += tensor.numel() * tensor.element_size() * (self.size - 1)
        return there.to(tensor.device)

    def dealt(self, items: Sequence[_Item]) -> list[_Item]:
        """This rank's of some items, which are dealt out in turn; there may be none."""
        return list(items[self.rank :: self.size])

    def every(self, value: Any) -> list[Any]:
        """A small value of every rank, in order."""
        values = [None] * self.size
        with self._told():
            dist.all_gather_object(values, value, group=self._group)
        return values

    @contextlib.contextmanager
    def failing_together(self, statistics: Statistics) -> Iterator[None]:
        """Let a block that cannot be factored on one rank end what all of them do in the block.

        Args:
            statistics: The statistics that are used in it.

        Raises:
            FactorizationError: On every rank, where one raised it.
        """
        failure: FactorizationError | None = None
        try:
            yield
        except FactorizationError as error:
            failure = error
        if failure is not None:
            statistics.finish()
        said = [text for text in self.every(str(failure) if failure else None) if text]
        if said:
            raise failure or FactorizationError(said[0])

    def _reduced(self, tensor: Tensor) -> int:
        # A ring: every rank sends all but its share, twice.
        return 2 * tensor.numel() * tensor.element_size() * (self.size - 1) // self.size

    def _global(self, rank: int) -> int:
        return rank if self._group is None else dist.get_global_rank(self._group, rank)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            line = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
            raise LostRankError(
                f"rank {self.rank} of {self.size}: another rank ended or cannot be reached "
                f"({line}); start the same command again, it goes on from its checkpoint"
            ) from None
