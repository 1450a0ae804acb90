"""Models that are sharded by FSDP2: whole in the block, as they were after it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastsal
from fastsal.distributed.whole_weights import whole_weights


@pytest.fixture(scope="module", autouse=True)
def group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def sharded(**how):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = net(), init_device_mesh("cpu", (1,))
    fully_shard(model[0], mesh=mesh, **how)
    return fully_shard(model, mesh=mesh)


def state_of(model):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def groups_of(model):
    """What FSDP does after a forward and a backward pass, for each of its modules."""
    found = []
    for module in (model, model[0]):
        state = module._get_fsdp_state()
        each = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        found.append(
            [(g.post_forward_mesh_info, g.reshard_after_backward, g.is_unsharded) for g in each]
            + [state._auto_reshard_after_forward]
        )
    return found


IMAGES = [(torch.randn(12, 6, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 4)]


@pytest.mark.parametrize("reshard", [True, False, None])
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("ran", [False, True])
def test_settings_of_fsdp_are_those_of_before(reshard, backward, ran):
    model = sharded(reshard_after_forward=reshard)
    model.set_reshard_after_backward(backward)
    if ran:
        with torch.no_grad():
            model(IMAGES[0][0])
    before = groups_of(model)
    with whole_weights(model) as inner:
        fastsal.collect(inner, IMAGES)
    assert groups_of(model) == before


@pytest.mark.parametrize("ran", [False, True])
def test_changes_reach_the_shards(ran):
    """Also of weights that a forward pass left gathered, as it does those of the outermost."""
    model, plain = sharded(), net()
    if ran:
        with torch.no_grad():
            model(IMAGES[0][0])
    with whole_weights(model) as inner, torch.no_grad():
        for p, same in zip(inner.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p, same)
            p.mul_(2)
            same.mul_(2)
    for name, value in state_of(model).items():
        assert torch.equal(value, plain.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(model(IMAGES[0][0]), plain(IMAGES[0][0]))


def test_weights_of_mixed_precision_are_not_rounded():
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model, plain = sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)), net()
    with whole_weights(model):
        pass
    for name, value in state_of(model).items():
        assert torch.equal(value, plain.state_dict()[name]), name


def test_hooks_run_in_their_order():
    """Those of PyTorch, which are removed in the block, and those of others around them."""
    model = sharded()
    for module in (model, model[0]):
        module.register_forward_pre_hook(lambda *_: None)
        module.register_forward_pre_hook(lambda *_: None, prepend=True)
    before = [list(m._forward_pre_hooks.items()) for m in model.modules()]
    with whole_weights(model) as inner:
        assert len(inner._forward_pre_hooks) == 2
    assert [list(m._forward_pre_hooks.items()) for m in model.modules()] == before
