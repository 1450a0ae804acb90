"""Models that are written in ways of their own: cut exactly, or listed and left as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, relu, silu
from torch.utils.checkpoint import checkpoint

import fastsal
from fastsal.errors import DataError, InvalidArgument
from fastsal.models.widths import widths_of
from fastsal.pruning.structured.find import find
from fastsal.pruning.structured.graph import Graph
from fastsal.pruning.structured.groups import cut, silence

pytestmark = pytest.mark.usefixtures("one_thread")


class Convolutions(nn.Module):
    """A residual block of given layers, between a stem and a classifier."""

    def __init__(self, *layers):
        super().__init__()
        self.stem, self.body, self.fc = nn.Conv2d(3, 8, 3), nn.Sequential(*layers), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.fc((x + self.body(x)).mean(dim=(2, 3)))


class Gated(nn.Module):
    """A gated MLP; the outputs follow from the residual stream and the hidden units."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Linear(12, 8), nn.Linear(8, 3)
        self.gate, self.up, self.down = nn.Linear(8, 20), nn.Linear(8, 20), nn.Linear(20, 8)

    def forward(self, x):
        x = self.stem(x.flatten(2)[..., :12].mean(dim=1))
        h = silu(self.gate(x)) * self.up(x)
        return self.outputs(x + self.down(h), h)

    def outputs(self, x, h):
        return self.fc(x)


@pytest.fixture
def x():
    return torch.randn(20, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def assert_cut_equals_masked(model, x, structure, expected):
    """Check the groups, and a model without two thirds of their units."""
    units = find(model, x, structure)
    assert [group.name for group in units.groups] == expected, units.left_out
    kept = [(g, torch.arange(g.units)[2::3]) for g in units.groups]
    masked, smaller = copy.deepcopy(model).double().eval(), copy.deepcopy(model).double().eval()
    silence(masked, kept)
    cut(smaller, kept)
    with torch.no_grad():
        torch.testing.assert_close(smaller(x.double()), masked(x.double()), rtol=1e-9, atol=1e-9)


def pruned(model, x, structure, **how):
    how = {"multiple": 1, "reconstruct": False, **how}
    return fastsal.prune_structure(model, [x], 0.5, structure=structure, **how)


def test_activations_in_place_after_the_first_consumer(x):
    """As in VGG without batch normalization."""
    found = []
    for in_place in (True, False):
        torch.manual_seed(1)
        layers = [nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(in_place), nn.Conv2d(12, 10, 1)]
        layers += [nn.ReLU(in_place), nn.Conv2d(10, 8, 3, padding=1), nn.ReLU(in_place)]
        model = Convolutions(*layers)
        found.append((pruned(model, x, "channels"), model))
    (one, a), (other, b) = found
    assert one.widths == other.widths
    assert set(one.widths) == {"body.0", "body.2"}
    for name, costs in one.costs.items():
        torch.testing.assert_close(costs, other.costs[name])
    torch.testing.assert_close(a(x), b(x))


def test_layers_that_are_called_by_keyword(x):
    class Keywords(Gated):
        def forward(self, x):
            x = self.stem(input=x.flatten(2)[..., :12].mean(dim=1))
            h = silu(self.gate(input=x)) * self.up(input=x)
            return self.fc(input=x + self.down(input=h))

    torch.manual_seed(1)
    model = Keywords()
    torch.manual_seed(1)
    plain = Gated()
    assert_cut_equals_masked(model, x, "mlp", ["gate"])
    assert pruned(model, x, "mlp").widths == pruned(plain, x, "mlp").widths == {"gate": (20, 10)}
    torch.testing.assert_close(model(x), plain(x))


def test_weights_with_the_channels_last(x):
    layers = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3)
    plain = Convolutions(*layers[:3], nn.Conv2d(12, 8, 3, padding=1))
    model = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    assert_cut_equals_masked(model, x, "channels", ["body.0"])
    assert pruned(model, x, "channels").widths == pruned(plain, x, "channels").widths
    torch.testing.assert_close(model(x), plain(x))


class NormOfUnits(Gated):
    def outputs(self, x, h):
        return {"logits": self.fc(x), "norm": h.detach().norm(dim=1)}


class Units(Gated):
    def outputs(self, x, h):
        return self.fc(x), h.detach()


class CountOfUnits(Gated):
    def outputs(self, x, h):
        return self.fc(x), [(h > 0).sum(dim=1)]


class NormOfWeights(Gated):
    def outputs(self, x, h):
        return {"logits": self.fc(x), "decay": self.gate.weight.square().sum()}


@pytest.mark.parametrize("kind", [NormOfUnits, Units, CountOfUnits, NormOfWeights])
def test_every_output_is_proven(x, kind):
    model = kind()
    before = copy.deepcopy(model.state_dict())
    assert "an output of the model" in find(model, x, "mlp").left_out["gate"]
    with pytest.raises(InvalidArgument, match=r"gate: without them an output of the model"):
        pruned(model, x, "mlp")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_infinite_outputs_are_compared(x):
    class Mask(Gated):
        def outputs(self, x, h):
            return {"logits": self.fc(x) + torch.tensor([0, -torch.inf, 0]), "none": x[:, :0]}

    assert_cut_equals_masked(Mask(), x, "mlp", ["gate"])


@pytest.mark.parametrize("unit", range(4))
def test_what_depends_on_one_unit_is_found(x, unit):
    """A half of the units may have the one that decides."""

    class Largest(Gated):
        def outputs(self, x, h):
            return self.fc(x), h.detach().amax(dim=1) > 50

    model = Largest()
    with torch.no_grad():
        model.gate.bias[unit] = model.up.bias[unit] = 10
    assert "an output of the model" in find(model, x, "mlp").left_out["gate"]


def test_a_normalization_over_neighboring_channels(x):
    """Its effect on small activations is below the tolerance of the proof."""
    model = Convolutions(
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.LocalResponseNorm(5), nn.Conv2d(12, 8, 1)
    )
    assert find(model, x, "channels").left_out["body.0"] == "a pooling is over its units"


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_without_gradients_are_listed(x, reentrant):
    class Body(Convolutions):
        def forward(self, x):
            x = self.stem(x)
            if reentrant:
                x = x + checkpoint(self.body, x, use_reentrant=True)
            else:
                with torch.no_grad():
                    x = x + self.body(x)
            return self.fc(x.mean(dim=(2, 3)))

    model = Body(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 1))
    units = find(model, x, "channels")
    assert not units.groups
    assert "no gradients" in units.left_out["body.0"]
    assert "no gradients" in units.left_out["body.2"]


def test_a_batch_normalization_of_two_layers_takes_no_mean(x):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)
            self.conv1, self.conv2 = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 3, 1, 1, bias=False)
            self.conv3, self.conv4 = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 3, 1, 1, bias=False)
            self.bn, self.own = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

        def forward(self, x):
            x = self.stem(x)
            x = x + self.bn(self.conv2(relu(self.conv1(x) + 1)))
            x = x + self.bn(self.conv4(relu(self.conv3(x) + 1)))
            return self.fc(self.own(x).mean(dim=(2, 3)))

    model = Shared().eval()
    graph = Graph(model, x)
    found = {call.name: graph.normalization_after(call, model) for call in graph.calls}
    assert found["conv2"] is found["conv4"] is None
    mean = model.bn.running_mean.clone()
    pruned(model, x, "channels")
    assert torch.equal(model.bn.running_mean, mean)


def test_convolutions_of_one_axis(x):
    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.fc = nn.Conv1d(3, 8, 3), nn.Linear(8, 3)
            self.conv1, self.conv2 = nn.Conv1d(8, 12, 3), nn.Conv1d(12, 8, 3, 2, 3, 2, bias=False)
            self.bn = nn.BatchNorm1d(8)

        def forward(self, x):
            x = self.stem(x.flatten(2))
            return self.fc(self.bn(self.conv2(relu(self.conv1(x)))).mean(dim=2))

    model = Line().eval()
    assert_cut_equals_masked(model, x, "channels", ["stem", "conv1"])
    dense, error = copy.deepcopy(model), []
    for compensate in (True, False):
        model = copy.deepcopy(dense)
        pruned(model, x, "channels", compensate=compensate)
        error.append((model(x) - dense(x)).square().mean().item())
    assert error[0] < 0.5 * error[1]


def test_a_number_of_heads_of_the_class(x):
    class Attention(nn.Module):
        num_heads = 4

        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x):
            shape = len(x), x.shape[1], 3, self.num_heads, -1
            q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(y.transpose(1, 2).flatten(2))

    class Net(Gated):
        def __init__(self):
            super().__init__()
            self.attention = Attention()

        def outputs(self, x, h):
            return self.fc((x[:, None] * h[:, :6, None] + self.attention(x[:, None])).sum(dim=1))

    model = Net()
    before = model(x)
    assert_cut_equals_masked(model, x, "heads", ["attention"])
    assert "num_heads" not in vars(model.attention)
    assert torch.equal(model(x), before)
    pruned(model, x, "heads")
    assert model.attention.num_heads == 2
    assert Attention.num_heads == 4


def test_weights_that_are_used_by_functions(x):
    class Tied(Gated):
        def outputs(self, x, h):
            return self.fc(x + linear(relu(linear(x, self.up.weight)), self.up.weight.t()))

    units = find(Tied(), x, "mlp")
    assert not units.groups
    assert "gate" in units.left_out


def test_arguments(x):
    model = Gated()
    for layers in (3, [3]):
        with pytest.raises(InvalidArgument, match=r"layers must be names or patterns .* got \[?3"):
            pruned(model, x, "mlp", layers=layers)
    with pytest.raises(InvalidArgument, match="model must have parameters, got ReLU without any"):
        pruned(nn.ReLU(), x, "mlp")
    with pytest.raises(DataError, match=r"images must be normalized .* got torch.uint8"):
        pruned(model, x.to(torch.uint8), "mlp")
    with pytest.raises(InvalidArgument, match=r"gate: the output of 'down' is NaN on these images"):
        pruned(model, x * torch.nan, "mlp")
    with pytest.raises(InvalidArgument, match="at most 0 .* kept by floor or multiple"):
        pruned(model, x, "mlp", multiple=64)
    assert pruned(model, x, "mlp", layers={"gate"}).widths == {"gate": (20, 10)}
    assert widths_of(model)


class Slopes(nn.Module):
    """Attention with a factor of each head, which may be in no file."""

    def __init__(self, persistent):
        super().__init__()
        self.num_heads, self.qkv, self.proj = 4, nn.Linear(8, 24), nn.Linear(8, 8)
        self.register_buffer("slopes", torch.rand(4, 1, 1), persistent=persistent)

    def forward(self, x):
        shape = len(x), x.shape[1], 3, self.num_heads, -1
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-1, -2) * self.slopes).softmax(dim=-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class Scales(nn.Module):
    """Scales of units, some of which may be in no file."""

    def __init__(self, persistent):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(20) + 0.5)
        self.register_buffer("own", torch.rand(20) + 0.5, persistent=persistent)

    def forward(self, x):
        return x * self.weight * self.own


class OwnParts(Gated):
    def __init__(self, persistent):
        super().__init__()
        self.attention, self.scales = Slopes(persistent), Scales(persistent)

    def forward(self, x):
        x = self.stem(x.flatten(2)[..., :12])
        x = x + self.attention(x)
        h = silu(self.gate(x)) * self.scales(self.up(x))
        return self.fc((x + self.down(h)).mean(dim=1))


@pytest.mark.parametrize(
    ("structure", "name", "buffer"),
    [("heads", "attention", "attention.slopes"), ("mlp", "gate", "scales.own")],
)
def test_buffers_that_files_do_not_have(x, structure, name, buffer, tmp_path):
    """The model that a file is loaded into has them at their original size."""
    torch.manual_seed(1)
    left_out = find(OwnParts(persistent=False), x, structure).left_out
    assert (
        left_out[name] == f"{buffer!r} has its units, and is a buffer that is not stored in files"
    )
    model = OwnParts(persistent=True)
    assert list(pruned(model, x, structure).widths) == [name]
    fastsal.models.save_weights(model, tmp_path / "model.safetensors")
    again = OwnParts(persistent=True)
    fastsal.models.load_weights(again, tmp_path / "model.safetensors")
    torch.testing.assert_close(again(x), model(x))


def test_one_number_for_all_units(x):
    """As of an activation that is learned, `nn.PReLU()` or the one of MetaFormer."""
    model = Convolutions(nn.Conv2d(8, 12, 3, padding=1), nn.PReLU(), nn.Conv2d(12, 8, 1))
    assert_cut_equals_masked(model, x, "channels", ["body.0"])
    pruned(model, x, "channels")
    assert model.body[1].weight.shape == (1,)
