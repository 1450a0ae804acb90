"""A small timm ViT for MNIST-sized digits, and a script that trains it on a CPU in minutes.

    python examples/small_vit.py --data mnist_train.npz --test mnist_test.npz
    fastsal prune examples/small_vit.py:small_vit --weights vit.safetensors \
        --data mnist_train.npz --sparsity 0.9 --out run

Without ``--data`` it trains on the 1,797 digits of scikit-learn, enlarged to 28 pixels.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

MEAN, STD = 0.1307, 0.3081


def small_vit() -> nn.Module:
    """Build a ViT: six blocks of width 64, four heads, patches of 4 pixels, 302,000 weights."""
    model = VisionTransformer(
        img_size=28,
        patch_size=4,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=6,
        num_heads=4,
    )
    # fastsal's command line reads the input size and normalization here, as for any timm model.
    model.pretrained_cfg = {"input_size": (1, 28, 28), "mean": (MEAN,), "std": (STD,)}
    return model


def normalise(x: np.ndarray) -> Tensor:
    """Convert images uint8 `[n, 28, 28]` to normalized float32 `[n, 1, 28, 28]`."""
    return (torch.from_numpy(x).float().unsqueeze(1) / 255 - MEAN) / STD


def load(path: Path) -> tuple[Tensor, Tensor]:
    """Read images and labels from an `.npz` with `x` uint8 `[n, 28, 28]` and `y` `[n]`."""
    with np.load(path, allow_pickle=False) as file:
        return normalise(file["x"]), torch.from_numpy(file["y"]).long()


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return scikit-learn's digits, enlarged to 28 pixels: 1,347 for training, 450 for test."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = torch.from_numpy(x).float().reshape(-1, 1, 8, 8) * (255 / 16)
    large = F.interpolate(images, 28, mode="bilinear").round().clamp(0, 255).byte().squeeze(1)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = normalise(large.numpy()[order]), torch.from_numpy(y[order]).long()
    return (x[450:], y[450:]), (x[:450], y[:450])


def shift(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `most` pixels in both directions, repeating its border."""
    n, _, h, w = x.shape
    padded = F.pad(x, (most,) * 4, mode="replicate")
    dy, dx = torch.randint(0, 2 * most + 1, (2, n, 1), generator=generator)
    rows = (dy + torch.arange(h))[:, None, :, None]
    columns = (dx + torch.arange(w))[:, None, None, :]
    return padded[torch.arange(n)[:, None, None, None], 0, rows, columns]


def train(images: Tensor, labels: Tensor, epochs: int, seed: int = 0) -> nn.Module:
    """Train with AdamW, a one-cycle learning rate, shifted images and label smoothing."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = small_vit().train()
    steps = epochs * -(-len(images) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        for part in torch.randperm(len(images), generator=generator).split(64):
            logits = model(shift(images[part], 2, generator))
            loss = F.cross_entropy(logits, labels[part], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(part)
        spent = time.perf_counter() - start
        print(f"epoch {epoch + 1}: loss {total / len(images):.4f}, {spent:.0f} s", flush=True)
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of images whose largest logit is that of the label."""
    with torch.no_grad():
        found = torch.cat([model(x).argmax(1) for x in images.split(500)])
    return float((found == labels).float().mean())


def main() -> None:
    """Train the model, test it, and save its weights."""
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help=".npz to train on")
    parser.add_argument("--test", type=Path, help=".npz to test on")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("vit.safetensors"))
    given = parser.parse_args()
    if given.data is None:
        training, test = digits()
    else:
        training, test = load(given.data), None if given.test is None else load(given.test)
    model = train(*training, given.epochs, given.seed)
    if test is not None:
        print(f"accuracy {accuracy(model, *test):.4f} on {len(test[1])} test images")
    save_file(model.state_dict(), given.out)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
