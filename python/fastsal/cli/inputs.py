"""From options to a model, its images and its statistics: what commands do before their work."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastsal.errors import DataError, InvalidArgument

if TYPE_CHECKING:
    from torch import nn

    from fastsal.data.image_set import Batches
    from fastsal.fisher.block_fisher import BlockFisher
    from fastsal.models.inputs import InputSpec

WITHOUT_DATA = ("magnitude", "random")  # criteria that look at the weights alone


class Clock:
    """Seconds that named steps took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one step; times of one name add up."""
        start = time.perf_counter()
        yield
        taken = time.perf_counter() - start
        self.seconds[name] = round(self.seconds.get(name, 0.0) + taken, 3)


def set_threads(threads: int | None) -> None:
    """Set the number of threads of torch and of the core."""
    if threads is None:
        return
    import torch

    import fastsal

    torch.set_num_threads(threads)
    fastsal.set_num_threads(threads)


def open_model(given: dict[str, Any]) -> tuple[nn.Module, InputSpec]:
    """Load the model that MODEL, --weights and their kin describe, and say what it takes."""
    import torch

    from fastsal.cli.runfolder import weights_file
    from fastsal.models.inputs import input_spec
    from fastsal.models.loading import load_model

    weights = given["weights"]
    if weights is None and not given.get("meta"):
        click.echo("note: no --weights: the weights are random", err=True)
    elif weights is not None and weights != "pretrained":
        weights = weights_file(Path(weights))
    where = torch.device("meta") if given.get("meta") else contextlib.nullcontext()
    with where:
        model = load_model(
            given["model"],
            weights=weights,
            num_classes=given["num_classes"],
            in_chans=given["in_chans"],
            seed=given["seed"],
        )
    spec = input_spec(model, size=given.get("size"), mean=given.get("mean"), std=given.get("std"))
    return model, spec


def open_batches(
    given: dict[str, Any],
    model: nn.Module,
    spec: InputSpec,
    path: Path,
    *,
    samples: int | None = None,
    shuffle: bool = False,
    labelled: bool = True,
) -> Batches:
    """Open labelled images and check that the model has a class for each label.

    Without `labelled` images need no labels, and those that they have are not looked at.
    """
    from fastsal.data.folders import load_images
    from fastsal.models.classifier import class_count

    images = load_images(path, labelled=labelled)
    count = class_count(model) if labelled else None
    if count is not None and int(images.y.max()) >= count:
        raise DataError(
            f"labels: {path} has label {int(images.y.max())}; the model has {count} classes, "
            f"0 to {count - 1}"
        )
    # A mixed .npz keeps its order, so that the first N images are the same to everybody.
    seed = given["seed"] if shuffle and images.is_sorted_by_class else None
    return images.batches(spec, given["batch_size"], samples=samples, shuffle_seed=seed)


def training_batches(given: dict[str, Any], model: nn.Module, spec: InputSpec) -> Batches | None:
    """Open `--data`; None if the criterion needs none and none is given.

    Images that are sorted by class are shuffled by `--seed`.
    """
    if given["data"] is not None:
        limits = ("max_accuracy_drop", "max_loss_increase")  # tested on labels
        labelled = given.get("curvature") != "features" or any(given.get(n) for n in limits)
        return open_batches(
            given,
            model,
            spec,
            given["data"],
            samples=given["samples"],
            shuffle=True,
            labelled=labelled,
        )
    if given.get("criterion") in WITHOUT_DATA:
        return None
    raise InvalidArgument(
        f"data: criterion {given.get('criterion')!r} needs labelled images; give --data"
    )


def check_test(data: Batches | None, test: Batches, name: str = "test") -> None:
    """Check that `--data` and `--test` number their classes alike; tell if they share images.

    `name` is the option that `test` was given by.
    """
    if data is None:
        return
    is_labelled = len(data.images.classes) > 1
    if is_labelled and data.images.classes != test.images.classes:
        raise DataError(
            f"{name}: {test.images.source} has classes {_shortened(test.images.classes)}; --data "
            f"has {_shortened(data.images.classes)}"
        )
    if data.images.source == test.images.source:
        option = name.replace("_", "-")
        click.echo(f"note: --{option} holds images that are used: --data is the same", err=True)


def collect_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `fastsal.collect` that were given; its defaults fill the rest."""
    names = (
        *("block_size", "curvature", "precision", "micro_batch"),
        *("memory_budget", "scratch", "scratch_budget"),
    )
    options = {name: given[name] for name in names if given.get(name) is not None}
    if given["parameters"]:
        options["parameters"] = list(given["parameters"])
    return {**options, "seed": given["seed"], "progress": not given["quiet"]}


def collect(given: dict[str, Any], model: nn.Module, batches: Batches) -> BlockFisher:
    """Collect statistics as the options say."""
    import fastsal

    options = collect_options(given)
    return fastsal.collect(model, batches, samples=batches.samples, **options)


def ranking(given: dict[str, Any], *, finds_sparsity: bool = False) -> dict[str, Any]:
    """Return the options of `fastsal.rank` that were given, shares checked.

    With `finds_sparsity` none need be given.

    Raises:
        InvalidArgument: a share is out of range, or there is neither sparsity nor pattern.
    """
    if given["sparsity"] is None and given["pattern"] is None and not finds_sparsity:
        raise InvalidArgument("sparsity: is missing; give --sparsity, or --pattern, or both")
    for name in ("sparsity", "floor"):
        if given[name] is not None and not 0 <= given[name] <= 1:
            raise InvalidArgument(f"{name}: got {given[name]}; takes a share from 0 to 1")
    names = ("sparsity", "scope", "pattern", "floor")
    return {name: given[name] for name in names if given[name] is not None}


def refuse_overwrite(path: Path, force: bool) -> None:
    """Stop early if the file `path` exists and `--force` is not given."""
    if path.is_dir():
        raise InvalidArgument(f"out: {path} is a folder; takes a file")
    if path.exists() and not force:
        raise InvalidArgument(f"out: {path} exists; give --force to replace it")


def _shortened(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")
