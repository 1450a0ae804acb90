"""The processes of a job and their communication, of which every byte is counted."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
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
    """Another process of the job ended or cannot be reached."""


class Ranks:
    """The processes of a job.

    Args:
        group: Process group of `torch.distributed`; None is all processes.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        sent: Kind of data to the bytes that this process sent.
        in_flight: Most bytes of gradients that this process received at once.

    Raises:
        InvalidArgument: `torch.distributed` is not initialized.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise InvalidArgument(
                "torch.distributed is not initialized; run under torchrun and call "
                "torch.distributed.init_process_group first"
            )
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.sent: Counter[str] = Counter()
        self.in_flight = 0
        is_nccl = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if is_nccl else "cpu"

    def __repr__(self) -> str:
        return f"Ranks(rank={self.rank}, size={self.size})"

    def gather(self, rows: Tensor, owner: int) -> list[Tensor] | None:
        """Return the rows of every rank to their owner, None to others. All have the same shape."""
        mine = rows.to(self._device).contiguous()
        there = [torch.empty_like(mine) for _ in range(self.size)] if owner == self.rank else None
        with self._reporting_loss():
            dist.gather(mine, there, self._global(owner), group=self._group)
        if owner == self.rank:
            self.in_flight = max(self.in_flight, self.size * mine.nbytes)
        else:
            self.sent["rows"] += mine.nbytes
        return there

    def all_reduce(self, counts: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return the sum of counts over all ranks."""
        mine = torch.from_numpy(counts.astype(np.int64)).to(self._device)
        with self._reporting_loss():
            dist.all_reduce(mine, group=self._group)
        self.sent["counts"] += self._reduced(mine)
        return mine.cpu().numpy().astype(np.uint64)

    def reduce(self, values: Tensor, owner: int) -> Tensor:
        """Return the sum over all ranks to its owner; others get their own values back."""
        mine = values.to(self._device).clone()
        with self._reporting_loss():
            dist.reduce(mine, self._global(owner), group=self._group)
        if owner != self.rank:
            self.sent["sums"] += values.numel() * values.element_size()
        return mine.cpu()

    def broadcast(self, tensor: Tensor, owner: int, what: str) -> Tensor:
        """Return the owner's tensor; others pass one of the same shape and type.

        Args:
            tensor: The tensor.
            owner: Rank of the process that sends it.
            what: Kind of data, for `sent`.
        """
        there = tensor.to(self._device).contiguous()
        with self._reporting_loss():
            dist.broadcast(there, self._global(owner), group=self._group)
        if owner == self.rank:
            self.sent[what] += tensor.numel() * tensor.element_size() * (self.size - 1)
        return there.to(tensor.device)

    def dealt(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Yield the items of this rank, of those that ranks receive in turn; may be empty."""
        return itertools.islice(items, self.rank, None, self.size)

    def all_gather(self, value: Any) -> list[Any]:
        """Return a small value of every rank, in order."""
        values = [None] * self.size
        with self._reporting_loss():
            dist.all_gather_object(values, value, group=self._group)
        return values

    @contextlib.contextmanager
    def failing_together(self, statistics: Statistics) -> Iterator[None]:
        """Raise FactorizationError on all ranks if one raises it in the block.

        Args:
            statistics: The statistics that the block uses.

        Raises:
            FactorizationError: One rank raised it.
        """
        failure: FactorizationError | None = None
        try:
            yield
        except FactorizationError as error:
            failure = error
        if failure is not None:
            statistics.finish()
        said = [text for text in self.all_gather(str(failure) if failure else None) if text]
        if said:
            raise failure or FactorizationError(said[0])

    def _reduced(self, tensor: Tensor) -> int:
        # In a ring, every rank sends all but its share, twice.
        return 2 * tensor.numel() * tensor.element_size() * (self.size - 1) // self.size

    def _global(self, rank: int) -> int:
        return rank if self._group is None else dist.get_global_rank(self._group, rank)

    @contextlib.contextmanager
    def _reporting_loss(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            line = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
            raise LostRankError(
                f"rank {self.rank} of {self.size}: another rank ended or cannot be reached "
                f"({line}); rerun the same command, which resumes from its checkpoint if it has one"
            ) from None
