"""Open the model, the images and the statistics that the options of a command describe."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastsal.errors import DataError, InvalidArgument
from fastsal.utils.atomic import check_writable
from fastsal.utils.choices import CRITERION_NAMES
from fastsal.utils.paths import user_path

if TYPE_CHECKING:
    import torch
    from torch import nn

    import fastsal
    from fastsal.data.image_set import ImageBatches
    from fastsal.fisher.block_fisher import BlockFisher
    from fastsal.models.inputs import InputSpec


def set_threads(threads: int | None) -> None:
    """Set the number of threads of torch and of the core."""
    if threads is None:
        return
    import torch

    import fastsal

    torch.set_num_threads(threads)
    fastsal.set_num_threads(threads)


def open_model(given: dict[str, Any]) -> tuple[nn.Module, InputSpec]:
    """Load the model that MODEL and its options describe; return it and its input specification."""
    import torch

    from fastsal.cli.runfolder import weights_file
    from fastsal.models.inputs import input_spec
    from fastsal.models.loading import load_model

    _check_criterion(given, is_loaded=False)
    weights = given["weights"]
    if weights is None and not given.get("meta"):
        # A function of a file may load weights itself.
        which = "those of the function" if ".py:" in str(given["model"]) else "random"
        click.echo(f"note: --weights is not given; the weights are {which}", err=True)
    elif weights is not None and weights != "pretrained":
        weights = weights_file(user_path(weights))
    where = torch.device("meta") if given.get("meta") else contextlib.nullcontext()
    # What the function of a file prints is no part of the output of the command.
    with where, contextlib.redirect_stdout(sys.stderr):
        model = load_model(
            given["model"],
            weights=weights,
            weights_key=given["weights_key"],
            num_classes=given["num_classes"],
            in_chans=given["in_chans"],
            seed=given["seed"],
            device="cpu" if given.get("meta") else given["device"],
        )
    _check_criterion(given, is_loaded=True)
    names = ("size", "mean", "std", "interpolation")
    chosen = {name: given.get(name) for name in names}
    return model, input_spec(model, **chosen, **crop_arguments(given))


def crop_arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Return the crop of `fastsal.input_spec` that the options describe.

    Raises:
        InvalidArgument: `--no-crop` is given with another crop.
    """
    chosen = {name: given.get(name) for name in ("crop_pct", "crop_mode")}
    if not given.get("no_crop"):
        return chosen
    for name, value in chosen.items():
        if value is not None:
            raise InvalidArgument(f"{name} must not be given with --no-crop, got {value}")
    return {"crop_pct": 1.0, "crop_mode": "squash"}


def _check_criterion(given: dict[str, Any], *, is_loaded: bool) -> None:
    """Check `--criterion`; a criterion of the user is registered when the model is loaded."""
    from fastsal.pruning.criteria import CRITERIA

    name = given.get("criterion")
    if name is None or name in CRITERIA or (not is_loaded and ".py" in given["model"]):
        return
    names = dict.fromkeys((*CRITERION_NAMES, *CRITERIA))
    raise InvalidArgument(f"--criterion must be one of {', '.join(names)}, got {name!r}")


def open_batches(
    given: dict[str, Any],
    model: nn.Module,
    spec: InputSpec,
    path: Path,
    *,
    samples: int | None = None,
    shuffle: bool = False,
    labeled: bool = True,
) -> ImageBatches:
    """Open labeled images and check that the model has a class for each label.

    Labels that do not look like the model's outputs are noted. Without `labeled` the images need no
    labels, and existing labels are ignored.
    """
    from fastsal.data.class_map import IMAGENET, imagenet_map
    from fastsal.data.folders import load_images
    from fastsal.data.numbering import check_numbering
    from fastsal.data.opening import is_name, open_images
    from fastsal.models.classifier import class_count

    class_map = given["class_map"] if labeled else None
    if class_map == IMAGENET:
        class_map = imagenet_map(class_count(model))
    if is_name(str(path)):
        images = open_images(str(path), class_map=class_map)
    else:
        images = load_images(path, labeled=labeled, class_map=class_map)
    count = None
    if labeled:
        first = images.batches(spec, 1, samples=1).first_batch()[0]
        count = class_count(model, first)
    is_mapped = images.numbering == "map"
    if count is not None and not is_mapped and int(images.y.max()) >= count:
        raise DataError(
            f"labels of {path} must be in 0 to {count - 1} for a model of {count} classes, got "
            f"{int(images.y.max())}"
        )
    if labeled:
        check_numbering(images, count)
    # An unsorted .npz keeps its order, so that the first N images do not depend on a seed.
    seed = given["seed"] if shuffle and images.is_sorted_by_class else None
    cache = given["image_cache"]
    if cache is None and given.get("memory_budget") is not None:
        cache = 0  # the budget is for all that the command adds
    return images.batches(
        spec,
        given["batch_size"],
        samples=samples,
        shuffle_seed=seed,
        workers=given["workers"],
        pin_memory=any(p.is_cuda for p in model.parameters()),
        cache=cache,
    )


def image_size(spec: InputSpec, *sources: ImageBatches | None) -> list[int] | None:
    """Return the height and width of the images that a model was run on; None if unknown."""
    if spec.size is not None:
        return list(spec.size)
    source = next((each for each in sources if each), None)
    return None if source is None else list(source.first_batch()[0].shape[-2:])


def training_batches(
    given: dict[str, Any], model: nn.Module, spec: InputSpec
) -> ImageBatches | None:
    """Open `--data`; None if it is neither given nor required by the criterion.

    Images that are sorted by class are shuffled by `--seed`.
    """
    if given["data"] is not None:
        limits = ("max_accuracy_drop", "max_loss_increase")  # tested on labels
        is_limited = any(given.get(name) for name in limits)
        if given.get("curvature") is None and not is_limited and given["class_map"] is None:
            _choose_curvature(given)
        labeled = given.get("curvature") != "features" or is_limited
        return open_batches(
            given,
            model,
            spec,
            given["data"],
            samples=given["samples"],
            shuffle=True,
            labeled=labeled,
        )
    from fastsal.pruning.criteria import CRITERIA

    if not CRITERIA[given["criterion"]].needs_fisher:
        return None
    raise InvalidArgument(f"--data is required by the criterion {given['criterion']!r}")


def _choose_curvature(given: dict[str, Any]) -> None:
    """Set the curvature to that of features where the images of `--data` have no labels."""
    from fastsal.data.folders import lacks_labels

    if lacks_labels(given["data"]):
        given["curvature"] = "features"
        click.echo(
            f"note: the images of {given['data']} have no labels; the statistics are those of the "
            "features (--curvature features)",
            err=True,
        )


def check_test(data: ImageBatches | None, test: ImageBatches, name: str = "test") -> None:
    """Check that `--data` and `--test` have the same classes; note if they are the same images.

    `name` is the option by which `test` was given.
    """
    if data is None:
        return
    # Images whose labels are not used have no class map.
    is_mapped = (data.images.numbering == "map", test.images.numbering == "map")
    is_labeled = len(data.images.classes) > 1 and len(set(is_mapped)) == 1
    if is_labeled and data.images.classes != test.images.classes:
        raise DataError(
            f"{name} must have the classes of --data ({_shortened(data.images.classes)}), got "
            f"{test.images.source} with {_shortened(test.images.classes)}"
        )
    if data.images.source == test.images.source:
        option = name.replace("_", "-")
        click.echo(f"note: --{option} and --data are the same images", err=True)


def collect_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `fastsal.collect` that were given as options."""
    names = (
        *("block_size", "curvature", "precision", "micro_batch"),
        *("memory_budget", "scratch", "scratch_budget", "head"),
    )
    options = {name: given[name] for name in names if given.get(name) is not None}
    if given["parameters"]:
        options["parameters"] = list(given["parameters"])
    if given.get("autocast"):
        options["autocast"] = autocast_type(given)
    return {**options, "seed": given["seed"], "progress": not given["quiet"]}


def refit_settings(given: dict[str, Any]) -> fastsal.Refit | None:
    """Return how `--refit` and `--refit-steps` refit; None without them."""
    import fastsal

    if not given["refit"]:
        return None
    return fastsal.Refit(given["refit"], steps=given["refit_steps"] or "auto")


def autocast_type(given: dict[str, Any]) -> torch.dtype | None:
    """Return the type that `--amp` names; None without it."""
    import torch

    return getattr(torch, given["autocast"]) if given["autocast"] else None


def collect(given: dict[str, Any], model: nn.Module, batches: ImageBatches) -> BlockFisher:
    """Collect statistics from `batches` with the given options."""
    import fastsal

    options = collect_options(given)
    return fastsal.collect(model, batches, samples=batches.samples, **options)


def refuse_overwrite(path: Path, force: bool, argument: str = "out") -> None:
    """Check before the work that a file can be written, which an argument names.

    Raises:
        InvalidArgument: `path` is a folder, it exists and `force` is not given, or it cannot be
            written.
    """
    if path.is_dir():
        raise InvalidArgument(f"{argument} must be a file, got the folder {path}")
    if path.exists() and not force:
        raise InvalidArgument(f"{argument}: {path} already exists; give --force to overwrite it")
    check_writable(path, argument)


def check_apart(given: dict[str, Any], name: str) -> None:
    """Check that the file of an option is not --out, which would replace it.

    Raises:
        InvalidArgument: Both are one path.
    """
    path = given[name]
    if path is not None and path.resolve() == given["out"].resolve():
        option = name.replace("_", "-")
        raise InvalidArgument(f"--{option} must be another path than --out, got {path} for both")


def _shortened(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")
