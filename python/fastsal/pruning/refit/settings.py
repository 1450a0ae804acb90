"""How to refit: windows, steps, learning rate, augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastsal.errors import InvalidArgument
from fastsal.pruning.refit.draws import Augmentation, flip_and_shift
from fastsal.utils.choices import REFIT_WINDOWS, RefitWindows
from fastsal.utils.identity import identity_of
from fastsal.utils.numbers import real, whole


@dataclass(frozen=True)
class Refit:
    """Settings of `fastsal.refit`.

    Attributes:
        windows: Outputs that are matched besides the features: `"blocks"` (those of every residual
            or transformer block, found automatically), `"whole"` (none), or names of modules.
        steps: Number of steps, at least 1. `"auto"` reads every image twice, which costs about
            three times the collection of their statistics.
        lr: Learning rate of Adam, which rises in the first tenth of the steps and decays to zero
            by a cosine. `"auto"` is relative to the root mean square of the kept weights of each
            tensor: the single step that lowers the error of one batch most, times the larger of 2
            and `sqrt(steps) / 2`, or less where that does not lower the held-out error.
        batch_size: Images of a step.
        micro_batch: Images of one forward and backward pass, of which a step adds up several; None
            chooses it by the memory of the activations.
        augment: `"flip-shift"` mirrors half of the images and shifts each by up to an eighth of its
            side; None uses the images as they are; or a function `(images, generator)` to images.
        checks: Number of times that the held-out error is measured, at equal distances.
        patience: Number of measurements without a lower error after which refitting stops.
        between_rounds: In `prune` with several rounds: whether the model is refitted after each
            round, and not only after the last.
    """

    windows: RefitWindows | Sequence[str] = "blocks"
    steps: int | Literal["auto"] = "auto"
    lr: float | Literal["auto"] = "auto"
    batch_size: int = 32
    micro_batch: int | None = None
    augment: Literal["flip-shift"] | Augmentation | None = "flip-shift"
    checks: int = 5
    patience: int = 5
    between_rounds: bool = False

    def checked(self) -> Refit:
        """Return the settings with plain numbers.

        Raises:
            InvalidArgument: A value is invalid.
        """
        lr: Any = self.lr
        if lr != "auto":
            if isinstance(lr, str):
                raise InvalidArgument(f"lr must be a positive number or 'auto', got {lr!r}")
            lr = real("lr", lr, above=0)
        steps: Any = self.steps
        if steps != "auto":
            if isinstance(steps, str):
                raise InvalidArgument(f"steps must be a whole number or 'auto', got {steps!r}")
            steps = whole("steps", steps, 1)
        if isinstance(self.windows, str) and self.windows not in REFIT_WINDOWS:
            raise InvalidArgument(
                f"windows must be 'blocks', 'whole' or names of modules, got {self.windows!r}"
            )
        if not (self.augment is None or self.augment == "flip-shift" or callable(self.augment)):
            raise InvalidArgument(
                f"augment must be 'flip-shift', None or a function, got {self.augment!r}"
            )
        if not isinstance(self.between_rounds, bool):
            raise InvalidArgument(
                f"between_rounds must be True or False, got {self.between_rounds!r}"
            )
        micro_batch = self.micro_batch
        return replace(
            self,
            lr=lr,
            steps=steps,
            batch_size=whole("batch_size", self.batch_size, 1),
            micro_batch=None if micro_batch is None else whole("micro_batch", micro_batch, 1),
            checks=whole("checks", self.checks, 1),
            patience=whole("patience", self.patience, 1),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; a function by its identity."""
        windows = self.windows if isinstance(self.windows, str) else list(self.windows)
        augment = identity_of(self.augment) if callable(self.augment) else self.augment
        return {**vars(self), "windows": windows, "augment": augment}

    @property
    def augmentation(self) -> Augmentation | None:
        """The function that augments images, or None."""
        return flip_and_shift if self.augment == "flip-shift" else self.augment

    @classmethod
    def of(cls, given: str | Sequence[str] | Refit) -> Refit:
        """Return checked settings; a string or names are windows with the other defaults.

        Raises:
            InvalidArgument: A value is invalid.
        """
        return (given if isinstance(given, Refit) else cls(windows=given)).checked()
