"""A network that has more weights than its activations take, for tests of memory."""

from __future__ import annotations

import torch
from torch import nn


def net(device="cpu"):
    with torch.device(device):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 8 * 8, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        ).eval()
