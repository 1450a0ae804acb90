"""The obvious per-sample gradient: one sample, one `torch.autograd.grad`, float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Fn(nn.Module):
    """A function of modules."""

    def __init__(self, function, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def cross_entropy(outputs, labels):
    return F.cross_entropy(outputs, labels, reduction="none")


def loop(model, images, labels, names, loss=cross_entropy):
    parameters = dict(model.named_parameters())
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    rows = {name: [] for name in names}
    for i in range(images.shape[0]):
        value = loss(model(images[i : i + 1]), labels[i : i + 1]).sum()
        gradients = torch.autograd.grad(
            value, [parameters[name] for name in names], allow_unused=True
        )
        for name, gradient in zip(names, gradients, strict=True):
            rows[name].append(torch.zeros_like(parameters[name]) if gradient is None else gradient)
    for module, flag in training:
        module.training = flag
    return {name: torch.stack(values) for name, values in rows.items()}


def randomize(model, seed=0):
    """No parameter or statistic at a special value such as 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
                value.add_((0.2 * noise).to(value.dtype))
    return model
