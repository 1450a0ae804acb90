"""Fisher blocks aligned with the structure of attention: `python -m benches.vit_blocks`.

A small ViT (`examples/small_vit.py`, trained here unless `--weights` is given) is pruned by greedy
elimination with joint compensation. All arrangements use the same gradients and block size but
group other weights into a block. Attention uses `q` and `k` only in their product, head by head,
and likewise `v` and `proj`, as an MLP does `fc1` and `fc2`. There is no fine-tuning; for each
arrangement λ minimizes the loss on held-out images. The table shows mean and standard deviation of
the accuracy on `mnist_test` over three draws.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastsal
from fastsal.gradients import per_sample_gradients, select_parameters

ROOT = Path(__file__).resolve().parents[1]
SPARSITIES = (0.8, 0.9, 0.95)
DAMPING = (1e-6, 1e-5, 1e-4, 1e-3)
BLOCK = 64
HALF = BLOCK // 2

# Positions of a parameter's weights, `[out, in]`, in the concatenation of all weights.
Places = Mapping[str, Tensor]
# way(places of one transformer block, heads) -> places in a new order, name to `[n]`
Way = Callable[[Places, int], dict[str, Tensor]]


def _parts(block: Places) -> dict[str, Tensor]:
    q, k, v = block["attn.qkv.weight"].chunk(3)
    return {
        "q": q,
        "k": k,
        "v": v,
        "proj": block["attn.proj.weight"],
        "fc1": block["mlp.fc1.weight"],
        "fc2": block["mlp.fc2.weight"],
    }


def _pairs(a: Tensor, b: Tensor) -> Tensor:
    """Alternate half blocks of a row of `a` with half blocks of the same row of `b`."""
    a, b = (x.reshape(len(x), -1, HALF) for x in (a, b))
    return torch.stack([a, b], 2).flatten()


def _tiles(a: Tensor, heads: int) -> Tensor:
    """Form blocks from all rows of a head and a few of their inputs."""
    rows = len(a) // heads
    return a.reshape(heads, rows, -1, BLOCK // rows).transpose(1, 2).flatten()


def _flat(block: Places, heads: int) -> dict[str, Tensor]:
    del heads
    return {name: places.flatten() for name, places in block.items()}


def _with(**ways: Callable[[dict[str, Tensor], int], Tensor]) -> Way:
    """Return the way that rearranges the parts named by the keys, joined by `_`."""

    def way(block: Places, heads: int) -> dict[str, Tensor]:
        parts = _parts(block)
        new = {name: form(parts, heads) for name, form in ways.items()}
        gone = {part for name in ways for part in name.split("_")}
        return new | {name: p.flatten() for name, p in parts.items() if name not in gone}

    return way


WAYS: dict[str, Way] = {
    "flat rows": _flat,
    "rows of q beside the same rows of k": _with(q_k=lambda p, h: _pairs(p["q"], p["k"])),
    "rows of v beside columns of proj": _with(v_proj=lambda p, h: _pairs(p["v"], p["proj"].T)),
    "both": _with(
        q_k=lambda p, h: _pairs(p["q"], p["k"]),
        v_proj=lambda p, h: _pairs(p["v"], p["proj"].T),
    ),
    "all rows of a head, few inputs (q, k, v)": _with(
        q=lambda p, h: _tiles(p["q"], h),
        k=lambda p, h: _tiles(p["k"], h),
        v=lambda p, h: _tiles(p["v"], h),
    ),
    "columns of proj": _with(proj=lambda p, h: p["proj"].T.flatten()),
    "rows of fc1 beside columns of fc2": _with(fc1_fc2=lambda p, h: _pairs(p["fc1"], p["fc2"].T)),
    "columns of fc2": _with(fc2=lambda p, h: p["fc2"].T.flatten()),
}


class Rearranged:
    """The weights of a ViT in the order defined by a way."""

    def __init__(self, model: nn.Module, way: Way, block_size: int = BLOCK) -> None:
        self._shapes = {name: p.shape for name, p in select_parameters(model, None).items()}
        total, places = 0, {}
        for name, shape in self._shapes.items():
            places[name] = torch.arange(total, total + shape.numel()).reshape(shape)
            total += shape.numel()
        self._order = {}
        for i, block in enumerate(model.blocks):
            prefix = f"blocks.{i}."
            inside = {
                n.removeprefix(prefix): places.pop(n) for n in list(places) if n.startswith(prefix)
            }
            for name, order in way(inside, block.attn.num_heads).items():
                self._order[f"block{i}_{name.replace('.', '_')}"] = order
        for name, order in places.items():
            self._order[name.replace(".", "_")] = order.flatten()
        if not torch.equal(
            torch.cat(list(self._order.values())).sort().values, torch.arange(total)
        ):
            raise AssertionError("a way must use every weight once")
        shapes = {name: (len(order),) for name, order in self._order.items()}
        self.fisher = fastsal.BlockFisher(shapes, block_size=block_size)

    def arrange(
        self, tensors: Mapping[str, Tensor], samples: int | None = None
    ) -> dict[str, Tensor]:
        """Return weights, or with `samples` gradients `[n, *shape]`, in the new order."""
        lead = [] if samples is None else [samples]
        flat = torch.cat([tensors[n].detach().reshape(*lead, -1) for n in self._shapes], -1)
        return {name: flat[..., order] for name, order in self._order.items()}

    def restore(self, arranged: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors in the original order, the inverse of `arrange`."""
        first = next(iter(arranged.values()))
        flat = first.new_empty(sum(s.numel() for s in self._shapes.values()))
        for name, order in self._order.items():
            flat[order] = arranged[name].detach()
        parts = flat.split([s.numel() for s in self._shapes.values()])
        return {n: p.reshape(s) for (n, s), p in zip(self._shapes.items(), parts, strict=True)}

    def prune(self, model: nn.Module, sparsity: float, damping: float) -> nn.Module:
        """Return a copy pruned by greedy elimination and joint compensation."""
        weights = nn.ParameterDict(self.arrange(dict(model.named_parameters())))
        scores = fastsal.score(weights, self.fisher, "obs-greedy", damping)
        masks = fastsal.rank(scores, sparsity)
        fastsal.compensate(weights, self.fisher, masks, damping)
        pruned = copy.deepcopy(model)
        pruned.load_state_dict(self.restore(weights), strict=False)
        return pruned


def products(model: nn.Module) -> dict[str, Tensor]:
    """Score by the magnitude of a weight times that of the weights it is multiplied by."""
    scores = fastsal.score(model, None, "magnitude")
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            q, k, v = block.attn.qkv.weight.square().chunk(3)
            proj, fc1, fc2 = (
                w.weight.square() for w in (block.attn.proj, block.mlp.fc1, block.mlp.fc2)
            )
            qkv = [q * k.sum(1, True), k * q.sum(1, True), v * proj.sum(0)[:, None]]
            scores[f"blocks.{i}.attn.qkv.weight"] = torch.cat(qkv)
            scores[f"blocks.{i}.attn.proj.weight"] = proj * v.sum(1)
            scores[f"blocks.{i}.mlp.fc1.weight"] = fc1 * fc2.sum(0)[:, None]
            scores[f"blocks.{i}.mlp.fc2.weight"] = fc2 * fc1.sum(1)
    return scores


def loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the mean cross-entropy."""
    with torch.no_grad():
        return float(F.cross_entropy(model(images), labels))


def main() -> None:
    """Run the benchmark, print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets"
    )
    parser.add_argument("--weights", type=Path, help="weights of examples/small_vit.py")
    parser.add_argument("--samples", type=int, default=1024, help="number of calibration images")
    parser.add_argument("--draws", type=int, default=3, help="number of draws")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    given = parser.parse_args()
    spec = importlib.util.spec_from_file_location("small_vit", ROOT / "examples" / "small_vit.py")
    vit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vit)
    training, test = (vit.load(given.data / f"mnist_{part}.npz") for part in ("train", "test"))
    if given.weights:
        from safetensors.torch import load_file

        model = vit.small_vit().eval()
        model.load_state_dict(load_file(given.weights))
    else:
        model = vit.train(*training, epochs=20)
    dense = vit.accuracy(model, *test)
    table: dict[str, dict[float, list[float]]] = {}

    def note(name: str, sparsity: float, pruned: nn.Module) -> None:
        accuracy = vit.accuracy(pruned, *test)
        table.setdefault(name, {}).setdefault(sparsity, []).append(accuracy)

    for sparsity in SPARSITIES:
        for scope in ("global", "layer"):
            for name, scores in (
                ("magnitude", fastsal.score(model, None, "magnitude")),
                ("magnitude times its partner's", products(model)),
            ):
                pruned = copy.deepcopy(model)
                fastsal.rank(scores, sparsity, scope=scope).apply(pruned)
                note(f"{name}, {scope}, no compensation", sparsity, pruned)
    sizes = [(f"{name}, blocks of {BLOCK}", way, BLOCK) for name, way in WAYS.items()]
    sizes += [(f"flat rows, blocks of {size}", _flat, size) for size in (32, 128, 256)]
    for draw in range(given.draws):
        generator = torch.Generator().manual_seed(draw)
        order = torch.randperm(len(training[1]), generator=generator)
        some, held = order[: given.samples], order[given.samples : given.samples + 512]
        ways = {name: Rearranged(model, way, size) for name, way, size in sizes}
        for part in some.split(64):
            rows = per_sample_gradients(model, training[0][part], training[1][part])
            for way in ways.values():
                way.fisher.update(way.arrange(rows, len(part)))
        for name, way in ways.items():
            for sparsity in SPARSITIES:
                tries = [way.prune(model, sparsity, damping) for damping in DAMPING]
                losses = [loss(m, training[0][held], training[1][held]) for m in tries]
                note(name, sparsity, tries[losses.index(min(losses))])
            means = {s: f"{v[-1]:.4f}" for s, v in table[name].items()}
            print(f"draw {draw}, {name}: {means}", flush=True)
    print(f"\n| accuracy, dense {dense:.3f} | " + " | ".join(map(str, SPARSITIES)) + " |")
    print("|---" * (1 + len(SPARSITIES)) + "|")
    for name, row in table.items():
        cells = [
            f"{statistics.mean(v):.3f}" + (f" ± {statistics.stdev(v):.3f}" if len(v) > 1 else "")
            for v in row.values()
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    if given.out:
        asked = {"samples": given.samples, "draws": given.draws, "dense": dense}
        given.out.write_text(json.dumps({"asked": asked, "accuracy": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
