"""The engine: one forward and one backward pass a micro-batch, rows handed to a sink."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.errors import DataError, InvalidArgument, UnknownParameter
from fastsal.gradients import losses as checks
from fastsal.gradients.backward import Pass, Sink
from fastsal.gradients.capture import Capture
from fastsal.gradients.fallback import Call, Fallback
from fastsal.gradients.losses import LossFunction
from fastsal.gradients.precision import row_dtype
from fastsal.gradients.scaling import LossScale
from fastsal.gradients.state import FrozenModel, PrivateRandomness, differentiable
from fastsal.gradients.tokens import TokenLookups
from fastsal.gradients.two_samples import probe
from fastsal.gradients.workspace import Workspace
from fastsal.models.evaluating import to_model
from fastsal.utils.choices import CURVATURES, Curvature

# The rows of the largest parameter of one micro-batch stay below this.
_ROW_BYTES = 128 * 2**20
_LARGEST_MICRO_BATCH = 64


class GradientEngine:
    """Per-sample gradients of a model, inside a `with` block.

    The model is in evaluation mode and its parameters need no gradients inside the block; both
    are restored at its end, and `.grad` is never touched.

    Args:
        model: Module that takes images `[n, ...]`, or tokens `[n, L]`.
        parameters: Canonical name to parameter, from `select_parameters`.
        loss: `"cross-entropy"`, or a function `(outputs, labels)` that returns losses `[n]`. It is
            given outputs in float32 at least, and runs outside of autocast.
        labels: `"true"` takes the labels that come with the images, `"sampled"` draws them from
            the softmax of the logits. `"features"` needs none: `f_θ(x)`, what the classifier is
            given, is the mean of a Gaussian from which a target `y = f(x) + √F ε` is drawn, and the
            loss is `½ ‖f_θ(x) − y‖² / F` with the gradient `−J_f(x)ᵀ ε / √F`, `F` features.
        seed: Seed of what is drawn.
        autocast: Run the model under `torch.autocast` in this dtype.
        micro_batch: Samples a pass; None chooses by memory.
        loss_scale: Losses are multiplied by it for the backward pass and rows divided again, in
            float32; a power of two. It halves where gradients overflow, before rows are handed
            over. None begins with 2¹⁶ where the model or autocast is float16, more where gradients
            are small, and scales nothing elsewhere.

    Attributes:
        plan: After the first run, name to the operation whose rule serves it, or to
            `"torch.func: <reason>"`.
        samples_seen: Samples handed over so far.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        loss: str | LossFunction = "cross-entropy",
        curvature: Curvature = "empirical",
        seed: int = 0,
        autocast: torch.dtype | None = None,
        micro_batch: int | None = None,
        loss_scale: float | None = None,
    ) -> None:
        if curvature not in CURVATURES:
            raise InvalidArgument(f"curvature must be one of {CURVATURES}, got {curvature!r}")
        if curvature == "features" and loss != "cross-entropy":
            raise InvalidArgument(
                "loss: curvature='features' has its own, that of matching features; leave loss out"
            )
        if micro_batch is not None and micro_batch < 1:
            raise InvalidArgument(f"micro_batch: takes 1 or more, got {micro_batch}")
        checks.check_autocast(autocast)
        if not parameters:
            raise InvalidArgument("parameters: there is nothing to differentiate by")
        owned = dict(model.named_parameters())
        for name, value in parameters.items():
            if owned.get(name) is not value:
                raise UnknownParameter(
                    f"parameters: {name!r} is not this model's parameter of that name; "
                    "take them from select_parameters(model)"
                )
        self._model = model
        self._parameters = dict(parameters)
        self._sampled = curvature == "sampled"
        self._by_features = curvature == "features"
        self._classify = loss == "cross-entropy" and not self._by_features
        first = next(iter(self._parameters.values()))
        self._device = first.device
        self._loss: LossFunction = checks.in_float32(
            checks.feature_matching if self._by_features else checks.resolve_loss(loss),
            first.device,
        )
        self._call = _feature_call() if self._by_features else _plain_call
        self._generator = torch.Generator().manual_seed(seed)
        self._autocast = autocast
        self._scale = LossScale.of(loss_scale, autocast, model.parameters())
        self._micro_batch = micro_batch or choose_micro_batch(self._parameters)
        self._randomness = PrivateRandomness(self._device)
        self._workspace = Workspace()
        self._frozen: FrozenModel | None = None
        self._fast: dict[str, nn.Parameter] = {}
        self._fallback: Fallback | None = None
        self._classes: int | None = None
        self._outputs: tuple[int, ...] | None = None
        self._operations: dict[str, str] = {}
        self._samples_last: set[str] = set()
        self._checkpointed = False
        self.samples_seen = 0

    def __enter__(self) -> GradientEngine:
        if self._frozen is not None:
            raise InvalidArgument("GradientEngine: already inside its `with` block")
        self._frozen = FrozenModel(self._model)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._frozen is not None:
            self._frozen.restore()
            self._frozen = None
        self._workspace.clear()

    @property
    def micro_batch(self) -> int:
        """Samples of one forward and backward pass."""
        return self._micro_batch

    @property
    def scratch_nbytes(self) -> int:
        """Memory that the rules hold between layers."""
        return self._workspace.nbytes

    @property
    def plan(self) -> dict[str, str]:
        """Name to operation or `"torch.func: <reason>"`; empty before the first run."""
        plan: dict[str, str] = {}
        for name in self._parameters:
            if name in self._operations:
                plan[name] = self._operations[name]
            elif self._fallback is not None:
                plan[name] = f"torch.func: {self._fallback.reasons[name]}"
                if self._fallback.looped is not None:
                    plan[name] += f" (one sample at a time, after {self._fallback.looped})"
        return plan

    def run(self, images: Tensor, labels: Tensor | None, sink: Sink) -> Tensor:
        """Hand the per-sample gradients of a batch to a sink.

        Args:
            images: `[n, C, H, W]`, normalised floating point; or tokens `[n, L]`, int64 or int32.
            labels: `[n]`, or what `loss` takes, `[n, ...]`; may be None with `curvature="sampled"`,
                and are ignored with `"features"`.
            sink: Called as `sink(name, rows)` once a parameter and micro-batch, during the
                backward pass (after it, with a loss scale). `rows` `[n, *shape]` is contiguous,
                float32 (float64 for float64 parameters), and valid during the call only: the
                memory is used again.

        Returns:
            The losses `[n]`, float32.

        Raises:
            DataError: Images or labels cannot be used.
            NonFiniteGradient: A loss is NaN or infinite; counts samples from the first run on.
            UnsupportedLayer: A per-sample gradient cannot be formed.
        """
        if self._frozen is None:
            raise InvalidArgument("GradientEngine: run it inside `with engine:`")
        labels = self._checked(images, labels)
        n = images.shape[0]
        uniforms: Tensor | None = None
        if self._sampled:
            # For the whole batch at once: labels do not depend on the micro-batch.
            uniforms = torch.rand(n, dtype=torch.float64, generator=self._generator)
        with differentiable():
            images = _usable(images)
            labels = None if labels is None else _usable(labels)
            self._probe_once(images, labels)
            parts = []
            for start in range(0, n, self._micro_batch):
                part = slice(start, min(n, start + self._micro_batch))
                parts.append(
                    self._micro(
                        self._to_model(images[part]),
                        None if labels is None else labels[part].to(self._device),
                        None if uniforms is None else uniforms[part],
                        sink,
                    )
                )
        return torch.cat(parts)

    def prepare(self, images: Tensor, labels: Tensor | None) -> None:
        """Find out how gradients are formed, from two samples; `run` does it with its first ones.

        Worth a call where `run` is given single samples.
        """
        if self._frozen is None:
            raise InvalidArgument("GradientEngine: prepare it inside `with engine:`")
        labels = self._checked(images, labels)
        with differentiable():
            self._probe_once(_usable(images), None if labels is None else _usable(labels))

    def _checked(self, images: Tensor, labels: Tensor | None) -> Tensor | None:
        """Check images and labels; labels that are not used are None."""
        checks.check_images(images)
        if self._by_features or self._sampled:
            return None
        checks.check_labels(labels, images.shape[0])
        if self._classify and labels is not None:
            checks.check_classes(labels, self._classes, self.samples_seen)
        return labels

    def skip(self, samples: int) -> None:
        """Leave what would be drawn for so many samples to others; after `prepare`."""
        if self._sampled:
            torch.rand(samples, dtype=torch.float64, generator=self._generator)
        elif self._by_features and self._outputs is not None:
            checks.draw_noise(torch.empty(samples, *self._outputs), self._generator)

    @contextlib.contextmanager
    def rewinding(self) -> Iterator[None]:
        """What is drawn inside the block is drawn again after it."""
        state = self._generator.get_state()
        yield
        self._generator.set_state(state)

    def _probe_once(self, images: Tensor, labels: Tensor | None) -> None:
        if not self._operations and self._fallback is None:
            self._probe(images, labels)

    def _to_model(self, images: Tensor) -> Tensor:
        return to_model(images, next(iter(self._parameters.values())))

    def _forward(self, call: Callable[[], Any]) -> Any:
        if self._autocast is None:
            return call()
        with torch.autocast(self._device.type, dtype=self._autocast):
            return call()

    def _private(self) -> contextlib.AbstractContextManager[None]:
        return self._randomness.active(keep=False)

    def _probe(self, images: Tensor, labels: Tensor | None) -> None:
        pair = self._to_model(images[:2])
        targets = None if labels is None else labels[:2].to(self._device)
        if pair.shape[0] == 1:
            pair = torch.cat([pair, pair])
            targets = None if targets is None else torch.cat([targets, targets])

        def losses(call: Callable[[], object]) -> Tensor:
            outputs = self._forward(call)
            self._check_outputs(outputs, 2)
            if self._classify and labels is not None:
                checks.check_classes(labels, self._classes, self.samples_seen)
            # Any labels do here; those of the generator are for the run itself.
            if self._by_features:
                target = checks.draw_noise(outputs, torch.Generator().manual_seed(0))
            else:
                target = outputs.detach().argmax(1) if targets is None else targets
            values = self._loss(outputs, target)
            checks.check_losses(values, 2)
            checks.check_finite(values, self.samples_seen)
            return values

        found = probe(
            self._model,
            self._parameters,
            pair,
            losses,
            self._private,
            self._call,
            self._scale,
            coarse=self._autocast is not None,
        )
        self._operations, reasons = found.operations, found.reasons
        self._scale.value = max(self._scale.value, found.loss_scale)
        self._samples_last, self._checkpointed = found.samples_last, found.checkpointed
        self._fast = {name: self._parameters[name] for name in found.operations}
        if reasons:
            self._fallback = Fallback(
                self._model,
                {name: self._parameters[name] for name in reasons},
                reasons,
                self._loss,
                self._fallback_context,
                self._call,
                self._scale,
            )

    @contextlib.contextmanager
    def _fallback_context(self) -> Iterator[None]:
        with self._private():
            if self._autocast is None:
                yield
            else:
                with torch.autocast(self._device.type, dtype=self._autocast):
                    yield

    def _check_outputs(self, outputs: Any, n: int) -> None:
        if isinstance(outputs, Tensor):
            self._outputs = tuple(outputs.shape[1:])
        if self._classify or self._sampled:
            why = "the cross-entropy" if self._classify else "curvature='sampled'"
            self._classes = checks.check_logits(outputs, n, why)

    def _micro(
        self, images: Tensor, labels: Tensor | None, uniforms: Tensor | None, sink: Sink
    ) -> Tensor:
        n = images.shape[0]
        hooks = Pass(self._fast, n, sink, self._workspace, self._scale, self._samples_last)
        lookups: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self._checkpointed:
            # What is recomputed must need gradients as in the forward pass, where the graph
            # would otherwise begin at the first tracked layer.
            if images.is_floating_point():
                images = images.detach().requires_grad_()
            else:
                lookups = TokenLookups(images)
        with self._randomness.active(keep=True):
            with Capture(self._fast, hooks.on_call), lookups:
                outputs = self._forward(lambda: self._call(self._model, images))
                self._check_outputs(outputs, n)
                if self._by_features:
                    labels = checks.draw_noise(outputs, self._generator)
                elif uniforms is not None:
                    labels = checks.sample_labels(outputs, uniforms)
                values = self._loss(outputs, labels)
            checks.check_losses(values, n)
            checks.check_finite(values, self.samples_seen)
            if values.requires_grad:
                hooks.backward(values.sum())
            # With the last references to it goes the graph, before rows are formed of what waits.
            del outputs, lookups
            values = values.detach()
        hooks.flush()
        if self._fallback is not None:
            if labels is None:
                raise DataError("labels: None is taken only with curvature='sampled' or 'features'")
            self._fallback.rows(images.detach(), labels, sink)
        self.samples_seen += n
        return values.float()


def choose_micro_batch(parameters: Mapping[str, nn.Parameter]) -> int:
    """Samples of a pass, a power of two: as many as the rows of the largest parameter allow."""
    largest = max(p.numel() * row_dtype(p).itemsize for p in parameters.values())
    most = max(1, min(_LARGEST_MICRO_BATCH, _ROW_BYTES // max(1, largest)))
    return int(2 ** math.floor(math.log2(most)))


def _plain_call(model: nn.Module, images: Tensor) -> Any:
    return model(images)


def _feature_call() -> Call:
    # Here, as the package `transfer` needs this one.
    from fastsal.models.features import feature_outputs

    return feature_outputs


def _usable(tensor: Tensor) -> Tensor:
    # What was made under inference_mode cannot be saved for a backward pass.
    return tensor.clone() if tensor.is_inference() else tensor.detach()
