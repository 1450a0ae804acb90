"""`fastsal verify`: check that masks match the weights and that pruned weights are zero."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastsal.cli import options
from fastsal.cli.help import Command
from fastsal.errors import FileFormatError, InvalidArgument, MaskError
from fastsal.utils.paths import user_path
from fastsal.utils.plain_text import counted

if TYPE_CHECKING:
    from torch import Tensor

    from fastsal.pruning.masks.masks import Masks

_SHOWN = 10  # failures that are printed; the rest is counted


@click.command(cls=Command, short_help="Check that pruned weights are zero and files are intact.")
@click.argument("target", metavar="[DIR|MODEL]", required=False)
@options.weights_options
@options.masks_option()
@options.architecture_options
@options.seed_option
@options.json_option
def verify(**given: Any) -> None:
    """Check the folder of a run, DIR, or a MODEL with its --weights and --masks.

    The masks must be intact and match the names and shapes of the weights, and every pruned weight
    must be exactly zero. In a folder the files must also match the checksums of its report. The
    exit status is 0 if all checks pass and 1 if one fails. Where layers compute their weight from
    a masked parameter, the sparsity of the weights in use is shown too.

    Example: fastsal verify run
    """
    from rich.text import Text

    from fastsal.cli.output import console, emit
    from fastsal.pruning.masks.in_use import InUse

    failures, counts = _check(given)
    if given["as_json"]:
        emit({"ok": not failures, "failures": failures, **counts})
    else:
        screen = console()
        for failure in failures[:_SHOWN]:
            screen.print(Text.assemble(("FAILED", "red"), f" {failure}"), soft_wrap=True)
        if len(failures) > _SHOWN:
            screen.print(f"... and {len(failures) - _SHOWN} more")
        if counts:
            screen.print(
                f"{counted(counts['parameters'], 'parameter')}, {counts['weights']:,} weights, "
                f"{counts['pruned']:,} pruned, sparsity {counts['sparsity']:.4f}"
            )
        if not failures:
            words = " masks intact, every pruned weight is zero"
            screen.print(Text.assemble(("OK", "green"), words))
        if counts.get("in_use") and counts["in_use"]["computed"]:
            screen.print(str(InUse(**counts["in_use"])), style="yellow", soft_wrap=True)
    click.get_current_context().exit(1 if failures else 0)


def _check(given: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the failed checks as sentences, and counts of weights."""
    import fastsal
    from fastsal.cli.runfolder import masks_file, recorded_digests, recorded_in_use, weights_file
    from fastsal.models.loading import load_model
    from fastsal.models.state_dicts import fitted
    from fastsal.models.weights import read_weights
    from fastsal.utils.digests import file_digest

    folder = Path(given["target"]) if given["target"] else None
    is_run = folder is not None and folder.is_dir()
    if is_run and (given["weights"] or given["masks"]):
        raise InvalidArgument("--weights and --masks cannot be combined with the folder of a run")
    if not is_run and not (given["weights"] and given["masks"]):
        what = f", got {folder}, which is not a folder" if folder else ""
        raise InvalidArgument(f"the folder of a run, or --weights and --masks, is required{what}")
    weights_path = weights_file(folder if is_run and folder else user_path(given["weights"]))
    masks_path = masks_file(folder if is_run and folder else given["masks"])
    if not masks_path.is_file():
        raise InvalidArgument(f"masks: no such file: {masks_path}")
    failures = []
    model: Any = None
    try:
        if is_run and folder:
            for name, digest in recorded_digests(folder).items():
                if not (folder / name).is_file():
                    failures.append(f"{name} is missing")
                elif file_digest(folder / name) != digest:
                    failures.append(f"{name} does not match the checksum in the report")
        masks = fastsal.Masks.load(masks_path)
        if is_run or not given["target"]:
            found = read_weights(weights_path, weights_key=given["weights_key"])
            state, _ = fitted(found, list(masks), weights_path)
        else:
            model = load_model(
                given["target"],
                weights=weights_path,
                weights_key=given["weights_key"],
                num_classes=given["num_classes"],
                in_chans=given["in_chans"],
            )
            state = dict(model.state_dict())
    except (FileFormatError, MaskError) as error:
        return [*failures, " ".join(str(error).split())], {}
    failures += _broken(masks, state)
    in_use: Any = None
    if is_run and folder:
        in_use = recorded_in_use(folder)
    elif model is not None and not failures:
        use = masks.in_use(model)
        in_use = use.as_dict() if use else None
    return failures, {
        "parameters": len(masks),
        "weights": sum(mask.numel() for mask in masks.values()),
        "pruned": sum(int((~mask).sum()) for mask in masks.values()),
        "sparsity": masks.sparsity,
        "in_use": in_use,
    }


def _broken(masks: Masks, state: dict[str, Tensor]) -> list[str]:
    """Return a sentence for each mask that does not match the weights or its pattern."""
    from fastsal.pruning.masks.patterns import broken_groups

    failures = [
        f"{name}: {count} groups break the pattern {masks.recipe['pattern']}"
        for name, count in broken_groups(masks, masks.recipe).items()
    ]
    for name, mask in masks.items():
        if name not in state:
            failures.append(f"{name} is in the masks but not in the weights")
        elif state[name].shape != mask.shape:
            failures.append(
                f"{name} has shape {list(state[name].shape)}, but its mask has {list(mask.shape)}"
            )
        else:
            alive = int((state[name][~mask] != 0).sum())
            if alive:
                failures.append(f"{name}: {alive} pruned weights are not zero")
    return failures
