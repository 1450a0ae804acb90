"""The engine: one forward and one backward pass per micro-batch, rows passed to a sink."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.errors import DataError, InvalidArgument, UnknownParameter
from fastsal.gradients import losses as checks
from fastsal.gradients.backward import Pass, Sink
from fastsal.gradients.capture import Capture, make_root
from fastsal.gradients.fallback import Fallback
from fastsal.gradients.losses import LossFunction
from fastsal.gradients.micro_batch import choose_micro_batch
from fastsal.gradients.scaling import LossScale
from fastsal.gradients.state import PrivateRandomness, frozen
from fastsal.gradients.tokens import TokenLookups
from fastsal.gradients.two_samples import find_rules
from fastsal.gradients.workspace import Workspace
from fastsal.models.evaluating import (
    differentiable,
    plain_call,
    to_model,
    twice,
)
from fastsal.models.features import feature_outputs, find_feature_layer
from fastsal.models.outputs import output_tensor
from fastsal.models.wrappers import unwrapped
from fastsal.utils.choices import CURVATURES, Curvature
from fastsal.utils.numbers import SEEDS, whole
from fastsal.utils.suggestions import check_choice


class GradientEngine:
    """Per-sample gradients of a model, inside a `with` block.

    Inside the block, the model is in evaluation mode and its parameters do not require gradients.
    Both are restored at the end, and `.grad` is not changed.

    Args:
        model: Module whose inputs are images or token ids `[n, L]`; of a wrapper, that inside.
        parameters: Canonical name to parameter, from `select_parameters`.
        loss: "cross-entropy", or a function `(outputs, labels)` that returns losses `[n]`. Its
            outputs are float32 or wider, and it runs outside of autocast.
        curvature: "empirical" uses the labels of the images. "sampled" draws labels from the
            softmax of the logits. "features" needs no labels: a target `y = f(x) + √F ε` is drawn
            from a Gaussian around the F features `f(x)`, the input of the classifier, and the loss
            `½ ‖f_θ(x) − y‖² / F` has the gradient `−J_f(x)ᵀ ε / √F`.
        seed: Seed of the drawn labels or noise.
        autocast: dtype for `torch.autocast`: `torch.bfloat16`, `torch.float16`, or None.
        micro_batch: Samples per forward and backward pass; None chooses by memory.
        loss_scale: Power of two that multiplies the losses of a backward pass; rows are unscaled
            in float32. It is halved when gradients overflow, before rows are passed on. None starts
            at 2¹⁶ if the model or autocast is float16, raises it if gradients are small, and
            disables scaling otherwise.
        pads: Whether a single sample runs with a copy of itself, whose gradients are dropped (see
            `twice`). False is for measurements only.

    Attributes:
        samples_seen: Number of samples passed on so far.
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
        pads: bool = True,
    ) -> None:
        check_choice("curvature", curvature, CURVATURES)
        if curvature == "features" and loss != "cross-entropy":
            raise InvalidArgument(
                "loss must not be given with curvature='features', which defines its own loss"
            )
        if micro_batch is not None:
            micro_batch = whole("micro_batch", micro_batch, 1)
        seed = whole("seed", seed, *SEEDS)
        checks.check_autocast(autocast)
        if not parameters:
            raise InvalidArgument("parameters must contain at least one parameter, got none")
        model = unwrapped(model)
        owned = dict(model.named_parameters())
        for name, value in parameters.items():
            if owned.get(name) is not value:
                raise UnknownParameter(
                    f"parameters: {name!r} is not the parameter of this model with that name; "
                    "use select_parameters(model)"
                )
        self._model = model
        self._parameters = dict(parameters)
        self._sampled = curvature == "sampled"
        self._by_features = curvature == "features"
        self._classify = loss == "cross-entropy" and not self._by_features
        first = next(iter(self._parameters.values()))
        self._device = first.device
        given = checks.feature_matching if self._by_features else checks.resolve_loss(loss)
        self._loss: LossFunction = checks.in_float32(given, first.device)
        self._run_model = feature_outputs if self._by_features else plain_call
        self._generator = torch.Generator().manual_seed(seed)
        self._autocast = autocast
        self._pads = pads
        self._scale = LossScale.of(loss_scale, autocast, model.parameters())
        self._micro_batch = micro_batch or choose_micro_batch(self._parameters)
        self._randomness = PrivateRandomness(self._device)
        self._workspace = Workspace()
        self._frozen: contextlib.ExitStack | None = None
        self._fast: dict[str, nn.Parameter] = {}
        self._fallback: Fallback | None = None
        self._classes: int | None = None
        self._outputs: tuple[int, ...] | None = None
        self._operations: dict[str, str] = {}
        self._order: list[str] = []
        self._samples_last: set[str] = set()
        self._checkpointed = False
        self.samples_seen = 0

    def __enter__(self) -> GradientEngine:
        if self._frozen is not None:
            raise InvalidArgument("GradientEngine: the `with` block is already active")
        stack = contextlib.ExitStack()
        stack.enter_context(frozen(self._model))
        self._frozen = stack
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._frozen is not None:
            self._frozen.close()
            self._frozen = None
        self._workspace.clear()

    @property
    def micro_batch(self) -> int:
        """Samples per forward and backward pass."""
        return self._micro_batch

    @property
    def outputs(self) -> int | None:
        """Number of logits of the model; None before the first run, or if they are not used."""
        return self._classes

    @property
    def scratch_nbytes(self) -> int:
        """Size in bytes of the scratch memory of the rules."""
        return self._workspace.nbytes

    @property
    def operations(self) -> dict[str, str]:
        """Name to the operation whose rule is used, or to `"torch.func: <reason>"`.

        Empty before the first run.
        """
        found: dict[str, str] = {}
        for name in self._parameters:
            if name in self._operations:
                found[name] = self._operations[name]
            elif self._fallback is not None:
                found[name] = f"torch.func: {self._fallback.reasons[name]}"
                if self._fallback.looped is not None:
                    found[name] += f" (one sample at a time, after {self._fallback.looped})"
        return found

    @property
    def order(self) -> list[str]:
        """Names in the order in which rows reach the sink, of a batch like that of `prepare`."""
        served = [name for name in self._order if name in self._fast]
        rest = self._fallback.reasons if self._fallback is not None else {}
        return list(dict.fromkeys([*served, *self._fast, *rest, *self._parameters]))

    def run(self, images: Tensor, labels: Tensor | None, sink: Sink) -> Tensor:
        """Pass the per-sample gradients of a batch to a sink.

        Args:
            images: `[n, C, H, W]`, normalized floating point; or token ids `[n, L]`, int64 or
                int32.
            labels: `[n]`, or `[n, ...]` as `loss` expects. Optional for "sampled", ignored for
                "features".
            sink: Called as `sink(name, rows)` once per parameter and micro-batch, during the
                backward pass (after it, with a loss scale). `rows` `[n, *shape]` is contiguous and
                float32 (float64 for float64 parameters). Its memory is reused after the call.

        Returns:
            The losses `[n]`, float32.

        Raises:
            DataError: Images or labels are invalid.
            NonFiniteGradient: A loss is NaN or infinite; samples are counted from the first run.
            UnsupportedLayer: A per-sample gradient cannot be computed.
        """
        if self._frozen is None:
            raise InvalidArgument("GradientEngine: run must be called inside `with engine:`")
        labels = self._checked(images, labels)
        n = images.shape[0]
        uniforms: Tensor | None = None
        if self._sampled:
            # Drawn for the whole batch, so that labels do not depend on the micro-batch.
            uniforms = checks.draw_uniform((n,), self._generator)
        with differentiable():
            images = _usable(images)
            labels = None if labels is None else _usable(labels)
            self._find_rules_once(images, labels)
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
        """Choose the rules from two samples; otherwise `run` uses the first ones of its batch.

        Useful if `run` is called with single samples.
        """
        if self._frozen is None:
            raise InvalidArgument("GradientEngine: prepare must be called inside `with engine:`")
        labels = self._checked(images, labels)
        with differentiable():
            self._find_rules_once(_usable(images), None if labels is None else _usable(labels))

    def _checked(self, images: Tensor, labels: Tensor | None) -> Tensor | None:
        """Check images and labels; return None for unused labels."""
        checks.check_images(images)
        if self._by_features or self._sampled:
            return None
        checks.check_labels(labels, images.shape[0])
        if self._classify and labels is not None:
            checks.check_classes(labels, self._classes, self.samples_seen)
        return labels

    def skip(self, samples: int) -> None:
        """Advance the random numbers as for a run of `samples`; call it after `prepare`."""
        if self._sampled:
            checks.draw_uniform((samples,), self._generator)
        elif self._by_features and self._outputs is not None:
            checks.draw_uniform((samples, *self._outputs), self._generator)

    @contextlib.contextmanager
    def rewinding(self) -> Iterator[None]:
        """Restore the state of the random numbers at the end of the block."""
        state = self._generator.get_state()
        yield
        self._generator.set_state(state)

    def _find_rules_once(self, images: Tensor, labels: Tensor | None) -> None:
        if not self._operations and self._fallback is None:
            self._find_rules(images, labels)

    def _to_model(self, images: Tensor) -> Tensor:
        return to_model(images, self._model)

    def _forward(self, call: Callable[[], Any]) -> Any:
        if self._autocast is None:
            return call()
        with torch.autocast(self._device.type, dtype=self._autocast):
            return call()

    def _private(self) -> contextlib.AbstractContextManager[None]:
        return self._randomness.active(keep=False)

    def _find_rules(self, images: Tensor, labels: Tensor | None) -> None:
        pair = self._to_model(images[:2])
        targets = None if labels is None else labels[:2].to(self._device)
        if pair.shape[0] == 1:
            pair, targets = twice(pair), twice(targets)

        if self._by_features:
            find_feature_layer(self._model, pair)

        def losses(call: Callable[[], object]) -> Tensor:
            outputs = self._forward(call)
            self._check_outputs(outputs, 2)
            if self._classify and labels is not None:
                checks.check_classes(labels, self._classes, self.samples_seen)
            # Any labels are valid here; the generator is reserved for the run itself.
            if self._by_features:
                target = checks.draw_noise(outputs, torch.Generator().manual_seed(0))
            else:
                target = output_tensor(outputs).detach().argmax(1) if targets is None else targets
            values = self._loss(outputs, target)
            checks.check_losses(values, 2)
            checks.check_finite(values, self.samples_seen)
            return values

        found = find_rules(
            self._model,
            self._parameters,
            pair,
            losses,
            self._private,
            self._run_model,
            self._scale,
            coarse=self._autocast is not None,
        )
        self._operations, reasons = found.operations, found.reasons
        self._order = found.order
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
                self._run_model,
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
        n, real_images = images.shape[0], images
        if n == 1 and self._pads:
            images, labels, uniforms = twice(images), twice(labels), twice(uniforms)
        elif self._fallback is not None:
            images = images.clone()  # the model may change them
        ran = images.shape[0]
        hooks = Pass(self._fast, n, ran, sink, self._workspace, self._scale, self._samples_last)
        lookups: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self._checkpointed:
            # Recomputed tensors must require gradients as in the forward pass, where the graph
            # would otherwise start at the first tracked layer.
            if images.is_floating_point():
                images = make_root(images)
            else:
                lookups = TokenLookups(images)
        with self._randomness.active(keep=True):
            with Capture(self._fast, hooks.on_call), lookups:
                outputs = self._forward(lambda: self._run_model(self._model, images))
                self._check_outputs(outputs, ran)
                if self._by_features:
                    noise = checks.draw_noise(outputs[:n], self._generator)
                    labels = noise if n == ran else twice(noise)
                elif uniforms is not None:
                    labels = checks.sample_labels(output_tensor(outputs), uniforms)
                values = self._loss(outputs, labels)
            checks.check_losses(values, ran)
            values = values[:n]
            checks.check_finite(values, self.samples_seen)
            if values.requires_grad:
                hooks.backward(values.sum())
            # Frees the graph before rows of the stored gradients are computed.
            del outputs, lookups
            values = values.detach()
        hooks.flush()
        if self._fallback is not None:
            if labels is None:
                raise DataError(checks.NO_LABELS)
            self._fallback.rows(real_images.detach(), labels[:n], sink)
        self.samples_seen += n
        return values.float()


def _usable(tensor: Tensor) -> Tensor:
    # Tensors created under inference_mode cannot be saved for a backward pass.
    return tensor.clone() if tensor.is_inference() else tensor.detach()
