"""The result of `refit`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class RefitResult:
    """The result of `refit`.

    Attributes:
        before: Held-out error before it: half the relative squared error of the features and half
            the mean of that of the windows.
        after: Held-out error of the weights that the model has now.
        kept_step: Step whose weights were kept; 0 for the weights from before.
        steps: Number of steps that were made.
        lr: Learning rate; with `lr="auto"` relative to the root mean square of the kept weights of
            each tensor.
        windows: Names of the windows besides the features or outputs.
        micro_batch: Images of one forward and backward pass.
        history: One entry per measurement: `step`, mean training `error` since the previous one,
            and `held_out_error`.
        seconds: Wall-clock time.
    """

    before: float
    after: float
    kept_step: int
    steps: int
    lr: float
    windows: list[str]
    micro_batch: int
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def kept(self) -> bool:
        """Whether the weights of a step were kept, that is whether the held-out error is lower."""
        return self.kept_step > 0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        return (
            f"RefitResult(held-out error {self.before:.4g} -> {self.after:.4g}, kept_step="
            f"{self.kept_step} of {self.steps}, lr={self.lr:g}, {len(self.windows)} windows, "
            f"{self.seconds:.1f} s)"
        )
