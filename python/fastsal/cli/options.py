"""Arguments and options that commands share, in groups."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import click

from fastsal.cli.types import (
    COUNT,
    NUMBER,
    PATH,
    SEED,
    TEXT,
    THREADS,
    Device,
    Integer,
    Registered,
    choice,
    parse_numbers,
    parse_size,
)
from fastsal.utils.choices import (
    AUTOCAST_TYPES,
    CRITERION_NAMES,
    CROP_MODES,
    CURVATURES,
    INTERPOLATIONS,
    PRECISIONS,
)

F = TypeVar("F", bound=Callable[..., Any])


def damping(ctx: click.Context, param: click.Parameter, value: str) -> float | str:
    """Parse a positive number, a multiple such as "0.1x", or "auto" where that is the default."""
    from fastsal.errors import InvalidArgument
    from fastsal.pruning.damping import parse_damping

    given: float | str = value
    with contextlib.suppress(ValueError):
        given = float(value)
    try:
        parsed = parse_damping(given, auto=param.default == "auto")
    except InvalidArgument as error:
        message = str(error).removeprefix("damping ")
        raise click.BadParameter(message, ctx, param) from None
    return parsed if isinstance(parsed, (str, float)) else str(parsed)


def together(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Join decorators; the first is listed first in the help."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


weights_option = click.option(
    "--weights",
    type=TEXT,
    metavar="FILE|DIR|pretrained",
    show_default="random weights",
    help="Weights to load: a file (.safetensors, .pth, .pt, .pth.tar, .ckpt, .bin), the folder of "
    "a run, or timm's pretrained weights.",
)
weights_key_option = click.option(
    "--weights-key",
    metavar="KEY",
    show_default="an average if there is one",
    help="Key of the state dict in the file of --weights, such as state_dict_ema, with dots "
    "between nested keys; or the prefix of the names to load.",
)
weights_options: Callable[[F], F] = together(weights_option, weights_key_option)
architecture_options: Callable[[F], F] = together(
    click.option(
        "--num-classes",
        type=Integer(least=0),
        show_default="the model's own",
        help="Number of classes, the outputs of the classifier; 0 for a model of timm without one.",
    ),
    click.option(
        "--in-chans",
        type=COUNT,
        show_default="the model's own",
        help="Number of image channels.",
    ),
)
model_options: Callable[[F], F] = together(
    click.argument("model"), weights_options, architecture_options
)
class_map_option = click.option(
    "--class-map",
    type=TEXT,
    metavar="FILE|imagenet|natural",
    show_default="class folders in the order of their names",
    help="Which output of the model each class belongs to: a FILE with the name and the index of "
    "each class, or the names in the order of the outputs, as text or JSON; imagenet for WordNet "
    "ids; or natural, which sorts class2 before class10.",
)
crop_options: Callable[[F], F] = together(
    click.option(
        "--crop-pct",
        type=NUMBER,
        show_default="the model's own, for image files",
        help="Size of the input divided by the size that images are resized to before the crop.",
    ),
    click.option(
        "--crop-mode",
        type=choice(CROP_MODES),
        show_default="the model's own",
        help="How images of another shape are cropped: at the longer side (center), not at all, "
        "as they are squeezed (squash), or not at all, with borders (border).",
    ),
    click.option(
        "--no-crop",
        is_flag=True,
        help="Squeeze the whole image into the input: --crop-pct 1 --crop-mode squash.",
    ),
    click.option(
        "--interpolation",
        type=choice(INTERPOLATIONS),
        show_default="the model's own",
        help="Interpolation for resizing images.",
    ),
)


def _size_option(default: str) -> Callable[[F], F]:
    return click.option(
        "--size",
        metavar="PIXELS",
        callback=parse_size,
        show_default=default,
        help="Size of the input: 96, 64x96 (height x width), native for that of the images, or the "
        "size at which timm trains or evaluates the model (train, test).",
    )


size_option: Callable[[F], F] = _size_option("the model's own")
run_size_option: Callable[[F], F] = _size_option("that of the images of the run")
model_spec_option: Callable[[F], F] = click.option(
    "--model",
    metavar="MODEL",
    show_default="as the report of the run says",
    help="How the original model is built: a timm name, or file.py:function if the file was moved.",
)
input_options: Callable[[F], F] = together(
    class_map_option,
    size_option,
    crop_options,
    click.option(
        "--mean",
        metavar="NUMBERS",
        callback=parse_numbers,
        show_default="the model's own",
        help="Per-channel mean for pixels in [0, 1], separated by commas.",
    ),
    click.option(
        "--std",
        metavar="NUMBERS",
        callback=parse_numbers,
        show_default="the model's own",
        help="Per-channel standard deviation for pixels in [0, 1], separated by commas.",
    ),
    click.option(
        "--batch-size", type=COUNT, default=64, show_default=True, help="Images per batch."
    ),
    click.option(
        "--workers",
        type=Integer(least=0),
        show_default="the processors, at most 4",
        help="Number of processes that decode image files ahead of the passes; 0 for none.",
    ),
    click.option(
        "--image-cache",
        metavar="BYTES",
        show_default="a quarter of the free memory, 0 with --memory-budget",
        help="Limit on the memory for decoded image files that later passes reuse, for example "
        "8GiB; 0 for none.",
    ),
)


def samples_option(text: str = "") -> Callable[[F], F]:
    """Return `--samples`; `text` replaces how the images are chosen."""
    chosen = text or "the first ones, or a random draw by --seed if they are sorted by class"
    return click.option(
        "--samples", type=COUNT, show_default="all", help=f"Number of images to use: {chosen}."
    )


statistics_options: Callable[[F], F] = together(
    click.option(
        "--data",
        type=PATH,
        help="Labeled images from which statistics are collected; labels are not needed with "
        "--curvature features.",
    ),
    samples_option(),
    click.option(
        "--micro-batch",
        type=COUNT,
        show_default="chosen by memory",
        help="Number of samples whose gradients are held in memory at once.",
    ),
    click.option(
        "--block-size",
        type=COUNT,
        show_default="64",
        help="Number of weights in a block of the Fisher matrix.",
    ),
    click.option(
        "--curvature",
        type=choice(CURVATURES),
        show_default="empirical; features if the images have no labels",
        help="Gradient that statistics are collected from: of the loss at the true label "
        "(empirical), of the loss at a label drawn from the model (sampled), or of matching the "
        "model's own features, without labels (features).",
    ),
    click.option(
        "--head",
        metavar="NAME",
        show_default="found",
        help="Name of the classifier's layer, whose input is the features of --curvature features.",
    ),
    click.option(
        "--parameters",
        multiple=True,
        metavar="PATTERN",
        show_default="weights of Linear, ConvNd and attention layers",
        help="Name or wildcard pattern of weights to prune; a leading ! excludes; may be repeated.",
    ),
    click.option(
        "--precision",
        type=choice(PRECISIONS),
        show_default="float32",
        help="Floating-point type in which statistics are accumulated.",
    ),
)
budget_options: Callable[[F], F] = together(
    click.option(
        "--memory-budget",
        metavar="BYTES",
        show_default="no limit",
        help="Limit on the memory added to the process, for example 8GiB.",
    ),
    click.option(
        "--scratch",
        type=PATH,
        metavar="DIR",
        help="Folder for a temporary file with the statistics that exceed --memory-budget; without "
        "it fastsal prune recomputes them on each use.",
    ),
    click.option(
        "--scratch-budget",
        metavar="BYTES",
        show_default="no limit",
        help="Limit on the size of the temporary file in --scratch, for example 100GiB.",
    ),
)


def criterion_option(default: str) -> Callable[[F], F]:
    """Return `--criterion`."""
    return click.option(
        "--criterion",
        type=Registered(list(CRITERION_NAMES)),
        default=default,
        show_default=True,
        help="Saliency criterion that scores the weights, or one that the file of MODEL registers.",
    )


def device_option(default: str | None = "auto") -> Callable[[F], F]:
    """Return `--device`; None is the device of the file of a study."""
    return click.option(
        "--device",
        type=Device(),
        metavar="auto|cpu|cuda|cuda:N|mps",
        default=default,
        show_default=True if default else "the device in STUDY, else auto",
        help="Device that the model runs on; auto is the GPU if there is one, else the CPU. Under "
        "torchrun each process uses a GPU of its own.",
    )


amp_option = click.option(
    "--amp",
    "--autocast",
    "autocast",
    type=choice(AUTOCAST_TYPES),
    show_default="the model's own type",
    help="Floating-point type of mixed-precision forward and backward passes.",
)
rounds_option = click.option(
    "--rounds",
    type=COUNT,
    default=1,
    show_default=True,
    help="Number of pruning rounds; each collects statistics again.",
)
seed_option = click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Seed of random weights, random draws and shuffling.",
)
threads_option = click.option(
    "--threads",
    type=THREADS,
    show_default="OMP_NUM_THREADS, else all cores",
    help="Number of CPU threads.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else."
)
quiet_option = click.option("--quiet", is_flag=True, help="Do not show progress.")
device_options: Callable[[F], F] = together(device_option(), amp_option)
run_options: Callable[[F], F] = together(seed_option, threads_option, json_option, quiet_option)
statistics_file_option = click.option(
    "--statistics",
    type=PATH,
    metavar="FILE",
    help="File of statistics to use instead of --data, written by fastsal score --save-statistics.",
)
test_option = click.option(
    "--test",
    type=PATH,
    help="Labeled images on which accuracy is measured, before and after.",
)
force_option = click.option(
    "--force", "--overwrite", "force", is_flag=True, help="Overwrite existing output."
)


def damping_option(default: str) -> Callable[[F], F]:
    """Return `--damping`; it accepts "auto" if that is the default."""
    return click.option(
        "--damping",
        metavar="NUMBER|FACTORx|auto" if default == "auto" else "NUMBER|FACTORx",
        callback=damping,
        default=default,
        show_default=True,
        help="Damping added to the diagonal of the Fisher matrix: an absolute value, or a multiple "
        "of its mean diagonal such as 0.1x"
        + (", or auto to choose it on held-out samples." if default == "auto" else "."),
    )


def masks_option(*, is_required: bool = False, default: str | bool = False) -> Callable[[F], F]:
    """Return `--masks`."""
    return click.option(
        "--masks",
        type=PATH,
        metavar="FILE|DIR",
        required=is_required,
        show_default=default,
        help="Masks: a .safetensors file, or the folder of a run.",
    )


def out_option(metavar: str, text: str) -> Callable[[F], F]:
    """Return a required `--out` and its `--force`."""
    return together(
        click.option("--out", type=PATH, required=True, metavar=metavar, help=text), force_option
    )
