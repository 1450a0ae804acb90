"""One epoch of training: optimiser and schedule from timm, mixed precision, a seed of its own."""

from __future__ import annotations

import contextlib
import difflib
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.data.batches import Batches, as_batches
from fastsal.errors import InvalidArgument, NonFiniteLoss
from fastsal.gradients import losses as checks
from fastsal.models.evaluating import outputs, to_model

# How timm's factory is asked for them, the same in all its versions.
SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine": {"sched": "cosine"},
    "linear": {"sched": "poly", "decay_rate": 1.0},  # the power of the polynomial
    "constant": {"sched": "step", "decay_rate": 1.0},  # steps by a factor of one
}


class Trainer:
    """What moves a model's weights, epoch by epoch.

    Args:
        model: In the modes and with the flags that it is to be trained in.
        batches: Pairs of images and labels, iterated once an epoch.
        lr: Rate that the schedule begins with.
        optimizer: A name of `timm.optim.list_optimizers()`.
        momentum: Where the optimiser has one.
        weight_decay: Of weights with two axes or more; others have none.
        schedule: One of `SCHEDULES`. It moves with every update where `batches` has a length, and
            with every epoch where not; it would be zero after the last one.
        epochs: That the schedule runs over.
        loss: As for `collect`.
        autocast: Type of the passes; with `torch.float16` the loss is scaled.
        seed: Epoch e runs on random numbers of seed + e, whatever came before.
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
        schedule: str,
        epochs: int,
        loss: str | checks.LossFunction,
        autocast: torch.dtype | None,
        seed: int,
    ) -> None:
        first = next(model.parameters())
        self._model, self._first, self._device = model, first, first.device
        self._batches = batches
        self._updates = operator.length_hint(batches)  # 0 where it is not known
        self.optimizer = _make_optimizer(model, optimizer, lr, momentum, weight_decay)
        self._schedule = _make_schedule(self.optimizer, schedule, epochs, self._updates)
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=autocast is torch.float16)
        self._loss, self._classify = checks.resolve_loss(loss), loss == "cross-entropy"
        self._autocast = autocast
        self._seed = seed

    @property
    def samples(self) -> int | None:
        """Images of an epoch, where that is known before."""
        return getattr(self._batches, "samples", None)

    def epoch(self, number: int, report: Callable[[int], None]) -> dict[str, Any]:
        """Train on every batch once.

        Args:
            number: Of the epoch, from 1.
            report: Called with the number of samples that are done.

        Returns:
            The mean `loss` of the samples as they came, the `lr` of the first update, and the
            number of `samples`.

        Raises:
            DataError: Images or labels cannot be used.
            NonFiniteLoss: A loss or a trained weight is NaN or infinite.
        """
        done = (number - 1) * self._updates
        self._schedule.step(number - 1)  # only one of the two has an effect
        self._schedule.step_update(done)
        lr = float(self.optimizer.param_groups[0]["lr"])
        total, samples = 0.0, 0
        with _private_randomness(self._seed + number, self._device), torch.enable_grad():
            for images, labels in self._pairs(self._batches):
                with torch.autocast(
                    self._device.type, dtype=self._autocast, enabled=self._autocast is not None
                ):
                    out = self._model(to_model(images, self._first))
                    mean = self._losses(out, labels, samples).mean()
                value = float(mean.detach())
                if not math.isfinite(value):
                    raise NonFiniteLoss(
                        f"epoch {number}: the mean loss of samples {samples} to "
                        f"{samples + len(images) - 1} is {value}; takes a lower lr (it is {lr:g}), "
                        "or look at these images"
                    )
                self.optimizer.zero_grad()
                torch.autograd.backward(self._scaler.scale(mean))
                self._scaler.step(self.optimizer)
                self._scaler.update()
                done += 1
                self._schedule.step_update(done)
                total += value * len(images)
                samples += len(images)
                report(samples)
        self._check_weights(number, lr)
        return {"loss": total / samples, "lr": lr, "samples": samples}

    def mean_loss(self, held_out: Batches) -> float:
        """Return the mean loss of images in evaluation mode and in the model's own precision."""
        total, samples = 0.0, 0
        for images, labels in self._pairs(held_out):
            losses = self._losses(outputs(self._model, images), labels, samples)
            total += float(losses.double().sum())
            samples += len(images)
        return total / samples

    def state_dict(self) -> dict[str, Any]:
        """Return what the next epoch needs beside the weights."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])

    def _pairs(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in as_batches(batches, None):
            checks.check_images(images)
            checks.check_labels(labels, len(images))
            assert labels is not None  # checked
            yield images, labels

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
                    f"epoch {number}: {name!r} holds NaN or infinity; takes a lower lr (it is "
                    f"{lr:g})"
                )


def _make_optimizer(
    model: nn.Module, name: str, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    import timm.optim

    factory: Any = timm.optim  # exports its names by a way that types do not see
    known: list[str] = factory.list_optimizers()
    if name.lower().rpartition("_")[2] not in known:  # "lookahead_sgd" is taken as well
        close = difflib.get_close_matches(name, known, n=3)
        hint = f" (close: {', '.join(close)})" if close else ""
        raise InvalidArgument(
            f"optimizer: timm has no {name!r}{hint}; takes sgd, adamw or another name of "
            "timm.optim.list_optimizers()"
        )
    try:
        made: torch.optim.Optimizer = factory.create_optimizer_v2(
            model, opt=name, lr=lr, momentum=momentum, weight_decay=weight_decay
        )
    except ValueError as error:
        raise InvalidArgument(f"optimizer: {name!r} does not take its arguments: {error}") from None
    return made


def _make_schedule(optimizer: torch.optim.Optimizer, name: str, epochs: int, updates: int) -> Any:
    import timm.scheduler

    factory: Any = timm.scheduler
    if name not in SCHEDULES:
        raise InvalidArgument(f"schedule: got {name!r}; takes {', '.join(map(repr, SCHEDULES))}")
    made, _ = factory.create_scheduler_v2(
        optimizer,
        num_epochs=epochs,
        min_lr=0.0,
        warmup_epochs=0,
        step_on_epochs=updates == 0,
        updates_per_epoch=updates,
        **SCHEDULES[name],
    )
    return made


@contextlib.contextmanager
def _private_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's random numbers inside the block; the caller's stay as they are."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.default_generators[device.index].manual_seed(seed)
        yield
