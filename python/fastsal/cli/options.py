"""Arguments and options that commands share, in groups, and their types."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from fastsal.utils.choices import CRITERION_NAMES, CURVATURES, PRECISIONS, SCOPES

F = TypeVar("F", bound=Callable[..., Any])

CRITERIA_HELP = f"Score of a weight: {', '.join(CRITERION_NAMES)}."


def criterion(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """Check that a criterion is in `fastsal.pruning.criteria.CRITERIA`."""
    from fastsal.pruning.criteria import CRITERIA

    if value not in CRITERIA:
        names = ", ".join(sorted(CRITERIA))
        raise click.BadParameter(f"{value!r} is none of {names}.", ctx, param)
    return value


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
        raise click.BadParameter(f"{error}.", ctx, param) from None
    return parsed if isinstance(parsed, (str, float)) else str(parsed)


def size(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[int, int] | str | None:
    """Parse `96`, `64x96` (height x width), or `native`."""
    if value is None or value == "native":
        return value
    parts = value.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise click.BadParameter(
            f"{value!r}; takes 96, 64x96 (height x width), or native.", ctx, param
        )
    return int(parts[0]), int(parts[-1])


def floats(ctx: click.Context, param: click.Parameter, value: str | None) -> list[float] | None:
    """Parse numbers with commas between."""
    if value is None:
        return None
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"{value!r}; takes numbers with commas between, 0.5,0.5,0.5.", ctx, param
        ) from None


def group(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Join decorators; the first is listed first in the help."""

    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


PATH = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)

weights_option = click.option(
    "--weights",
    metavar="FILE|DIR|pretrained",
    help="A .safetensors or .pth file, the folder of a run, or timm's weights. "
    "[default: random weights]",
)
size_options: Callable[[F], F] = group(
    click.option("--num-classes", type=COUNT, help="Outputs of the classifier."),
    click.option("--in-chans", type=COUNT, help="Channels of the images."),
)
model_options: Callable[[F], F] = group(click.argument("model"), weights_option, size_options)
input_options: Callable[[F], F] = group(
    click.option(
        "--size", metavar="PIXELS", callback=size, help="Of the images. [default: the model's]"
    ),
    click.option(
        "--mean", metavar="NUMBERS", callback=floats, help="Where white is 1. [default: as above]"
    ),
    click.option("--std", metavar="NUMBERS", callback=floats, help="The same. [default: as above]"),
    click.option("--batch-size", type=COUNT, default=64, show_default=True, help="Images a pass."),
)
statistics_options: Callable[[F], F] = group(
    click.option(
        "--data",
        type=PATH,
        help="Labelled images that the statistics are taken from; any with --curvature features.",
    ),
    click.option(
        "--samples",
        type=COUNT,
        help="Images to use: the first, or drawn by --seed where sorted by class. [default: all]",
    ),
    click.option("--micro-batch", type=COUNT, help="Samples whose gradients are held at once."),
    click.option("--block-size", type=COUNT, help="Weights a Fisher block. [default: 64]"),
    click.option(
        "--curvature",
        type=click.Choice(CURVATURES),
        default="empirical",
        show_default=True,
        help="Gradient of the loss at the true label, at a label drawn from the model, or of "
        "matching the model's own features, which needs no labels.",
    ),
    click.option(
        "--parameters",
        multiple=True,
        metavar="PATTERN",
        help="Name or pattern of weights to prune; may be repeated. "
        "[default: weights of linear and convolution layers]",
    ),
    click.option("--precision", type=click.Choice(PRECISIONS), help="Of the statistics."),
)


budget_options: Callable[[F], F] = group(
    click.option(
        "--memory-budget",
        metavar="BYTES",
        help="Most that may be added to the process, as 8GiB. [default: no limit]",
    ),
    click.option(
        "--scratch",
        type=PATH,
        metavar="DIR",
        help="Folder for what the budget has no room for; nothing is left in it.",
    ),
    click.option("--scratch-budget", metavar="BYTES", help="Most that statistics may take there."),
)


def criterion_option(default: str) -> Callable[[F], F]:
    """Return `--criterion`."""
    return click.option(
        "--criterion",
        metavar="NAME",
        callback=criterion,
        default=default,
        show_default=True,
        help=CRITERIA_HELP,
    )


ranking_options: Callable[[F], F] = group(
    click.option("--sparsity", type=float, help="Share of weights to prune, 0 to 1."),
    click.option(
        "--scope",
        type=click.Choice(SCOPES),
        default="global",
        show_default=True,
        help="Where weights compete.",
    ),
    click.option(
        "--pattern",
        help="2:4 keeps two of every four along the input axis, 1x4 four together or none.",
    ),
    click.option("--floor", type=float, help="Least share kept of any parameter. [default: 0]"),
)
seed_option = click.option(
    "--seed", type=int, default=0, show_default=True, help="Of random weights, draws and shuffles."
)
run_options: Callable[[F], F] = group(
    seed_option,
    click.option("--threads", type=COUNT, help="Threads to compute with. [default: all cores]"),
    click.option(
        "--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else."
    ),
    click.option("--quiet", is_flag=True, help="No progress bar."),
)
force_option = click.option(
    "--force", "--overwrite", "force", is_flag=True, help="Replace what stands at --out."
)


def damping_option(default: str) -> Callable[[F], F]:
    """Return `--damping`; it takes "auto" if that is the default."""
    return click.option(
        "--damping",
        metavar="NUMBER|MULTIPLEx|auto" if default == "auto" else "NUMBER|MULTIPLEx",
        callback=damping,
        default=default,
        show_default=True,
        help="Number to add to the diagonal of the Fisher, or a multiple of its mean such as 0.1x"
        + ("; auto chooses it on held-out samples." if default == "auto" else "."),
    )


def out_option(metavar: str, text: str) -> Callable[[F], F]:
    """Return a required `--out` and its `--force`."""
    return group(
        click.option("--out", type=PATH, required=True, metavar=metavar, help=text), force_option
    )
