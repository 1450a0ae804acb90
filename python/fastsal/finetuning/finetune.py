"""Fine-tune a pruned model, keeping its mask.

Head and normalization are frozen by default, as in the protocol of arXiv 2509.24066: only the
backbone is trained, so that its features can be evaluated with the frozen heads of other tasks.
"""

from __future__ import annotations

import math
import operator
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.data.batches import Batches, first_images
from fastsal.data.numbering import check_labels_of
from fastsal.data.unpacking import BatchRule, ruled
from fastsal.errors import InvalidArgument
from fastsal.finetuning.freezing import trained_parameters, training_only
from fastsal.finetuning.trainer import Trainer
from fastsal.gradients.losses import LossFunction, check_autocast
from fastsal.models.classifier import declares_head, using_head
from fastsal.models.classifier_signs import check_classifier, lacks_classifier
from fastsal.models.digest import structure_digest
from fastsal.models.placing import on_device
from fastsal.models.wrappers import unwrapped
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.shelf import all_or_nothing, copies, restore
from fastsal.pruning.training_checkpoint import TrainingCheckpoint
from fastsal.utils.choices import Schedule
from fastsal.utils.identity import identity_of
from fastsal.utils.numbers import real, whole
from fastsal.utils.progress import Report, reporter


@dataclass(frozen=True)
class FinetuneResult:
    """Result of `finetune`.

    Attributes:
        history: One entry per epoch: `epoch` (from 1), mean training `loss`, `held_out_loss` after
            the epoch or None, `lr` of the first step, `samples` and `seconds`.
        kept_epoch: Epoch whose weights the model has; 0 for the masked initial weights.
        before: Held-out loss of the masked initial weights; None without held-out images.
    """

    history: list[dict[str, Any]]
    kept_epoch: int
    before: float | None


@dataclass
class _Course:
    """Progress of a run. With held-out images, `best` contains the weights of `kept_epoch`."""

    before: float | None
    best: dict[str, Tensor] | None
    kept_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def is_over(self, epochs: int, patience: int | None) -> bool:
        """Whether all epochs are done, or the patience is exhausted."""
        done = len(self.history)
        return done >= epochs or (patience is not None and done - self.kept_epoch >= patience)

    def improves(self, value: float) -> bool:
        """Whether a held-out loss is lower than all previous ones; False for NaN."""
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
    schedule: Schedule = "cosine",
    held_out: Batches | None = None,
    patience: int | None = None,
    frozen: str | Sequence[str] = (),
    train_head: bool = False,
    train_normalization: bool = False,
    head: str | Sequence[str] | None = None,
    loss: str | LossFunction = "cross-entropy",
    autocast: torch.dtype | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | Report = False,
    seed: int = 0,
    batch: BatchRule | None = None,
    device: str | torch.device | None = None,
) -> FinetuneResult:
    """Fine-tune the kept weights of a model in place; pruned weights remain zero.

    On any error the weights, buffers, modes and flags of the model are restored.

    Args:
        model: Any module, or a wrapper of it, whose forward is trained. Its modes and
            `requires_grad` flags are restored at the end.
        batches: Iterable of `(images [n, ...], labels [n])`, or of dicts of them as for
            `fastsal.collect`, iterated once per epoch; see also `batch`. The order may change
            between epochs, as with a `DataLoader` with `shuffle=True`.
        masks: Masks, True = kept; applied to the model first, see `Masks.hold`.
        epochs: Number of passes over `batches`, at least 1.
        lr: Initial learning rate.
        optimizer: Name in timm: "sgd" (Nesterov), "momentum" (without Nesterov), "adamw" or another
            name of `timm.optim.list_optimizers()`.
        momentum: Momentum, for optimizers that have one. It may be 0 with "momentum" only, as
            Nesterov momentum must be positive.
        weight_decay: Weight decay of parameters with two or more axes.
        schedule: Learning-rate schedule: "cosine" or "linear" decay to zero, or "constant".
        held_out: Iterable of held-out `(images, labels)`, iterated after every epoch. With it, the
            model ends with the weights of the lowest mean held-out loss, possibly the initial ones.
        patience: Number of consecutive epochs without a lower held-out loss after which training
            stops; None for all epochs.
        frozen: Names or `fnmatch` patterns of further parameters to freeze.
        train_head: Whether to train the classifier: the layers of `get_classifier()`, as timm's
            models have it, else the linear layer that produces the output.
        train_normalization: Whether to train normalization layers. Otherwise their running
            statistics are frozen too.
        head: Name of the classifier's layer, or several; None finds it.
        loss: "cross-entropy", or a function `(outputs, labels)` that returns losses `[n]`, where
            `outputs` is what the model returns; the mean over a batch is minimized.
        autocast: dtype for `torch.autocast`: `torch.bfloat16`, `torch.float16` (with a scaled
            loss), or None.
        checkpoint: File for the state after every epoch. The same call with the same batches
            resumes from it, with bit-identical results on the CPU. Deleted at the end. The file of
            a run with another model, images, labels, loss or other arguments is rejected; images
            that change on every pass, as augmented ones do, cannot be compared.
        progress: True shows a progress bar; a function is called with the numbers of samples done
            and in total.
        seed: Seed of all random numbers: dropout, and shuffles that use those of PyTorch.
        batch: Function from a batch to `(images, labels)`, for batches and held-out batches of
            another form.
        device: Device to train on, such as `"cuda"` or `"auto"`; afterwards the model is where it
            was. None: where the model is.

    Returns:
        The history of the epochs, and which epoch was kept.

    Raises:
        InvalidArgument: An argument is invalid.
        UnknownParameter: `frozen` matches no parameter.
        MaskError: The masks do not fit the model.
        DataError: Images or labels are invalid.
        NonFiniteLoss: The loss or a weight became NaN or infinite.
        FileFormatError: `checkpoint` is damaged, or belongs to another run.
    """
    if not isinstance(masks, Masks):
        raise InvalidArgument(f"masks must be fastsal.Masks, got {type(masks).__name__}")
    epochs, lr = whole("epochs", epochs, 1), real("lr", lr, above=0)
    patience = None if patience is None else whole("patience", patience, 1)
    momentum, weight_decay = real("momentum", momentum), real("weight_decay", weight_decay)
    seed = whole("seed", seed, None)
    check_autocast(autocast)
    _check_batches(batches, held_out, epochs, patience)
    if loss == "cross-entropy":
        check_labels_of(batches, model)
        check_labels_of(held_out, model)
        if lacks_classifier(model) or not train_head:
            check_classifier(model, "training")
    batches, held_out = ruled(batches, batch), ruled(held_out, batch)
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
    with on_device(model, device, keeps=True):
        first = None
        if not (train_head or head is not None or declares_head(model)):
            first, batches = first_images(batches)
        with using_head(model, head):
            trained = trained_parameters(
                model,
                frozen,
                train_head=train_head,
                train_normalization=train_normalization,
                images=first,
            )
        tensors = _tensors(model)
        with (
            all_or_nothing(tensors) as original,
            training_only(model, trained, train_normalization=train_normalization),
            reporter(progress, "fine-tuning") as report,
        ):
            records = checkpoint is not None
            trainer = Trainer(model, batches, loss=loss, records=records, **how)
            keeper = None
            if checkpoint is not None:
                asked = {
                    **how,
                    "patience": patience,
                    "held_out": held_out is not None,
                    "number of batches": operator.length_hint(batches),
                    "frozen": frozen,
                    "head": head,
                    "train_head": train_head,
                    "train_normalization": train_normalization,
                    "loss": identity_of(loss),
                }
                start = {**original, **{f"mask:{name}": mask for name, mask in masks.items()}}
                structure = structure_digest(model)
                keeper = TrainingCheckpoint(
                    checkpoint, asked, start, "finetune", structure, trainer.seen
                )
            # If all masked parameters are frozen, no optimizer can change their zeros.
            moved = not set(trained.values()).isdisjoint(masks.parameters(model).values())
            with masks.hold(model, trainer.optimizer if moved else None):
                course = _train(trainer, tensors, held_out, epochs, patience, keeper, report)
            if keeper is not None:
                keeper.remove()
    return FinetuneResult(course.history, course.kept_epoch, course.before)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model, not copied."""
    inner = unwrapped(model)
    return {**dict(inner.named_parameters()), **dict(inner.named_buffers())}


def _train(
    trainer: Trainer,
    tensors: Mapping[str, Tensor],
    held_out: Batches | None,
    epochs: int,
    patience: int | None,
    keeper: TrainingCheckpoint | None,
    report: Report,
) -> _Course:
    """Train all epochs, or those after the checkpoint if there is one, and keep the best."""
    saved = keeper.load(trainer.passes(held_out)) if keeper is not None else None
    if saved is not None:
        restore(tensors, saved["tensors"])
        trainer.load_state_dict(saved["trainer"])
        course = _Course(**saved["course"])
    elif held_out is not None:
        course = _Course(trainer.mean_loss(held_out), copies(tensors))
    else:
        course = _Course(None, None)
    total = None if trainer.samples is None else trainer.samples * epochs

    def report_epoch(samples: int) -> None:
        report(sum(line["samples"] for line in course.history) + samples, total)

    while not course.is_over(epochs, patience):
        start = time.perf_counter()
        number = len(course.history) + 1
        line = trainer.epoch(number, report_epoch)
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


def _check_batches(
    batches: Batches, held_out: Batches | None, epochs: int, patience: int | None
) -> None:
    again = "must be iterable more than once, such as a list or a DataLoader, got an iterator"
    if epochs > 1 and isinstance(batches, Iterator):
        raise InvalidArgument(f"batches {again} for {epochs} epochs")
    if isinstance(held_out, Iterator):
        raise InvalidArgument(f"held_out {again}")
    if patience is not None and held_out is None:
        raise InvalidArgument(f"patience must be None without held_out, got {patience}")
