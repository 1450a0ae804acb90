"""Is the promise of the safe threshold kept? `python -m benches.safety [--draws 20]`.

The ResNet-20 of `examples/`: each draw takes other calibration images, prunes to the highest
sparsity that keeps an accuracy limit on half of `cifar10_test`, and is judged by the other half:
the promise is about images like those held out, and the model was trained on the training images.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch

import fastsal
from benches.quality import ROOT, accuracy, load


def main() -> None:
    """Print one line a draw, and how often the limit was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--limit", type=float, default=0.02)
    parser.add_argument("--confidence", type=float, default=0.9)
    parser.add_argument("--damping", type=float, help="λ; chosen in each draw by default")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    model, train, test = load(given.data)
    rows = []
    for draw in range(given.draws):
        generator = torch.Generator().manual_seed(draw)
        some = torch.randperm(len(train[1]), generator=generator)[: given.samples]
        halves = torch.randperm(len(test[1]), generator=generator).chunk(2)
        held, judged = ((test[0][half], test[1][half]) for half in halves)
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
    print(f"broken in {broken} of {len(rows)} draws; promised: at most {1 - given.confidence:.0%}")
    if given.out:
        asked = {k: v for k, v in vars(given).items() if k not in ("data", "out")}
        given.out.write_text(json.dumps({"asked": asked, "draws": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
