"""The accuracy on the images of `--test`, before and after what a command does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

    from fastsal.data.image_set import ImageBatches
    from fastsal.utils.clock import Clock


class MeasuredAccuracy:
    """Accuracies of a model, as far as there are test images.

    Args:
        given: The options of the command.
        model: The model.
        test: Test images; None or another false value for none.
        clock: Measures the step "test".

    Attributes:
        found: `"before"` and `"after"` to accuracy, loss and number of images.
    """

    def __init__(
        self, given: dict[str, Any], model: nn.Module, test: ImageBatches | None, clock: Clock
    ) -> None:
        self._given, self._model, self._test, self._clock = given, model, test, clock
        self.found: dict[str, dict[str, Any]] = {}

    def measure(
        self, when: Literal["before", "after"], title: str, *, checks_labels: bool = False
    ) -> None:
        """Measure the model as it is now; `title` is that of the progress bar."""
        from fastsal.transfer.evaluation import measure
        from fastsal.utils.progress import reporter

        if not self._test:
            return
        with self._clock.step("test"), reporter(not self._given["quiet"], title) as report:
            done = measure(self._model, self._test, report=report, checks_labels=checks_labels)
        self.found[when] = done._asdict()
