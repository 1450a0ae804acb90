"""Boolean tensors from masks of any type."""

from __future__ import annotations

import torch
from torch import Tensor


def boolean(values: Tensor) -> Tensor:
    """Return True where values are not zero, as a new tensor.

    A boolean tensor that views other memory (`uint8.view(torch.bool)`, a BOOL tensor of a file) can
    hold bytes other than 0 and 1, about which the operations of PyTorch disagree. Its bytes are
    read: any byte but zero is True.
    """
    if values.dtype == torch.bool:
        values = values.view(torch.uint8)
    return values != 0
