"""Zeros of the layers of a run, of masks and of weights in use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LayerZeros:
    """Zeros of a masked parameter.

    Attributes:
        name: Name of the parameter.
        shape: Its shape.
        kept: Number of weights that the mask keeps.
        sparsity: Fraction that the mask prunes.
        effective: Fraction of zeros of the weight in use: kept weights may be zero, and a layer may
            compute its weight from the parameter.
        empty_outputs: Number of outputs without a kept weight.
        empty_inputs: Number of inputs without a kept weight; None for a vector.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    sparsity: float
    effective: float
    empty_outputs: int
    empty_inputs: int | None


def layers_of(
    masks: Mapping[str, Tensor], state: Mapping[str, Tensor], computed: Mapping[str, float]
) -> list[LayerZeros]:
    """Count the zeros of each masked parameter.

    Args:
        masks: Name to mask, True for kept weights.
        state: Name to weights.
        computed: Name to the fraction of zeros of the weight in use, where a layer computes it.
    """
    found = []
    for name, mask in masks.items():
        rows = mask.reshape(len(mask), -1)
        inputs = mask.transpose(0, 1).flatten(1) if mask.ndim > 1 else None
        kept = int(mask.sum())
        found.append(
            LayerZeros(
                name=name,
                shape=tuple(mask.shape),
                kept=kept,
                sparsity=1 - kept / mask.numel(),
                effective=computed.get(name, int((state[name] == 0).sum()) / mask.numel()),
                empty_outputs=int((~rows.any(dim=1)).sum()),
                empty_inputs=None if inputs is None else int((~inputs.any(dim=1)).sum()),
            )
        )
    return found
