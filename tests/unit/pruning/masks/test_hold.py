"""What `Masks.hold` promises beside zeros: nothing left behind, ordinary copies, clear errors."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fastsal import Masks
from fastsal.errors import InvalidArgument, MaskError

pytestmark = pytest.mark.usefixtures("one_thread")


def net(seed=0):
    torch.manual_seed(seed)
    layers = {"conv": nn.Conv2d(3, 4, 3), "flat": nn.Flatten(), "fc": nn.Linear(16, 5)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def some_masks():
    generator = torch.Generator().manual_seed(1)
    owned = dict(net().named_parameters())
    names = ["conv.weight", "fc.weight"]
    return Masks({n: torch.rand(owned[n].shape, generator=generator) < 0.4 for n in names})


def images(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, 4, 4, generator=generator), torch.arange(6) % 5


def loss_of(model, seed=0):
    x, y = images(seed)
    return nn.functional.cross_entropy(model(x), y)


def step(model, optimizer, seed=0):
    optimizer.zero_grad()
    loss_of(model, seed).backward()
    optimizer.step()


def sgd(model, **given):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **given)


def left_on(model):
    """All that hooks could hang on."""
    modules = {
        name: {k: copy.copy(v) for k, v in vars(m).items() if "hook" in k}
        for name, m in model.named_modules()
    }
    parameters = {
        name: (type(p), id(p), p._backward_hooks, p._post_accumulate_grad_hooks, p.requires_grad)
        for name, p in model.named_parameters()
    }
    return modules, parameters, {name: sorted(vars(m)) for name, m in model.named_modules()}


def hooks_of(optimizer):
    return {k: copy.copy(v) for k, v in vars(optimizer).items() if "hook" in k}


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left(fails):
    model, masks = net(), some_masks()
    optimizer = sgd(model)
    before, hooks = left_on(model), hooks_of(optimizer)
    with contextlib.suppress(ZeroDivisionError), masks.hold(model, optimizer):
        assert left_on(model) != before
        assert hooks_of(optimizer) != hooks
        step(model, optimizer)
        if fails:
            model.fc.weight.data.fill_(1.0)
            raise ZeroDivisionError
    masks.verify(model)
    assert left_on(model) == before
    assert hooks_of(optimizer) == hooks
    step(model, optimizer)
    with pytest.raises(MaskError):
        masks.verify(model)


def test_hooks_of_others_stay():
    model, masks = net(), some_masks()
    seen = []
    model.fc.weight.register_hook(lambda g: seen.append("before"))
    with masks.hold(model, sgd(model)):
        model.conv.weight.register_hook(lambda g: seen.append("inside"))
        loss_of(model).backward()
    loss_of(model).backward()
    assert sorted(seen) == ["before", "before", "inside", "inside"]


def test_training_with_hold_is_training_of_the_kept_weights():
    """Equal to multiplying weights by the mask in the forward pass, in float64."""
    masks = some_masks()
    model, slow = net().double(), net().double()
    masks.apply(model)
    optimizer, slow_optimizer = (sgd(m, weight_decay=0.01) for m in (model, slow))
    kept = {name: masks[name].double() for name in masks}
    with masks.hold(model, optimizer):
        for seed in range(4):
            x, y = images(seed)
            x = x.double()
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            slow_optimizer.zero_grad()
            weights = {n: p * kept[n] if n in kept else p for n, p in slow.named_parameters()}
            out = torch.func.functional_call(slow, weights, (x,))
            nn.functional.cross_entropy(out, y).backward()
            slow_optimizer.step()
    for name, p in slow.named_parameters():
        want = p * kept[name] if name in kept else p
        torch.testing.assert_close(dict(model.named_parameters())[name], want)


def test_copies_are_their_own():
    """A copy has the zeros and no hold: it trains as it likes, and dense weights load into it."""
    model, masks = net(), some_masks()
    with masks.hold(model, sgd(model)):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), AveragedModel(model)]
        for each in copies:
            masks.verify(each)
            loss_of(each).backward()
            weight = masks.parameters(each)["fc.weight"]
            assert weight.grad[~masks["fc.weight"]].all()
            getattr(each, "module", each).load_state_dict(net(5).state_dict())
            assert torch.equal(weight, net(5).fc.weight)


def test_a_dense_average_forgets():
    model, masks = net(), some_masks()
    dense = ModelEmaV3(model, decay=0.5)
    optimizer = sgd(model)
    with masks.hold(model, optimizer):
        for _ in range(3):
            dense.update(model)
    pruned = ~masks["fc.weight"]
    torch.testing.assert_close(dense.module.fc.weight[pruned], net().fc.weight[pruned] / 8)


def test_holds_in_one_another():
    model, masks = net(), some_masks()
    generator = torch.Generator().manual_seed(2)
    other = Masks({"conv.weight": torch.rand(4, 3, 3, 3, generator=generator) < 0.5})
    optimizer = sgd(model)
    before = left_on(model)
    with masks.hold(model, optimizer):
        with other.hold(model, optimizer):
            step(model, optimizer)
            masks.verify(model)
            other.verify(model)
        step(model, optimizer)
        masks.verify(model)
        with pytest.raises(MaskError):
            other.verify(model)
    assert left_on(model) == before


def test_two_masks_of_a_shared_weight():
    """It is pruned where either says so."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 48), nn.Linear(48, 48))
    model[2].weight = model[1].weight
    first, second = torch.rand(48, 48) < 0.5, torch.rand(48, 48) < 0.5
    masks = Masks({"1.weight": first, "2.weight": second})
    optimizer = sgd(model)
    with masks.hold(model, optimizer):
        step(model, optimizer)
    assert torch.equal(model[1].weight != 0, first & second)


def test_a_layer_that_is_trained_later():
    model, masks = net(), some_masks()
    model.conv.weight.requires_grad_(False)
    optimizer = sgd(model)
    with masks.hold(model, optimizer):
        step(model, optimizer)
        start = model.conv.weight.clone()
        model.conv.weight.requires_grad_(True)
        step(model, optimizer)
    masks.verify(model)
    assert not torch.equal(model.conv.weight, start)


def test_converted_inside():
    model, masks = net(), some_masks()
    optimizer = sgd(model)
    with masks.hold(model, optimizer):
        model.double()
        x, y = images()
        nn.functional.cross_entropy(model(x.double()), y).backward()
        optimizer.step()
    masks.verify(model)


@pytest.mark.parametrize("wrap", ["compile", "module", "both"])
def test_wrapped_names(wrap):
    model, masks = net(), some_masks()
    wrapped = model if wrap == "module" else torch.compile(model, backend="eager")
    if wrap != "compile":
        wrapped = nn.ModuleDict({"module": wrapped})
    assert not set(masks) & {name for name, _ in wrapped.named_parameters()}
    masks.apply(wrapped)
    masks.verify(wrapped)
    masks.verify(model)
    of_wrapped = Masks({f"module._orig_mod.{name}": mask for name, mask in masks.items()})
    of_wrapped.verify(model)


def test_a_part_that_is_compiled():
    model, masks = nn.Module(), some_masks()
    model.body, model.fc = torch.compile(net(), backend="eager"), nn.Linear(2, 2)
    Masks({f"body.{name}": mask for name, mask in masks.items()}).apply(model)
    masks.verify(model.body)


def test_exact_names_come_first():
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    Masks({"module.weight": torch.zeros(2, 2)}).apply(model)
    assert not model["module"].weight.any()
    assert model["other"].weight.all()


# ---------------------------------------------------------------------------------- errors


def test_writes_that_it_cannot_see_are_told():
    model, masks = net(), some_masks()
    optimizer, other = sgd(model), sgd(model)
    step(model, other)
    holding = masks.hold(model, optimizer)
    holding.__enter__()
    other.step()
    with pytest.raises(MaskError, match=r"are not zero, .*; inside hold, only the given optim"):
        holding.__exit__(None, None, None)
    masks.verify(model)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"none.weight": torch.ones(2)}, "^model has no parameter 'none.weight'"),
        ({"fc.weight": torch.ones(16, 5)}, r"^model has parameter 'fc.weight' of shape \(5, 16\)"),
    ],
)
def test_masks_of_another_model(masks, message):
    model = net()
    before = left_on(model)
    with pytest.raises(MaskError, match=message), Masks(masks).hold(model, sgd(model)):
        pass
    assert left_on(model) == before
    assert torch.equal(model.fc.weight, net().fc.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: sgd(net()), "^optimizer must hold the masked parameters .*holds none"),
        (lambda m: [], "^optimizer must hold the masked parameters .*holds none"),
        (lambda m: torch.amp.GradScaler("cpu"), "^optimizer must be a torch.optim.*got GradScaler"),
        (lambda m: [sgd(m), "sgd"], "^optimizer must be a torch.optim.*got str"),
    ],
)
def test_optimizers_that_are_none(make, message):
    model, masks = net(), some_masks()
    before = left_on(model)
    with pytest.raises(InvalidArgument, match=message), masks.hold(model, make(model)):
        pass
    assert left_on(model) == before
    assert torch.equal(model.fc.weight, net().fc.weight)
