"""Units of the families of timm: `python -m benches.structured.families --out FILE`.

For the smallest model of each family of up to `--weights` parameters (`families.json`), with random
weights: the groups of units of each structure that are found and proven, and the layers that are
left out. Then a third of the units of all groups is kept, and the outputs of the smaller model are
compared with those of the masked one, in float64. With `--files` the smaller model of each family
is also saved, loaded into a new model, exported to ONNX, and compared with the masked one, in
float32. Families that FILE has are not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastsal
from benches.families import _built
from fastsal.errors import FastsalError
from fastsal.pruning.structured.find import find
from fastsal.pruning.structured.groups import Group, cut, silence
from fastsal.utils.choices import STRUCTURES
from fastsal.utils.machine import versions
from fastsal.utils.plain_text import first_line

RESULTS = Path(__file__).resolve().parents[1] / "results"


def third_of(model: nn.Module, groups: Sequence[Group]) -> tuple[nn.Module, nn.Module, int]:
    """Return copies with a random third of the units, masked and smaller, and how many are kept."""
    draw = torch.Generator().manual_seed(0)
    kept = [
        (g, torch.randperm(g.units, generator=draw)[: max(1, g.units // 3)].sort().values)
        for g in groups
    ]
    masked, smaller = copy.deepcopy(model), copy.deepcopy(model)
    silence(masked, kept)
    cut(smaller, kept)
    return masked, smaller, sum(len(units) for _, units in kept)


@torch.no_grad()
def difference(masked: nn.Module, smaller: nn.Module, images: Tensor) -> float:
    """Return the largest difference of outputs, relative to the largest output."""
    wanted = masked(images)
    return float((smaller(images) - wanted).abs().max() / wanted.abs().max())


def check(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Return counts of groups and of layers left out, and the largest relative difference."""
    found: dict[str, Any] = {}
    worst = 0.0
    for structure in STRUCTURES:
        units = find(model, images, structure)
        found[structure] = {"groups": len(units.groups), "left out": len(units.left_out)}
        if units.groups:
            masked, smaller, _ = third_of(model, units.groups)
            worst = max(worst, difference(masked, smaller, images))
    return {**found, "difference": worst}


def check_files(name: str, folder: Path) -> dict[str, Any]:
    """Return what became of the smaller model of a family in files, in float32.

    Args:
        name: Name of the model.
        folder: Folder for the files.

    Returns:
        The structure, its units before and after, and the largest relative differences of outputs:
        of the model that was loaded, and of the ONNX file as `fastsal.export` measured it.
    """
    model, images = _built(name, torch.float32)
    model.eval()
    for structure in STRUCTURES:
        groups = find(model, images, structure).groups
        if groups:
            break
    else:
        return {"structure": None}
    masked, smaller, kept = third_of(model, groups)
    fastsal.models.save_weights(smaller, folder / "model.safetensors")
    loaded, _ = _built(name, torch.float32)
    loaded.eval()
    fastsal.models.load_weights(loaded, folder / "model.safetensors")
    found = fastsal.export(loaded, folder / "model.onnx", "onnx", images=images)
    return {
        "structure": structure,
        "units": [sum(g.units for g in groups), kept],
        "loaded, difference": difference(masked, loaded, images),
        "onnx, difference": found.difference,
    }


def main() -> None:
    """Run the families that the file does not have, and print a summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "structured-families.json")
    parser.add_argument("--weights", type=int, default=40_000_000, help="largest model")
    parser.add_argument("--files", type=int, default=0, help="families whose files are checked too")
    parser.add_argument("--seconds", type=float, help="time after which no family is begun")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    families = json.loads((RESULTS / "families.json").read_text())["families"]
    done = json.loads(given.out.read_text()) if given.out.is_file() else {"families": {}}
    done["versions"], start = versions(), time.monotonic()
    for family, known in families.items():
        if family in done["families"] or known.get("weights", given.weights + 1) > given.weights:
            continue
        if given.seconds is not None and time.monotonic() - start > given.seconds:
            break
        model, images = _built(known["model"], torch.float64)
        model.eval()
        done["families"][family] = {"model": known["model"], **check(model, images)}
        given.out.write_text(json.dumps(done, indent=1) + "\n")
    for family, row in done["families"].items():
        have = sum("files" in other for other in done["families"].values())
        if have >= given.files or "files" in row:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                row["files"] = check_files(row["model"], Path(folder))
            except FastsalError as error:  # torch.onnx cannot convert some models
                row["files error"] = first_line(error)
        print(family, row.get("files", row.get("files error")), flush=True)
        given.out.write_text(json.dumps(done, indent=1) + "\n")
    rows = done["families"].values()
    print(f"{len(rows)} families")
    for structure in STRUCTURES:
        print(f"{structure}: units in {sum(row[structure]['groups'] > 0 for row in rows)}")
    print(f"largest difference: {max(row['difference'] for row in rows):.3g}")
    files = [row["files"] for row in rows if row.get("files", {}).get("structure")]
    for name in ("loaded", "onnx"):
        worst = max((row[f"{name}, difference"] for row in files), default=0.0)
        print(f"{len(files)} families in files, largest difference, {name}: {worst:.3g}")


if __name__ == "__main__":
    main()
