"""Hooks are removed at the end of a block, however it ends."""

from __future__ import annotations

import signal

import pytest
from torch import nn

from fastsal.models.hooks import hooked


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("place", ["registering", "block", "removing"])
def test_ctrl_c_leaves_no_hook(place):
    model = nn.Sequential(*(nn.Identity() for _ in range(3)))

    class Handle:
        def __init__(self, layer):
            self.inner = layer.register_forward_hook(lambda *_: None)
            stop("registering")

        def remove(self):
            stop("removing")
            self.inner.remove()

    def stop(here):
        if here == place:
            signal.raise_signal(signal.SIGINT)

    def run():
        with hooked(Handle(layer) for layer in model):
            assert all(layer._forward_hooks for layer in model)
            stop("block")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not any(layer._forward_hooks for layer in model)
