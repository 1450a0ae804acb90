"""Check the guarantee of an accuracy limit empirically: `python -m benches.safety [--draws 20]`.

For each draw of calibration images the ResNet-20 of `examples/` is pruned to the highest sparsity
within an accuracy limit on half of `cifar10_test`, and the limit is checked on the other half. The
guarantee holds for images distributed like the held-out ones; training images are not, because the
model was trained on them.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch

import fastsal
from benches.quality.subjects import DATA_HELP, ROOT, accuracy, load_resnet20


def main() -> None:
    """Print one line per draw, and how often the limit was exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help=DATA_HELP
    )
    parser.add_argument("--draws", type=int, default=20, help="number of draws")
    parser.add_argument("--samples", type=int, default=1024, help="number of calibration images")
    parser.add_argument("--limit", type=float, default=0.02, help="largest drop in accuracy")
    parser.add_argument("--confidence", type=float, default=0.9, help="confidence of the limit")
    parser.add_argument("--damping", type=float, help="λ; by default chosen in each draw")
    parser.add_argument(
        "--by-class", action="store_true", help="sort the held-out images by class, as folders are"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    given = parser.parse_args()
    model, train, test = load_resnet20(given.data)
    rows = []
    for draw in range(given.draws):
        generator = torch.Generator().manual_seed(draw)
        some = torch.randperm(len(train[1]), generator=generator)[: given.samples]
        halves = torch.randperm(len(test[1]), generator=generator).chunk(2)
        held, judged = ((test[0][half], test[1][half]) for half in halves)
        if given.by_class:
            order = held[1].argsort(stable=True)
            held = held[0][order], held[1][order]
        images = (train[0][some], train[1][some])
        pruned = copy.deepcopy(model)
        result = fastsal.prune(
            pruned,
            [images],
            max_accuracy_drop=given.limit,
            confidence=given.confidence,
            held_out=[held],
            damping=given.damping or "auto",
        )
        drop = accuracy(model, judged) - accuracy(pruned, judged)
        rows.append(
            {
                "draw": draw,
                "sparsity": result.safety.sparsity,
                "drop": drop,
                "broken": drop > given.limit,
                "trusted_until": result.safety.trusted_until,
                "damping": result.history[0].damping,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    broken = sum(row["broken"] for row in rows)
    print(
        f"exceeded in {broken} of {len(rows)} draws; guaranteed: at most {1 - given.confidence:.0%}"
    )
    if given.out:
        asked = {k: v for k, v in vars(given).items() if k not in ("data", "out")}
        given.out.write_text(json.dumps({"asked": asked, "draws": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
