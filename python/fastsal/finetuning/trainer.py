"""Epochs of training: optimizer and schedule of timm, mixed precision, one seed per epoch."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.data.batches import Batches, Pair, as_batches, without_single_images
from fastsal.data.content import SeenImages
from fastsal.errors import InvalidArgument, NonFiniteLoss
from fastsal.gradients import losses as checks
from fastsal.models.evaluating import outputs, to_model, twice
from fastsal.models.wrappers import unwrapped
from fastsal.utils.choices import SCHEDULES, Schedule
from fastsal.utils.float64 import in_float64
from fastsal.utils.randomness import get_random_state, seed_random_numbers, set_random_state
from fastsal.utils.suggestions import check_choice, did_you_mean

# Arguments of timm's factory, the same in all of its versions.
_SCHEDULES: dict[Schedule, dict[str, Any]] = {
    "cosine": {"sched": "cosine"},
    "linear": {"sched": "poly", "decay_rate": 1.0},  # the power of the polynomial
    "constant": {"sched": "step", "decay_rate": 1.0},  # steps by a factor of one
}


class Trainer:
    """Trains the weights of a model, epoch by epoch.

    Args:
        model: Model with the modes and flags to train in.
        batches: Iterable of `(images, labels)`, iterated once per epoch.
        lr: Initial learning rate.
        optimizer: A name of `timm.optim.list_optimizers()`.
        momentum: Momentum, for optimizers that have one.
        weight_decay: Weight decay of parameters with two or more axes; others have none.
        schedule: "cosine", "linear" or "constant". The rate is updated at every step if `batches`
            has a length, otherwise at every epoch. Cosine and linear reach zero after the last.
        epochs: Number of epochs of the schedule.
        loss: "cross-entropy", or a function `(outputs, labels)` that returns losses `[n]`.
        autocast: dtype for `torch.autocast`, or None; with `torch.float16` the loss is scaled.
        seed: Epoch e uses the random numbers of seed + e.
        records: Whether the images that passes see are recorded, for a checkpoint.

    Attributes:
        seen: With `records`, `"batches"` and `"held_out"` to what was seen of them.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        *,
        lr: float,
        optimizer: str,
        momentum: float,
        weight_decay: float,
        schedule: Schedule,
        epochs: int,
        loss: str | checks.LossFunction,
        autocast: torch.dtype | None,
        seed: int,
        records: bool = False,
    ) -> None:
        self._model, self._device = model, next(model.parameters()).device
        self._batches = batches
        self._updates = operator.length_hint(batches)  # 0 if unknown
        self.optimizer = _make_optimizer(model, optimizer, lr, momentum, weight_decay)
        self._schedule = _make_schedule(self.optimizer, schedule, epochs, self._updates)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=autocast is torch.float16)
        self._loss, self._classify = checks.resolve_loss(loss), loss == "cross-entropy"
        self._autocast = autocast
        self._seed = seed
        names = ("batches", "held_out") if records else ()
        self.seen = {name: SeenImages(name) for name in names}

    @property
    def samples(self) -> int | None:
        """Number of images of an epoch, or None if unknown."""
        return getattr(self._batches, "samples", None)

    def epoch(self, number: int, report: Callable[[int], None]) -> dict[str, Any]:
        """Train on every batch once.

        Args:
            number: Number of the epoch, from 1.
            report: Called with the number of samples processed so far.

        Returns:
            The mean `loss` during training, the `lr` of the first step, and the number of
            `samples`.

        Raises:
            DataError: Images or labels are invalid.
            InvalidArgument: A batch has a single image, and a layer normalizes by its batch.
            NonFiniteLoss: A loss or a trained weight is NaN or infinite.
        """
        done = (number - 1) * self._updates
        self._schedule.step(number - 1)  # one of the two has no effect
        self._schedule.step_update(done)
        lr = float(self.optimizer.param_groups[0]["lr"])
        total, samples = 0.0, 0
        with _private_randomness(self._seed + number, self._device), torch.enable_grad():
            for n, images, labels in self._training_batches():
                with torch.autocast(
                    self._device.type, dtype=self._autocast, enabled=self._autocast is not None
                ):
                    out = self._model(to_model(images, self._model))
                    mean = self._losses(out, labels, samples)[:n].mean()
                value = float(mean.detach())
                if not math.isfinite(value):
                    raise NonFiniteLoss(
                        f"epoch {number}: the mean loss of samples {samples} to "
                        f"{samples + n - 1} must be finite, got {value}; use a lower lr "
                        f"than {lr:g}, or check these images"
                    )
                self.optimizer.zero_grad()
                torch.autograd.backward(self._scaler.scale(mean))
                self._scaler.step(self.optimizer)
                self._scaler.update()
                done += 1
                self._schedule.step_update(done)
                total += value * n
                samples += n
                report(samples)
        self._check_weights(number, lr)
        return {"loss": total / samples, "lr": lr, "samples": samples}

    def mean_loss(self, held_out: Batches) -> float:
        """Return the mean loss of images in evaluation mode, in the precision of the model."""
        total, samples = 0.0, 0
        for images, labels in self._pairs(held_out, "held_out"):
            losses = self._losses(outputs(self._model, images), labels, samples)
            total += float(in_float64(losses).sum())
            samples += len(images)
        return total / samples

    def state_dict(self) -> dict[str, Any]:
        """Return the state of optimizer and gradient scaler."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])

    def passes(self, held_out: Batches | None) -> dict[str, Callable[[], Iterator[Pair]]]:
        """Return functions that start a pass over images, by the names of `seen`."""
        numbers = itertools.count(1)

        def epoch() -> Iterator[Pair]:
            # With other random numbers in every pass, as in epochs.
            with _private_randomness(self._seed + next(numbers), self._device):
                yield from as_batches(self._batches, None)

        found: dict[str, Callable[[], Iterator[Pair]]] = {"batches": epoch}
        if held_out is not None:
            found["held_out"] = lambda: as_batches(held_out, None)
        return found

    def _pairs(self, batches: Batches, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        pairs: Iterable[Pair] = as_batches(batches, None)
        if name in self.seen:
            pairs = self.seen[name].watch(pairs)
        for images, labels in pairs:
            checks.check_images(images)
            checks.check_labels(labels, len(images))
            assert labels is not None  # see check_labels
            yield images, labels

    def _training_batches(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield a number of images and, after them, no others or the copy of a single one.

        Where a layer normalizes by its batch, single images are joined to other batches instead.
        """
        if not any(map(_normalizes_by_batch, self._model.modules())):
            for images, labels in self._pairs(self._batches, "batches"):
                if len(images) > 1:
                    yield len(images), images, labels
                else:
                    yield 1, twice(images), twice(labels)
            return
        for x, y in without_single_images(self._pairs(self._batches, "batches")):
            if len(x) == 1:
                raise InvalidArgument(
                    "batches must have at least two images each to train batch normalization, got "
                    "one; use a larger batch size, or freeze it (train_normalization=False)"
                )
            assert y is not None  # see `_pairs`
            yield len(x), x, y

    def _losses(self, out: Any, labels: Tensor, before: int) -> Tensor:
        if self._classify:
            classes = checks.check_logits(out, len(labels), "the cross-entropy")
            checks.check_classes(labels, classes, before)
        losses = self._loss(out, labels.to(self._device))
        checks.check_losses(losses, len(labels))
        return losses

    def _check_weights(self, number: int, lr: float) -> None:
        for name, p in self._model.named_parameters():
            if p.requires_grad and not bool(torch.isfinite(p.detach()).all()):
                raise NonFiniteLoss(
                    f"epoch {number}: {name!r} contains NaN or infinity; use a lower lr than {lr:g}"
                )


def _normalizes_by_batch(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        module.training or module.running_mean is None
    )


def _make_optimizer(
    model: nn.Module, name: str, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    import timm.optim

    factory: Any = timm.optim  # its names are not typed
    known: list[str] = factory.list_optimizers()
    if name.lower().rpartition("_")[2] not in known:  # "lookahead_sgd" is valid too
        raise InvalidArgument(
            "optimizer must be 'sgd', 'adamw' or another name of timm.optim.list_optimizers(), got "
            f"{name!r}{did_you_mean(name, known)}"
        )
    try:
        made: torch.optim.Optimizer = factory.create_optimizer_v2(
            unwrapped(model), opt=name, lr=lr, momentum=momentum, weight_decay=weight_decay
        )
    except ValueError as error:
        raise InvalidArgument(f"optimizer: {name!r} rejects its arguments: {error}") from None
    return made


def _make_schedule(
    optimizer: torch.optim.Optimizer, name: Schedule, epochs: int, updates: int
) -> Any:
    import timm.scheduler

    factory: Any = timm.scheduler
    check_choice("schedule", name, SCHEDULES)
    made, _ = factory.create_scheduler_v2(
        optimizer,
        num_epochs=epochs,
        min_lr=0.0,
        warmup_epochs=0,
        step_on_epochs=updates == 0,
        updates_per_epoch=updates,
        **_SCHEDULES[name],
    )
    return made


@contextlib.contextmanager
def _private_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's random numbers for the block, then restore their state."""
    outer = get_random_state(device)
    try:
        seed_random_numbers(seed, device)
        yield
    finally:
        set_random_state(outer, device)
