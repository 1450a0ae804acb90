"""The CIFAR ResNet-20 of He et al. (2015), section 4.2, with "option A" shortcuts.

Use it from the command line: ``fastsal prune examples/resnet20.py:resnet20 --weights FILE ...``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3×3 convolutions and a parameter-free shortcut (every second pixel, zero channels)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.missing = channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        """Map `[n, channels_in, h, w]` to `[n, channels, h / stride, w / stride]`."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.missing:
            half = self.missing // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, half, self.missing - half))
        return F.relu(y + shortcut)


class ResNet(nn.Module):
    """Stem, three groups of `blocks` basic blocks of 16, 32 and 64 channels, linear head."""

    def __init__(self, blocks: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._group(16, 16, blocks, 1)
        self.layer2 = self._group(16, 32, blocks, 2)
        self.layer3 = self._group(32, 64, blocks, 2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _group(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = Block(channels_in, channels, stride)
        return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images `[n, 3, 32, 32]` to features `[n, 64]`."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return x.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[n, 3, 32, 32]` to logits `[n, num_classes]`."""
        return self.linear(self.forward_features(x))


def resnet20(num_classes: int = 10) -> nn.Module:
    """Build a ResNet-20 with 268,336 prunable weights, for 32×32 images."""
    return ResNet(3, num_classes)


if __name__ == "__main__":
    print(resnet20()(torch.zeros(1, 3, 32, 32)).shape)
