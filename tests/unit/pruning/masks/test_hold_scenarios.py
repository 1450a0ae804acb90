"""A scenario for every way to lose a zero; held it stays, and without hold it is lost."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle

import pytest
import timm.optim
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fastsal import Masks
from fastsal.errors import MaskError

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """A convolution, a weight that is used twice, and a head."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.conv(x)).flatten(1)
        return self.fc(torch.relu(self.b(torch.relu(self.a(x)))))


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


class Guard:
    """Masks of `net()`, which hold or only claim to."""

    def __init__(self, holds):
        generator = torch.Generator().manual_seed(1)
        owned = dict(net().named_parameters(remove_duplicate=False))
        names = ["conv.weight", "b.weight", "fc.weight"]
        self.masks = Masks(
            {n: torch.rand(owned[n].shape, generator=generator) < 0.4 for n in names}
        )
        self.holds = holds

    def hold(self, model, optimizer):
        return self.masks.hold(model, optimizer) if self.holds else contextlib.nullcontext()

    def check(self, model, optimizer=None, *, gradients=False):
        """What hold promises at any moment of the block."""
        if not self.holds:
            return
        self.masks.verify(model)
        for name, p in self.masks.parameters(model).items():
            pruned = ~self.masks[name]
            if gradients:
                assert not p.grad[pruned].any()
                assert p.grad[~pruned].any()
            for value in optimizer.state[p].values() if optimizer else ():
                assert not (torch.is_tensor(value) and value.ndim and value[pruned].any())


def loss_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, 4, 4, generator=generator)
    return nn.functional.cross_entropy(model(x), torch.arange(6) % 5)


def train(model, optimizer, steps=1, after=lambda: None):
    for seed in range(steps):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()
        after()


def sgd(model, **given):
    given = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, **given}
    return torch.optim.SGD(model.parameters(), **given)


def adamw(model, **given):
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, **given)


# Each is given a masked model and a guard; returns copies that must have the zeros as well.
SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


OPTIMIZERS = {
    "sgd": sgd,
    "sgd_without_momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.1),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.1, weight_decay=0.1, amsgrad=True),
    "adamw": adamw,
    "adamw_foreach": lambda m: adamw(m, foreach=True),
    "adamw_fused": lambda m: adamw(m, fused=True),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.1, momentum=0.9, centered=True),
    "lookahead": lambda m: timm.optim.create_optimizer_v2(m, "lookahead_adamw", lr=0.1),
    "lion": lambda m: timm.optim.create_optimizer_v2(m, "lion", lr=0.1, weight_decay=0.1),
}


def add_optimizer(name, make):
    def fresh(model, guard):
        optimizer = make(model)
        with guard.hold(model, optimizer):
            train(model, optimizer, 7)  # the slow weights of Lookahead move with the sixth step
            guard.check(model, optimizer, gradients=True)

    def with_old_state(model, guard):
        model.load_state_dict(net().state_dict())
        optimizer = make(model)
        train(model, optimizer, 5)
        guard.masks.apply(model)
        with guard.hold(model, optimizer):
            guard.check(model, optimizer)
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            guard.check(model, optimizer)
            train(model, optimizer)

    SCENARIOS[name] = fresh
    SCENARIOS[f"{name}_with_old_state"] = with_old_state


for _name, _make in OPTIMIZERS.items():
    add_optimizer(_name, _make)


@scenario
def an_optimizer_that_mixes_weights(model, guard):
    class Mixing(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for p in self.param_groups[0]["params"]:
                p.data += p.data.mean()

    optimizer = Mixing(model.parameters(), lr=0.1)
    with guard.hold(model, optimizer):
        train(model, optimizer, 2, lambda: guard.check(model))


@scenario
def a_step_with_a_closure(model, guard):
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with guard.hold(model, optimizer):
        optimizer.step(closure)
        guard.check(model, gradients=True)


@scenario
def a_schedule_that_wraps_the_step(model, guard):
    optimizer = sgd(model)
    with guard.hold(model, optimizer):
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
        train(model, optimizer, 2, schedule.step)


@scenario
def several_optimizers(model, guard):
    head = sgd(model.fc)
    rest = torch.optim.AdamW([*model.conv.parameters(), *model.a.parameters()], lr=0.1)
    with guard.hold(model, [head, rest]):
        train(model, head, 2, rest.step)


@scenario
def an_optimizer_that_begins_inside(model, guard):
    with guard.hold(model, None):
        optimizer = adamw(model)
        train(model, optimizer, 3)
        guard.check(model, optimizer, gradients=True)


@scenario
def gradient_accumulation(model, guard):
    optimizer = sgd(model)
    loss_of(model, 9).backward()  # before the block
    with guard.hold(model, optimizer):
        for seed in range(4):
            loss_of(model, seed).backward()
        guard.check(model, gradients=True)
        optimizer.step()


@scenario
def gradients_from_before(model, guard):
    optimizer = sgd(model)
    loss_of(model).backward()
    with guard.hold(model, optimizer):
        guard.check(model, gradients=True)
        optimizer.step()


@scenario
def gradients_by_hand(model, guard):
    optimizer = sgd(model)
    with guard.hold(model, optimizer):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        guard.check(model, optimizer)


@scenario
def clipping(model, guard):
    """The norm is that of the kept weights' gradients."""
    optimizer = sgd(model)
    with guard.hold(model, optimizer):
        loss_of(model).backward()
        masked = {p: guard.masks[n] for n, p in guard.masks.parameters(model).items()}
        kept = [p.grad[masked[p]] if p in masked else p.grad for p in model.parameters()]
        want = torch.cat([g.flatten() for g in kept]).norm()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        assert torch.isclose(norm, want) == guard.holds
        optimizer.step()


@scenario
def mixed_precision(model, guard):
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    with guard.hold(model, optimizer):
        for seed in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model, seed)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            guard.check(model, optimizer, gradients=True)
            scaler.step(optimizer)
            scaler.update()


@scenario
def an_overflow_in_pruned_gradients(model, guard):
    """Zero times infinity is not zero, and it is no reason for the scaler to skip the step."""
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=2.0)
    kept = guard.masks["fc.weight"]
    with guard.hold(model, optimizer):
        infinite = torch.where(kept, 0.0, math.inf)
        scaler.scale(loss_of(model) + (model.fc.weight * infinite).nansum()).backward()
        guard.check(model, gradients=True)
        scaler.step(optimizer)
        scaler.update()
        if guard.holds:
            assert scaler.get_scale() == 2.0
        else:
            train(model, optimizer)  # the scaler skipped a step


@scenario
def nan_in_a_pruned_weight(model, guard):
    optimizer = sgd(model)
    with guard.hold(model, optimizer):
        loss_of(model).backward()
        with torch.no_grad():
            model.fc.weight[~guard.masks["fc.weight"]] = math.nan
        optimizer.step()
        guard.check(model, optimizer, gradients=True)


@scenario
def averages(model, guard):
    optimizer = sgd(model)
    with guard.hold(model, optimizer):
        of_timm, of_torch = ModelEmaV3(model, decay=0.5), AveragedModel(model)
        for _ in range(3):
            train(model, optimizer)
            of_timm.update(model)
            of_torch.update_parameters(model)
    return [of_timm, of_timm.module, of_torch]


@scenario
def copies(model, guard):
    optimizer = sgd(model)
    with guard.hold(model, optimizer):
        train(model, optimizer)
        return [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]


@scenario
def a_state_dict(model, guard):
    """It has its ordinary names, and loads anywhere."""
    optimizer, file, other = sgd(model), io.BytesIO(), net(1)
    with guard.hold(model, optimizer):
        train(model, optimizer)
        state = model.state_dict()
        torch.save(state, file)
    assert [(k, type(v)) for k, v in state.items()] == [
        (k, torch.Tensor) for k in net().state_dict()
    ]
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    return [other]


def add_loading(name, load):
    def run(model, guard):
        optimizer = sgd(model)
        with guard.hold(model, optimizer):
            load(model, net(5).state_dict())
            guard.check(model)
            if name != "load_state_dict_that_assigns":  # the optimiser has the old parameters then
                train(model, optimizer)

    SCENARIOS[name] = run


def part(state, prefix):
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


add_loading("load_state_dict", lambda m, dense: m.load_state_dict(dense))
add_loading("load_state_dict_that_assigns", lambda m, dense: m.load_state_dict(dense, assign=True))
add_loading("load_part", lambda m, dense: m.fc.load_state_dict(part(dense, "fc.")))
add_loading("load_by_another_name", lambda m, dense: m.a.load_state_dict(part(dense, "a.")))
add_loading(
    "load_from_above",
    lambda m, dense: nn.ModuleList([m]).load_state_dict({f"0.{k}": v for k, v in dense.items()}),
)


@scenario
def load_state_dict_of_the_optimizer(model, guard):
    dense = net()
    other = sgd(dense)
    train(dense, other)
    optimizer = sgd(model)
    with guard.hold(model, optimizer):
        optimizer.load_state_dict(other.state_dict())
        guard.check(model, optimizer)
        train(model, optimizer)


@scenario
def compiled(model, guard):
    wrapped = torch.compile(model, backend="aot_eager")
    optimizer = sgd(wrapped)
    with guard.hold(wrapped, optimizer):
        train(wrapped, optimizer, 2)
        guard.check(model, optimizer, gradients=True)
    return [wrapped]


@scenario
def compiled_and_run_before(model, guard):
    wrapped = torch.compile(model, backend="aot_eager")
    loss_of(wrapped).backward()
    optimizer = sgd(model)
    with guard.hold(model, optimizer):
        train(wrapped, optimizer)
        guard.check(model, optimizer, gradients=True)
    return [wrapped]


@pytest.fixture
def one_process(tmp_path):
    """A group of one process over gloo."""
    meeting = f"file://{tmp_path / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, world_size=1, rank=0)
    yield
    torch.distributed.destroy_process_group()


@scenario
def distributed(model, guard):
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = sgd(wrapped)
    with guard.hold(wrapped, optimizer):
        train(wrapped, optimizer, 2)
        guard.check(wrapped, optimizer, gradients=True)
        with wrapped.no_sync():
            loss_of(wrapped).backward()
        guard.check(wrapped, optimizer, gradients=True)
        wrapped.load_state_dict({f"module.{k}": v for k, v in net(5).state_dict().items()})
        guard.check(wrapped)
        train(wrapped, optimizer)
    return [wrapped]


def run(name, request, holds):
    """Return the guard, the model, and all that must have its zeros."""
    if name == "distributed":
        request.getfixturevalue("one_process")
    model, guard = net(), Guard(holds)
    guard.masks.apply(model)
    others = SCENARIOS[name](model, guard)
    return guard, model, [model, *(others or [])]


@pytest.mark.parametrize("name", SCENARIOS)
def test_held(name, request):
    guard, model, everywhere = run(name, request, holds=True)
    for each in everywhere:
        guard.masks.verify(each)
    start = guard.masks.parameters(net())
    for parameter, p in guard.masks.parameters(model).items():
        kept = guard.masks[parameter]
        assert not torch.equal(p[kept], start[parameter][kept])  # it was trained


@pytest.mark.parametrize("name", SCENARIOS)
def test_lost_without_hold(name, request):
    guard, _, everywhere = run(name, request, holds=False)
    for each in everywhere:
        with pytest.raises(MaskError, match="are not zero"):
            guard.masks.verify(each)
