"""A self-supervised ViT-S/14 of timm, for images of any size that is a multiple of 14 pixels.

fastsal prune examples/vit_small_dino.py:vit_small --weights vit_small_dino.safetensors --size 98 \
    --data images --curvature features --sparsity 0.5 --out run
"""

from __future__ import annotations

import timm
from torch import nn


def vit_small() -> nn.Module:
    """Build timm's `vit_small_patch14_dinov2` without a classifier and with random weights."""
    model: nn.Module = timm.create_model(
        "vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True
    )
    return model
