"""How an error of one rank becomes an error of all ranks.

A rank that fails tells the others at their next exchange, so that none waits for it. Errors of
fastsal have the same type on all ranks, so that a caller can catch them on all; any other error is
a `FailedRankError` on the ranks that did not fail.
"""

from __future__ import annotations

import json
import re

import torch

import fastsal.errors as known_errors
from fastsal.errors import FastsalError

# Longest text of an error that is sent.
_MOST_TEXT = 2000
_TOLD = "is_told_to_ranks"

# How gloo, NCCL and sockets report that a process ended or does not answer.
_LOST = re.compile(
    r"connection (was |is )?(closed|reset|refused|aborted|timed)|(closed|reset) by (remote )?peer"
    r"|broken pipe|timed? ?out\b|remote process (has )?exited|network error|socket|unreachable"
    r"|communicator (was|is|has been) aborted|pair closure",
    re.IGNORECASE,
)


class LostRankError(FastsalError, ConnectionError):
    """Another process of the job ended or cannot be reached."""


class FailedRankError(FastsalError, RuntimeError):
    """Another process of the job failed, or the processes made different calls."""


def is_loss(error: RuntimeError) -> bool:
    """Whether an error of a collective means that another process ended or does not answer."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    network = getattr(torch.distributed, "DistNetworkError", None)
    return (network is not None and isinstance(error, network)) or bool(_LOST.search(str(error)))


def is_told(error: BaseException) -> bool:
    """Whether all ranks know of an error, or cannot be told."""
    return getattr(error, _TOLD, False)


def mark_told(error: BaseException, *, is_told: bool = True) -> BaseException:
    """Mark an error as one that all ranks know of, or that they cannot be told; returns it."""
    setattr(error, _TOLD, is_told)
    return error


def encoded(error: BaseException) -> bytes:
    """Return the type and the message of an error, to be sent to the other ranks."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and not isinstance(error, FastsalError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return json.dumps([type(error).__name__, text[:_MOST_TEXT]]).encode()


def decoded(said: bytes, rank: int, size: int) -> FastsalError:
    """Return the error of another rank, as this one raises it.

    Args:
        said: What the rank sent.
        rank: The rank that failed.
        size: Number of ranks.
    """
    kind, text = json.loads(said)
    known = getattr(known_errors, kind, None)
    if isinstance(known, type) and issubclass(known, FastsalError):
        return known(f"rank {rank} of {size}: {text}")
    return FailedRankError(f"rank {rank} of {size} failed: {kind}" + (f": {text}" if text else ""))


def name_rank(error: BaseException, rank: int, size: int) -> None:
    """Add the rank that failed to the message of its error; errors of others get a note."""
    where = f"rank {rank} of {size}"
    if isinstance(error, FastsalError):
        error.args = (f"{where}: {error}",)
    elif hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(f"{where} failed")
