"""`fastsal verify`: do masks and weights belong together, and is every pruned weight zero?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastsal.cli import options
from fastsal.errors import FileFormatError, InvalidArgument, MaskError

if TYPE_CHECKING:
    from torch import Tensor

    from fastsal.pruning.masks.masks import Masks

_SHOWN = 10  # failures that are printed before the rest is counted


@click.command(short_help="Check masks and pruned weights.")
@click.argument("target", metavar="[DIR|MODEL]", required=False)
@options.weights_option
@click.option("--masks", type=options.PATH, metavar="FILE|DIR", help="The masks.")
@options.size_options
@options.seed_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, nothing else.")
def verify(**given: Any) -> None:
    """Check the folder of a run, DIR, or a MODEL with its --weights and --masks.

    The masks must be intact, name weights that exist and have their shapes, and every pruned
    weight must be exactly zero. A folder's files must be those that its report was written with.
    Exits with 0 if all holds and with 1 if not.
    """
    from fastsal.cli.output import console, emit

    failures, counts = _check(given)
    if given["as_json"]:
        emit({"ok": not failures, "failures": failures, **counts})
    else:
        screen = console()
        for failure in failures[:_SHOWN]:
            screen.print(f"[red]FAILED[/red] {failure}", soft_wrap=True)
        if len(failures) > _SHOWN:
            screen.print(f"and {len(failures) - _SHOWN} more")
        if counts:
            screen.print(
                f"{counts['parameters']} parameters, {counts['weights']:,} weights, "
                f"{counts['pruned']:,} pruned, sparsity {counts['sparsity']:.4f}"
            )
        if not failures:
            screen.print("[green]OK[/green] masks intact, every pruned weight is zero")
    click.get_current_context().exit(1 if failures else 0)


def _check(given: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return what fails, in words, and the counts of what was read."""
    import fastsal
    from fastsal.cli.runfolder import masks_file, recorded_digests, weights_file
    from fastsal.models.loading import load_model
    from fastsal.models.weights import read_weights
    from fastsal.utils.digests import file_digest

    folder = Path(given["target"]) if given["target"] else None
    is_run = folder is not None and folder.is_dir()
    if is_run and (given["weights"] or given["masks"]):
        raise InvalidArgument("a run's folder brings its own --weights and --masks")
    if not is_run and not (given["weights"] and given["masks"]):
        what = f"{folder} is no folder" if folder else "no folder given"
        raise InvalidArgument(f"{what}; takes the folder of a run, or --weights and --masks")
    weights_path = weights_file(folder if is_run and folder else Path(given["weights"]))
    masks_path = masks_file(folder if is_run and folder else given["masks"])
    if not masks_path.is_file():
        raise InvalidArgument(f"masks: there is no file {masks_path}")
    failures = []
    try:
        if is_run and folder:
            for name, digest in recorded_digests(folder).items():
                if not (folder / name).is_file():
                    failures.append(f"{name} is gone")
                elif file_digest(folder / name) != digest:
                    failures.append(f"{name} is not the file that the report was written with")
        masks = fastsal.Masks.load(masks_path)
        if is_run or not given["target"]:
            state = read_weights(weights_path)
        else:
            model = load_model(
                given["target"],
                weights=weights_path,
                num_classes=given["num_classes"],
                in_chans=given["in_chans"],
            )
            state = dict(model.state_dict())
    except (FileFormatError, MaskError) as error:
        return [*failures, " ".join(str(error).split())], {}
    return [*failures, *_broken(masks, state)], {
        "parameters": len(masks),
        "weights": sum(mask.numel() for mask in masks.values()),
        "pruned": sum(int((~mask).sum()) for mask in masks.values()),
        "sparsity": masks.sparsity,
    }


def _broken(masks: Masks, state: dict[str, Tensor]) -> list[str]:
    """List the masks that `state` breaks."""
    failures = []
    for name, mask in masks.items():
        if name not in state:
            failures.append(f"{name}: the masks have it, the weights do not")
        elif state[name].shape != mask.shape:
            failures.append(f"{name}: mask {list(mask.shape)}, weights {list(state[name].shape)}")
        else:
            alive = int((state[name][~mask] != 0).sum())
            if alive:
                failures.append(f"{name}: {alive} pruned weights are not zero")
    return failures
