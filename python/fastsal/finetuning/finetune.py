"""Fine-tune a pruned model on its own task: what is pruned stays pruned.

Head and normalisation are frozen by default, as in the protocol of arXiv 2509.24066: what is
trained is the backbone, so that its features can be judged by the heads of other tasks after.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.data.batches import Batches
from fastsal.errors import InvalidArgument
from fastsal.finetuning.checkpoint import TrainingCheckpoint
from fastsal.finetuning.freezing import trained_parameters, training_only
from fastsal.finetuning.trainer import Trainer
from fastsal.gradients.losses import LossFunction, check_autocast
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.shelf import all_or_nothing, copies, restore
from fastsal.utils.progress import Report, reporter


@dataclass(frozen=True)
class FinetuneResult:
    """What `finetune` did.

    Attributes:
        history: One entry an epoch: `epoch` from 1, mean `loss` of the samples as they came,
            `held_out_loss` after it or None, `lr` of its first update, `samples`, `seconds`.
        kept_epoch: The epoch whose weights the model has; 0 for those that it came with, masked.
        before: Held-out loss of those; None without held-out images.
    """

    history: list[dict[str, Any]]
    kept_epoch: int
    before: float | None


@dataclass
class _Course:
    """How far a run is. With held-out images `best` holds the weights of `kept_epoch`."""

    before: float | None
    best: dict[str, Tensor] | None
    kept_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def is_over(self, epochs: int, patience: int | None) -> bool:
        """Whether all epochs are done, or no more are worth it."""
        done = len(self.history)
        return done >= epochs or (patience is not None and done - self.kept_epoch >= patience)

    def improves(self, value: float) -> bool:
        """Whether a held-out loss is lower than all before; NaN never is."""
        seen = [self.before, *(line["held_out_loss"] for line in self.history)]
        return value < min(
            (v for v in seen if v is not None and not math.isnan(v)), default=math.inf
        )


def finetune(
    model: nn.Module,
    batches: Batches,
    masks: Masks,
    *,
    epochs: int,
    lr: float,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: str = "cosine",
    held_out: Batches | None = None,
    patience: int | None = None,
    frozen: str | Sequence[str] = (),
    train_head: bool = False,
    train_normalisation: bool = False,
    loss: str | LossFunction = "cross-entropy",
    autocast: torch.dtype | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | Report = False,
    seed: int = 0,
) -> FinetuneResult:
    """Train the kept weights of a model in place; the pruned ones are zero throughout.

    Args:
        model: Any module; it ends with the modes and the `requires_grad` that it came with.
        batches: As for `collect`, with labels, on one pass an epoch; each may have an order of its
            own (a `DataLoader` with `shuffle=True`).
        masks: True = kept; the model is masked first (see `Masks.hold`).
        epochs: Passes over `batches`, 1 or more.
        lr: Rate that the schedule begins with.
        optimizer: Name in timm: `"sgd"` (Nesterov), `"momentum"` (without), `"adamw"` and others.
        momentum: Where the optimiser has one; 0 with `"momentum"`, as Nesterov's needs one.
        weight_decay: Of weights with two axes or more.
        schedule: `"cosine"` or `"linear"` to zero, or `"constant"`.
        held_out: Labelled images, iterated again and again. With them the model ends with the
            weights of the epoch of least mean loss on them, which may be those that it came with.
        patience: Stop after so many epochs in a row without a lower held-out loss; None never.
        frozen: Names or `fnmatch` patterns of further parameters that stay as they are.
        train_head: Whether the classifier is trained: what `get_classifier()` of a timm model
            gives, else the last `Linear`.
        train_normalisation: Whether normalisation layers are; if not their running moments stay
            as they are too.
        loss: As for `collect`; its mean over a batch is descended.
        autocast: Run the passes in `torch.bfloat16` or `torch.float16` (the loss is scaled then).
        checkpoint: A file that keeps the state after every epoch: the same call, with the same
            batches, goes on from there, on the CPU to the same bits. Removed at the end.
        progress: A bar, or a function of samples done and in all.
        seed: Of dropout, of shuffles that draw from torch, and of all else with chance in it.

    Returns:
        The epochs and which one was kept.

    Raises:
        InvalidArgument: An argument is not taken. In this and in every other case the model is as
            it was.
        UnknownParameter: `frozen` matches nothing.
        MaskError: The masks are of another model.
        DataError: Images or labels cannot be used.
        NonFiniteLoss: The loss or a weight became NaN or infinite.
        FileFormatError: `checkpoint` is damaged, or of another run.
    """
    if not isinstance(masks, Masks):
        raise InvalidArgument(f"masks: got {type(masks).__name__}; takes fastsal.Masks")
    _check_numbers(epochs, lr, patience, autocast)
    _check_batches(batches, held_out, epochs, patience)
    trained = trained_parameters(
        model, frozen, train_head=train_head, train_normalisation=train_normalisation
    )
    how: dict[str, Any] = {
        "epochs": epochs,
        "lr": lr,
        "optimizer": optimizer,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "autocast": autocast,
        "seed": seed,
    }
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with (
        all_or_nothing(tensors) as original,
        training_only(model, trained, train_normalisation=train_normalisation),
        reporter(progress, "fine-tuning") as report,
    ):
        trainer = Trainer(model, batches, loss=loss, **how)
        keeper = None
        if checkpoint is not None:
            asked = {
                **how,
                "patience": patience,
                "held_out": held_out is not None,
                "frozen": frozen,
                "train_head": train_head,
                "train_normalisation": train_normalisation,
                "loss": loss if isinstance(loss, str) else "a function",
            }
            start = {**original, **{f"mask:{name}": mask for name, mask in masks.items()}}
            keeper = TrainingCheckpoint(checkpoint, asked, start)
        # Zeros of parameters that are all frozen need no optimiser to be held.
        moved = not set(trained.values()).isdisjoint(masks.parameters(model).values())
        with masks.hold(model, trainer.optimizer if moved else None):
            course = _train(trainer, tensors, held_out, epochs, patience, keeper, report)
    if keeper is not None:
        keeper.remove()
    return FinetuneResult(course.history, course.kept_epoch, course.before)


def _train(
    trainer: Trainer,
    tensors: Mapping[str, Tensor],
    held_out: Batches | None,
    epochs: int,
    patience: int | None,
    keeper: TrainingCheckpoint | None,
    report: Report,
) -> _Course:
    """Train epoch by epoch, from the checkpoint on if there is one, and keep the best."""
    saved = keeper.load() if keeper is not None else None
    if saved is not None:
        restore(tensors, saved["tensors"])
        trainer.load_state_dict(saved["trainer"])
        course = _Course(**saved["course"])
    elif held_out is not None:
        course = _Course(trainer.mean_loss(held_out), copies(tensors))
    else:
        course = _Course(None, None)
    total = None if trainer.samples is None else trainer.samples * epochs

    def told(samples: int) -> None:
        report(sum(line["samples"] for line in course.history) + samples, total)

    while not course.is_over(epochs, patience):
        start = time.perf_counter()
        number = len(course.history) + 1
        line = trainer.epoch(number, told)
        value = None if held_out is None else trainer.mean_loss(held_out)
        if value is None:
            course.kept_epoch = number
        elif course.improves(value):
            course.kept_epoch, course.best = number, copies(tensors)
        seconds = time.perf_counter() - start
        course.history.append({"epoch": number, **line, "held_out_loss": value, "seconds": seconds})
        if keeper is not None:
            state = {"tensors": copies(tensors), "trainer": trainer.state_dict()}
            keeper.save({**state, "course": vars(course)})
    if course.best is not None:
        restore(tensors, course.best)
    return course


def _check_numbers(
    epochs: int, lr: float, patience: int | None, autocast: torch.dtype | None
) -> None:
    for name, value in (("epochs", epochs), ("patience", patience)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InvalidArgument(f"{name}: got {value!r}; takes 1 or more")
    if not 0 < lr < math.inf:
        raise InvalidArgument(f"lr: got {lr!r}; takes a number above 0")
    check_autocast(autocast)


def _check_batches(
    batches: Batches, held_out: Batches | None, epochs: int, patience: int | None
) -> None:
    again = "takes a list, a DataLoader or anything else that can be iterated again"
    if epochs > 1 and isinstance(batches, Iterator):
        raise InvalidArgument(
            f"batches: is an iterator, which gives its images once, for {epochs} epochs; {again}"
        )
    if isinstance(held_out, Iterator):
        raise InvalidArgument(f"held_out: is an iterator, which gives its images once; {again}")
    if patience is not None and held_out is None:
        raise InvalidArgument("patience: is for held-out loss; give held_out as well")
