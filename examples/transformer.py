"""A plain GPT-like decoder with random weights, and a script that scores one of 124 million.

    python examples/transformer.py --sequences 8 --length 64

Its functions can be used as MODEL on the command line: `examples/transformer.py:gpt_125m`. A model
that does not fit into memory is built without weights: `with torch.device("meta"): gpt_1b()`.

Axes: n sequences, L tokens, V words, H heads.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Attention and a perceptron, each with a preceding normalization and a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attend(self, x: Tensor) -> Tensor:
        """Apply causal self-attention to `[n, L, width]`."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [n, H, L, width / H]
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[n, L, width]` to `[n, L, width]`."""
        x = x + self.attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """Decoder from tokens `[n, L]` to logits of the next token `[n, L, V]`."""

    def __init__(
        self, words: int, width: int, layers: int, heads: int, context: int, *, tied: bool = True
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(words, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        if tied:
            self.head.weight = self.wte.weight
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `[n, L]` to logits `[n, L, V]`."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.wte(tokens) + self.wpe(positions)
        return self.head(self.norm(self.blocks(x)))


def gpt_125m() -> nn.Module:
    """Build 12 layers of width 768: 124 million weights, 85 million of them in linear layers."""
    return Decoder(words=50_257, width=768, layers=12, heads=12, context=1024)


def gpt_1b() -> nn.Module:
    """Build 18 layers of width 2,048: 1.01 billion weights."""
    return Decoder(words=50_257, width=2048, layers=18, heads=16, context=1024)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return mean cross-entropies `[n]`, from logits `[n, L, V]` and labels `[n, L]`."""
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def main() -> None:
    """Score the linear weights on random tokens and print time and memory."""
    import fastsal

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=64)
    given = parser.parse_args()
    torch.manual_seed(0)
    model = gpt_125m()
    tokens = torch.randint(50_257, (given.sequences, given.length + 1))
    batch = (tokens[:, :-1], tokens[:, 1:])
    start = time.perf_counter()
    # The head is tied to the token table, which is not pruned.
    fisher = fastsal.collect(
        model, [batch], block_size=given.block_size, loss=next_token_loss, parameters="!wte.weight"
    )
    collected = time.perf_counter()
    scores = fastsal.score(model, fisher, "block-fisher", damping=1e-5)
    scored = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB, on Linux
    print(f"{sum(s.numel() for s in scores.values()):,} weights, {fisher.samples} sequences")
    print(f"statistics {collected - start:.1f} s, {fisher.nbytes / 2**30:.2f} GiB")
    print(f"scores {scored - collected:.1f} s; peak memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
