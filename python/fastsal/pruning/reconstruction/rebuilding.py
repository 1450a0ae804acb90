"""The pass over the pruned model in which each layer is solved just before it runs.

So the inputs of a layer are those of the model whose earlier layers are solved already, and it
corrects what these left.

Axes: n images, R rows, G groups, O outputs of a layer, d inputs of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsal.gradients.precision import at_least_float32
from fastsal.gradients.rules.operations import Call, Operation
from fastsal.gradients.rules.windows import InputRows
from fastsal.pruning.reconstruction.dense_outputs import Target
from fastsal.pruning.reconstruction.expressions import evaluated, results_in
from fastsal.pruning.reconstruction.solving import solve_rows
from fastsal.pruning.reconstruction.tracing import Trace
from fastsal.utils.float64 import in_float64

# Numbers of a chunk of input rows, and its rows at least.
_CHUNK = 2**19
_CHUNK_ROWS = 512


class RebuildingTrace(Trace):
    """Solves the layers of a pruned model during a forward pass, in place.

    Args:
        model: The pruned model, with the normalization of the dense model.
        tracked: Name to weight.
        masks: Name to mask, True = kept.
        targets: What `DenseTrace` recorded on the same images.
        damping: Multiple of the mean diagonal of the moments of a layer.

    Attributes:
        solved: Names of the weights that were changed.
    """

    def __init__(
        self,
        model: nn.Module,
        tracked: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        targets: Mapping[str, Target],
        damping: float,
    ) -> None:
        super().__init__(tracked, model.buffers())
        self.solved: list[str] = []
        self._tracked, self._masks, self._targets = tracked, masks, targets
        self._damping = damping
        self._biases = own_biases(model)
        self._buffers = dict(model.named_buffers())
        # Number of a function to the number of the last layer that needs its result.
        self._awaited: dict[int, int] = {}
        for target in targets.values():
            for number in results_in(target.other):
                self._awaited[number] = max(self._awaited.get(number, 0), target.number)
        self._results: dict[int, Tensor] = {}

    def made(self, number: int, result: Tensor) -> None:
        """Keep a tensor that the output of a later layer is added to."""
        if number in self._awaited:
            self._results[number] = result

    def around(
        self, name: str, operation: Operation, call: Call, run: Callable[[], Tensor]
    ) -> Tensor:
        """Solve a layer, then run it."""
        del operation
        target = self._targets.get(name)
        self._results = {n: r for n, r in self._results.items() if self._awaited[n] >= self.calls}
        # Elsewhere the pass does not follow that of the dense model.
        if target is not None and target.number == self.calls and target.op == call.op:
            wanted = self._corrected(target)
            if self._solve(name, call, target, wanted):
                self.solved.append(name)
        return run()

    def _corrected(self, target: Target) -> Tensor:
        """Return the outputs `[R, O]` whose sum with another tensor is that of the dense model."""
        wanted = target.rows.full
        if target.other is None:
            return wanted
        return wanted - target.share_of(evaluated(target.other, self._results))

    def _solve(self, name: str, call: Call, target: Target, wanted: Tensor) -> bool:
        weight = self._tracked[name]
        bias = self._biases.get(name)
        mean = None if target.running_mean is None else self._buffers[target.running_mean]
        sums = _Sums.of(call, target, wanted, centered=bias is not None or mean is not None)
        start = in_float64(weight.detach()).reshape(call.groups, -1, sums.moments.shape[-1])
        kept = self._masks[name].to(start.device).reshape(start.shape)
        residuals = sums.products - torch.bmm(start, sums.moments)
        damping = self._damping * sums.moments.diagonal(dim1=1, dim2=2).mean(1)
        moved = start + solve_rows(sums.moments, residuals, kept, damping)
        if not bool(moved.isfinite().all()):
            return False
        weight.copy_(moved.reshape(weight.shape).to(weight.dtype))
        present = in_float64(weight.detach()).reshape(start.shape)  # as rounded
        constant = sums.target_mean - torch.bmm(present, sums.mean[:, :, None])[:, :, 0]
        if bias is not None:
            bias.copy_(constant.reshape(-1).to(bias.dtype))
        elif mean is not None:
            mean.sub_(constant.reshape(-1).to(mean.dtype).to(mean.device))
        return True


def chunk_bytes(width: int) -> int:
    """Return the bytes of a chunk of input rows of `width` numbers: read, centered, and scratch."""
    return 3 * 4 * max(_CHUNK, _CHUNK_ROWS * width)


@dataclass(frozen=True)
class _Sums:
    """Means over rows of a layer, float64.

    Attributes:
        moments: Second moments of the inputs `[G, d, d]`, about their means if centered.
        products: Of outputs and inputs `[G, O/G, d]`, in the same way.
        mean: Means of the inputs `[G, d]`; zero if not centered.
        target_mean: Means of the outputs `[G, O/G]`; zero if not centered.
    """

    moments: Tensor
    products: Tensor
    mean: Tensor
    target_mean: Tensor

    @classmethod
    def of(cls, call: Call, target: Target, wanted: Tensor, *, centered: bool) -> _Sums:
        """Return the means over the rows of a target."""
        step = max(_CHUNK_ROWS, _CHUNK // (call.groups * math.prod(call.weight_shape[1:])))
        inputs = InputRows(call, target.shape)
        sums: list[Tensor] = []
        shift: float | Tensor = 0.0
        for start in range(0, len(target.places), step):
            places = target.places[start : start + step]
            x = at_least_float32(inputs.at(places)).transpose(0, 1)
            y = wanted[start : start + step].reshape(len(places), call.groups, -1).transpose(0, 1)
            if centered:
                # Close to the mean, so that little is lost when it is subtracted in the end.
                shift = shift if isinstance(shift, Tensor) else x.mean(1, keepdim=True)
                x = x - shift
            some = [
                in_float64(torch.bmm(x.transpose(1, 2), x)),
                in_float64(torch.bmm(y.transpose(1, 2), x)),
                in_float64(x.sum(1)),
                in_float64(y.sum(1)),
            ]
            sums = [a.add_(b) for a, b in zip(sums, some, strict=True)] if sums else some
        moments, products, mean, target_mean = (value / len(target.places) for value in sums)
        if not isinstance(shift, Tensor):
            return cls(moments, products, torch.zeros_like(mean), torch.zeros_like(target_mean))
        moments -= mean[:, :, None] * mean[:, None]
        products -= target_mean[:, :, None] * mean[:, None]
        return cls(moments, products, mean + in_float64(shift[:, 0]), target_mean)


def own_biases(model: nn.Module) -> dict[str, Tensor]:
    """Return the bias of each weight, by the name of the weight; shared ones are left out."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Tensor] = {}
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        weight, bias = (getattr(module, key, None) for key in ("weight", "bias"))
        if isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter):
            owners.setdefault(id(bias), set()).add(id(weight))
            if id(weight) in names:
                found[names[id(weight)]] = bias
    return {name: bias for name, bias in found.items() if len(owners[id(bias)]) == 1}
