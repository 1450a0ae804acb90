"""The processes of a job and their communication, of which every byte is counted.

Ranks meet ahead of every exchange except that of rows: each says what it is about to exchange, or
that it has failed. So a rank that fails ends all ranks at their next exchange, and ranks that make
different calls get an error instead of each other's data. Rows are exchanged in rounds of a fixed
order (`exchange.py`), with a meeting ahead of each round.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from fastsal.distributed.failures import (
    FailedRankError,
    LostRankError,
    decoded,
    encoded,
    is_loss,
    is_told,
    mark_told,
    name_rank,
)
from fastsal.errors import InvalidArgument

__all__ = ["FailedRankError", "LostRankError", "Ranks"]

_Item = TypeVar("_Item")
# Longest name of an exchange that is told where ranks differ.
_MOST_NAME = 200
# How many blocks of `Ranks.together` are active in a thread.
_blocks = threading.local()


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
        """Return the rows of every rank to their owner, None to others. All have the same shape.

        All ranks must call it in the same order, as they do not meet ahead of it.
        """
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
        self._meet("counts")
        with self._reporting_loss():
            dist.all_reduce(mine, group=self._group)
        self.sent["counts"] += self._reduced(mine)
        return mine.cpu().numpy().astype(np.uint64)

    def reduce(self, values: Tensor, owner: int) -> Tensor:
        """Return the sum over all ranks to its owner; others get their own values back."""
        mine = values.to(self._device).clone()
        self._meet(f"sums of rank {owner}")
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
        self._meet(f"{what} of rank {owner}")
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
        return [pickle.loads(said) for said in self._meet("values", pickle.dumps(value))]

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Raise InvalidArgument unless all ranks pass the same values, by the names of arguments.

        Args:
            values: Name to a plain value. Any others cannot be compared and are left out.
        """
        plain = (str, int, float, bool, type(None))
        mine = {name: value for name, value in values.items() if isinstance(value, plain)}
        found = self.all_gather(mine)
        for name in sorted(set().union(*found)):
            given = [of_rank.get(name) for of_rank in found]
            if len(set(map(repr, given))) > 1:
                raise InvalidArgument(f"{name} must be the same on every rank, got {given}")

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Raise an error in the block on all ranks if it is raised on one.

        Errors of fastsal have the same type on all ranks; any other is a FailedRankError on those
        that did not fail. After an error that all ranks know of, they can go on to exchange data.

        Args:
            what: What the block does, for the message to a rank that does something else.

        Raises:
            LostRankError: Another process ended.
            FailedRankError: Another rank failed, or made a different call.
        """
        depth = getattr(_blocks, "depth", 0)
        _blocks.depth = depth + 1
        try:
            yield
        except BaseException as error:
            if not is_told(error):
                mark_told(error)
                # The reason why this rank fails is its own error, even if another is lost.
                with contextlib.suppress(LostRankError):
                    self._meet(what, failure=error)
            if depth == 0:
                mark_told(error, is_told=False)  # the same object may be raised again
            raise
        finally:
            _blocks.depth = depth
        self._meet(f"the end of {what}")

    def _meet(
        self, what: str, payload: bytes = b"", failure: BaseException | None = None
    ) -> list[bytes]:
        """Wait for all ranks ahead of an exchange; returns the payload of each.

        If a rank has failed, the others raise its error, and a rank that has failed returns.
        """
        said = payload if failure is None else encoded(failure)
        header = [int(failure is not None), zlib.crc32(what.encode()), len(said)]
        headers = [h.tolist() for h in self._gathered(torch.tensor(header, device="cpu"))]
        failed = [rank for rank, (is_failed, _, _) in enumerate(headers) if is_failed]
        if failed:
            texts = self._texts(said, [size if bad else 0 for bad, _, size in headers])
            if failure is None:
                raise mark_told(decoded(texts[failed[0]], failed[0], self.size))
            if len(set(texts)) > 1:
                name_rank(failure, self.rank, self.size)
            return texts
        if len({tag for _, tag, _ in headers}) > 1:
            name = what.encode()[:_MOST_NAME].ljust(_MOST_NAME)
            names = [text.decode().strip() for text in self._texts(name, [_MOST_NAME] * self.size)]
            raise mark_told(
                FailedRankError(
                    "ranks must make the same calls with the same arguments, but they exchange "
                    + ", ".join(f"{name!r} (rank {rank})" for rank, name in enumerate(names))
                )
            )
        return self._texts(said, [size for _, _, size in headers])

    def _texts(self, mine: bytes, sizes: Sequence[int]) -> list[bytes]:
        """Return the bytes of every rank, of known sizes; a size of zero sends nothing."""
        most = max(sizes)
        if most == 0:
            return [b""] * len(sizes)
        padded = torch.zeros(most, dtype=torch.uint8, device="cpu")
        own = sizes[self.rank]
        padded[:own] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)[:own] if own else 0
        found = self._gathered(padded)
        return [bytes(f[:n].numpy()) for f, n in zip(found, sizes, strict=True)]

    def _gathered(self, mine: Tensor) -> list[Tensor]:
        """Return a small tensor of every rank, all of the same shape."""
        here = mine.to(self._device)
        found = [torch.empty_like(here) for _ in range(self.size)]
        with self._reporting_loss():
            dist.all_gather(found, here, group=self._group)
        return [tensor.cpu() for tensor in found]

    def _reduced(self, tensor: Tensor) -> int:
        # In a ring, every rank sends all but its share, twice.
        return 2 * tensor.numel() * tensor.element_size() * (self.size - 1) // self.size

    def _global(self, rank: int) -> int:
        return rank if self._group is None else dist.get_global_rank(self._group, rank)

    @contextlib.contextmanager
    def _reporting_loss(self) -> Iterator[None]:
        """Turn the error of a collective that lost a peer into LostRankError.

        Other ranks cannot be told of either, as they wait in the collective that failed.
        """
        try:
            yield
        except RuntimeError as error:
            if not is_loss(error):
                mark_told(error)
                raise
            line = next(iter(str(error).strip().splitlines()), "no reason given")
            raise mark_told(
                LostRankError(
                    f"rank {self.rank} of {self.size}: another rank ended or cannot be reached "
                    f"({line}); rerun the same command, which resumes from its checkpoint if it "
                    "has one"
                )
            ) from error
