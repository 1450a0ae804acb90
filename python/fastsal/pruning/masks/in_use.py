"""The sparsity of the weights in use, where layers compute them from the masked parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from fastsal.gradients.weights_in_use import lost_zeros, zeros_in_use


@dataclass(frozen=True)
class InUse:
    """Zeros of the weights that convolutions and linear maps use.

    Attributes:
        sparsity: Fraction of zeros, over all masked parameters: those of the weight in use where a
            layer computes it from the parameter, else those of the mask.
        computed: Name of a parameter with fewer zeros in use than its mask, to the fraction of
            zeros of the weight in use.
    """

    sparsity: float
    computed: dict[str, float]

    def __str__(self) -> str:
        if not self.computed:
            return f"weights in use: sparsity {self.sparsity:.4f}"
        some = next(iter(self.computed))
        count = len(self.computed)
        who = "1 layer computes its" if count == 1 else f"{count} layers compute their"
        return (
            f"weights in use: sparsity {self.sparsity:.4f}, as {who} weight from the masked "
            f"parameter, {'' if count == 1 else 'such as '}that of {some!r} with "
            f"{self.computed[some]:.4f} of zeros"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def count_in_use(
    masks: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    model: nn.Module,
    images: Tensor | None = None,
) -> InUse | None:
    """Count the zeros of the weights in use of a masked model.

    Args:
        masks: Name to mask.
        parameters: The masked parameters, by the same names.
        model: The model that has them, perhaps by other names.
        images: `[n, ...]`, of which two run once if a layer may compute its weight; None makes them
            up.

    Returns:
        The count; None if it is not known, as the model does not run on these images.
    """
    own = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    values = {own[id(p)]: p.detach() for p in parameters.values()}
    found = zeros_in_use(model, values, images)
    if found is None:
        return None
    lost = set(lost_zeros(values, found))
    zeros, total, computed = 0.0, 0, {}
    for name, mask in masks.items():
        inner = own[id(parameters[name])]
        total += mask.numel()
        if inner in lost:
            computed[name] = found[inner].fraction
            zeros += computed[name] * mask.numel()
        else:
            zeros += int((~mask).sum())
    return InUse(zeros / total, computed)
