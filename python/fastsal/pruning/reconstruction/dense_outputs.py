"""What the layers of the dense model compute on some images, for the pruned model to restore.

Axes: n images, R rows (vectors of a linear layer, or pixels), O outputs of a layer, d inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastsal.gradients.precision import at_least_float32
from fastsal.gradients.rules.operations import Call, Operation
from fastsal.gradients.rules.windows import output_rows
from fastsal.pruning.reconstruction.expressions import Expression, Result
from fastsal.pruning.reconstruction.tracing import Branch, Trace

# Rows of a layer for each of its inputs, and at least. Pixels of an image depend on each other.
_ROWS_PER_INPUT = 16
_LEAST_ROWS = 2**16
# Of the largest factor on an output.
_LEAST_SCALE = 1e-4
_SUPPORTED = ("linear", "conv1d", "conv2d", "conv3d")


@dataclass(frozen=True)
class Rows:
    """Rows `[R, O]` in half precision, relative to the largest number; float64 as it is.

    Attributes:
        values: Float16, or float64.
        scale: What they are multiplied by.
    """

    values: Tensor
    scale: Tensor | float

    @classmethod
    def of(cls, rows: Tensor) -> Rows:
        """Store rows."""
        if rows.dtype == torch.float64:
            return cls(rows, 1.0)
        scale = rows.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
        return cls((rows / scale).half(), scale)

    @property
    def full(self) -> Tensor:
        """The rows, float32 or float64."""
        is_half = self.values.dtype == torch.float16
        return self.values.float() * self.scale if is_half else self.values


@dataclass(frozen=True)
class Target:
    """What the outputs of one layer of the pruned model should be.

    Attributes:
        op: Name of its operation.
        number: Number of functions of the forward pass before it.
        shape: Shape of its output for all images.
        places: `[R]`, the rows that are restored.
        rows: Outputs of the dense model `[R, O]`; with `other`, plus that of the dense model
            divided by `scale`.
        running_mean: Name of the running mean of a batch normalization of the output, if any.
        other: What the output is added to, from results of functions before the layer; None if it
            is added to nothing, or to something else.
        scale: `[O]`, factor on the output before it is added; None for one.
    """

    op: str
    number: int
    shape: torch.Size
    places: Tensor
    rows: Rows
    running_mean: str | None = None
    other: Result | Expression | None = None
    scale: Tensor | None = None

    def share_of(self, other: Tensor) -> Tensor:
        """Return rows of what the output is added to, divided by the factor on the output.

        Outputs whose factor is tiny cannot make up for anything: zero.
        """
        rows = at_least_float32(output_rows(self.op, other, self.places))
        if self.scale is None:
            return rows
        usable = self.scale.abs() > _LEAST_SCALE * self.scale.abs().max()
        inverse = torch.where(usable, 1 / self.scale, 0.0).to(rows.dtype)
        return rows * inverse.to(rows.device)


class DenseTrace(Trace):
    """Records the targets of a forward pass of the dense model.

    Args:
        model: The model.
        tracked: Name to weight.
        generator: Draws the places.
        most_rows: Rows of a layer at most.

    Attributes:
        targets: Name to target. Layers that are called more than once are left out.
    """

    def __init__(
        self,
        model: nn.Module,
        tracked: Mapping[str, Tensor],
        generator: torch.Generator,
        most_rows: int,
    ) -> None:
        super().__init__(tracked, model.buffers())
        self.targets: dict[str, Target] = {}
        self._generator, self._most_rows = generator, most_rows
        self._buffers = {id(b): name for name, b in model.named_buffers()}
        self._called: set[str] = set()

    def around(
        self, name: str, operation: Operation, call: Call, run: Callable[[], Tensor]
    ) -> Tensor:
        """Record the output of a layer."""
        output = run()
        is_first = name not in self._called
        self._called.add(name)
        if not is_first or operation.name not in _SUPPORTED:
            self.targets.pop(name, None)
            return output
        outputs, *inputs = call.weight_shape
        total = output.numel() // outputs
        wanted = max(_LEAST_ROWS, _ROWS_PER_INPUT * math.prod(inputs))
        places = torch.randperm(total, generator=self._generator, device="cpu")
        places = places[: min(total, wanted, self._most_rows)].sort().values.to(output.device)
        rows = at_least_float32(output_rows(call.op, output, places))
        self.targets[name] = Target(call.op, self.calls, output.shape, places, Rows.of(rows))
        self.start(name, call.op, output)
        return output

    def normalized(self, branch: Branch, running_mean: Tensor) -> None:
        """Note the running mean that can take up a constant."""
        if (target := self.targets.get(branch.name)) is not None:
            mean = self._buffers.get(id(running_mean))
            self.targets[branch.name] = replace(target, running_mean=mean)

    def added(self, branch: Branch, other: Tensor) -> None:
        """Note what the output of a layer is added to."""
        target = self.targets.get(branch.name)
        expression = None if target is None else self.expression_of(other, target.number)
        if target is None or expression is None:
            return
        target = replace(target, other=expression, scale=branch.scale)
        rows = Rows.of(target.rows.full + target.share_of(other))
        self.targets[branch.name] = replace(target, rows=rows)
