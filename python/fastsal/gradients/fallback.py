"""Per-sample gradients without a rule: `torch.func`, or one sample at a time if that fails.

Slower than a rule, and correct for any use of a parameter that autograd can differentiate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.overrides import TorchFunctionMode

from fastsal.errors import UnsupportedLayer
from fastsal.gradients.precision import at_least_float32, row_dtype
from fastsal.gradients.scaling import LossScale, all_finite
from fastsal.gradients.state import replaced
from fastsal.models.evaluating import twice

# Limit for the rows of all fallback parameters of one chunk of samples.
_ROW_BYTES = 128 * 2**20


class _Inert(TorchFunctionMode):
    """No-op mode; an active mode disables the inference-only path of nn.MultiheadAttention."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


# run_model(model, images) -> outputs
RunModel = Callable[[nn.Module, Tensor], Any]


class Fallback:
    """Computes rows of the parameters that no rule supports.

    Attributes:
        reasons: Parameter name to the reason why no rule supports it.
        looped: The error of `torch.func` since which samples are processed one at a time, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        reasons: Mapping[str, str],
        losses: Callable[[Any, Any], Tensor],
        context: Callable[[], contextlib.AbstractContextManager[Any]],
        run_model: RunModel,
        scale: LossScale,
    ) -> None:
        self._model = model
        self._run_model = run_model
        self._parameters = dict(parameters)
        self.reasons = dict(reasons)
        self._losses = losses
        self._context = context
        self._scale = scale
        self.looped: str | None = None

    def rows(self, images: Tensor, labels: Tensor, sink: Callable[[str, Tensor], None]) -> None:
        """Call `sink(name, rows [n, *shape])` once per parameter, for all samples."""
        n = images.shape[0]
        chunk = self._chunk(n)
        parts: dict[str, list[Tensor]] = {name: [] for name in self._parameters}
        for start in range(0, n, chunk):
            part = slice(start, start + chunk)
            for name, value in self._chunk_rows(images[part], labels[part]).items():
                parts[name].append(value)
        for name, values in parts.items():
            sink(name, values[0] if len(values) == 1 else torch.cat(values))
            values.clear()

    def _chunk(self, n: int) -> int:
        size = sum(p.numel() * row_dtype(p).itemsize for p in self._parameters.values())
        return max(1, min(n, _ROW_BYTES // max(1, size)))

    def _chunk_rows(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute the rows of a chunk, with a loss scale that does not overflow."""
        while True:
            rows = self._scaled_rows(images, labels)
            is_fine = not self._scale.is_active or all_finite(rows.values())
            if is_fine or not self._scale.back_off():
                break
        return {name: self._scale.undone(at_least_float32(r)) for name, r in rows.items()}

    def _scaled_rows(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.looped is None:
            try:
                with self._context(), _Inert():
                    return self._vmapped(images, labels)
            except Exception as error:
                self.looped = _first_line(error)
        try:
            with self._context(), _Inert():
                return self._one_by_one(images, labels)
        except Exception as error:
            listed = "; ".join(f"{name}: {why}" for name, why in self.reasons.items())
            raise UnsupportedLayer(
                f"no per-sample gradient for {listed}. torch.func failed: {self.looped}. "
                f"One sample at a time failed: {_first_line(error)}"
            ) from error

    def _loss(self, parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        with replaced(self._model, self._parameters, parameters):
            outputs = self._called(image.unsqueeze(0))
        return self._scale.scaled(self._losses(outputs, label.unsqueeze(0)).sum())

    def _called(self, images: Tensor) -> Any:
        return self._run_model(self._model, images)

    def _vmapped(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        values = {name: p.detach() for name, p in self._parameters.items()}
        per_sample = vmap(grad(self._loss), in_dims=(None, 0, 0), randomness="different")
        # A copy, as the model may modify it in place, and the pass may fail.
        result: dict[str, Tensor] = per_sample(values, images.clone(), labels)
        return result

    def _one_by_one(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        rows = {
            name: p.new_zeros((images.shape[0], *p.shape)) for name, p in self._parameters.items()
        }
        for i in range(images.shape[0]):
            image, label = twice(images[i : i + 1]), twice(labels[i : i + 1])

            def gradients(
                copies: Mapping[str, Tensor], image: Tensor = image, label: Tensor = label
            ) -> dict[str, Tensor | None]:
                loss = self._scale.scaled(self._losses(self._called(image), label)[:1].sum())
                if not loss.requires_grad:
                    return dict.fromkeys(copies)
                found = torch.autograd.grad(loss, list(copies.values()), allow_unused=True)
                return dict(zip(copies, found, strict=True))

            for name, gradient in differentiate(self._model, self._parameters, gradients).items():
                if gradient is not None:
                    rows[name][i].copy_(as_dense(gradient))
        return rows


# function(copies of the parameters) -> gradients, computed by running the model with these copies
GradientFunction = Callable[[Mapping[str, Tensor]], dict[str, Tensor | None]]


def differentiate(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], gradients: GradientFunction
) -> dict[str, Tensor | None]:
    """Call `gradients` with copies of the parameters, which require gradients, swapped in.

    The flags and hooks of the original parameters have no effect.
    """
    copies = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    with replaced(model, parameters, copies):
        return gradients(copies)


def as_dense(gradient: Tensor) -> Tensor:
    """Return the gradient of an embedding with `sparse=True` as a dense tensor."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
