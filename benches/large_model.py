"""Time and memory of a large model: `python -m benches.large_model [--model NAME] [--samples N]`.

Statistics are collected in a child process whose peak memory is measured by the parent.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time


def collect(name: str, samples: int, block_size: int) -> dict[str, float]:
    """Collect, score and rank once; return sizes and the seconds of each step."""
    import timm
    import torch

    import fastsal
    from fastsal.fisher.model_sums import ModelSums

    spent = {"core": 0.0}
    add = ModelSums.add

    def timed(self, *args):
        start = time.perf_counter()
        add(self, *args)
        spent["core"] += time.perf_counter() - start

    ModelSums.add = timed
    model = timm.create_model(name, pretrained=False).eval()
    size = model.pretrained_cfg["input_size"]
    generator = torch.Generator().manual_seed(0)
    # One micro-batch at a time: memory of the images is not part of the measurement.
    batches = (
        (torch.randn(8, *size, generator=generator), torch.randint(0, 1000, (8,)))
        for _ in range(-(-samples // 8))
    )
    start = time.perf_counter()
    fisher = fastsal.collect(model, batches, samples=samples, block_size=block_size, micro_batch=8)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    scores = fastsal.score(model, fisher, "block-fisher", 1e-5)
    scoring = time.perf_counter() - start
    start = time.perf_counter()
    masks = fastsal.rank(scores, 0.7)
    return {
        "weights": sum(m.numel() for m in masks.values()),
        "statistics_gib": fisher.nbytes / 2**30,
        "collect_s": seconds,
        "core_s": spent["core"],
        "score_s": scoring,
        "rank_s": time.perf_counter() - start,
    }


def main() -> None:
    """Run the child process and print its measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224", help="name of a timm model")
    parser.add_argument("--samples", type=int, default=256, help="number of random images")
    parser.add_argument("--block-size", type=int, default=64, help="weights per Fisher block")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(collect(given.model, given.samples, given.block_size)))
        return
    command = [sys.executable, "-W", "ignore", "-m", "benches.large_model", *sys.argv[1:]]
    done = subprocess.run([*command, "--child"], check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    result["peak_gib"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    result["core_share"] = result["core_s"] / result["collect_s"]
    print(json.dumps({"model": given.model, "samples": given.samples, **result}, indent=1))


if __name__ == "__main__":
    main()
