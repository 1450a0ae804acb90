from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fastsal
from fastsal.models.classifier import class_count, find_head
from fastsal.models.features import features
from fastsal.models.inputs import input_spec
from fastsal.models.weights import load_weights, read_weights, save_weights
from fastsal.models.wrappers import renamed, unwrapped
from fastsal.transfer.head_cache import model_digest

pytestmark = pytest.mark.usefixtures("one_thread")


class FabricModule(nn.Module):
    """Of the shape of what `Fabric.setup` returns: the model is registered under two names."""

    def __init__(self, model):
        super().__init__()
        self._forward_module = model
        self._original_module = model

    def forward(self, *args):
        return self._forward_module(*args)

    def state_dict(self, **options):
        return self._original_module.state_dict(**options)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_original_module"), name)


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compile": lambda model: torch.compile(model, backend="eager"),
    "compile of parallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "average": AveragedModel,
    "average of parallel": lambda model: AveragedModel(nn.DataParallel(model)),
    "ModelEma": ModelEma,
    "ModelEmaV2": ModelEmaV2,
    "ModelEmaV3": ModelEmaV3,
    "Fabric": FabricModule,
}
# What runs: the first version of timm's average is no module.
MODULES = {name: wrap for name, wrap in WRAPPERS.items() if name != "ModelEma"}


def vit(num_classes=4):
    """A small ViT of timm, whose features are normalized tokens, not the input of a Linear."""
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2,
        num_classes=num_classes,
    ).eval()  # fmt: skip


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    ).eval()


def batch(n=6, size=8, classes=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, size, size, generator=generator), torch.arange(n) % classes


def test_a_model_that_is_not_wrapped_is_itself():
    model = net()
    assert unwrapped(model) is model


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_the_model_inside_is_found(wrap):
    inner = unwrapped(wrap(net()))
    assert type(inner) is nn.Sequential


class Normalized(nn.Module):
    """A module of the user, not a wrapper: it changes its inputs."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x * 2)


class Teacher(nn.Module):
    """A student with an average of it: the average alone is not this model."""

    def __init__(self, model):
        super().__init__()
        self.student, self.ema, self.decay = model, copy.deepcopy(model), 0.9

    def update(self):
        pass

    def forward(self, x):
        return self.student(x)


@pytest.mark.parametrize("kind", [Normalized, Teacher])
def test_a_module_of_the_user_is_not_a_wrapper(kind):
    model = kind(net())
    assert unwrapped(model) is model
    assert unwrapped(nn.DataParallel(model)) is model


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("num_classes", [4, 0])
def test_features_do_not_depend_on_wrappers(wrap, num_classes):
    model = vit(num_classes)
    images, _ = batch(2, 32)
    expected = features(model, images)
    assert expected.shape == (2, 24)
    torch.testing.assert_close(features(wrap(model), images), expected, rtol=0, atol=0)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_facts_do_not_depend_on_wrappers(wrap):
    model = vit(4)
    wrapped = wrap(model)
    assert class_count(wrapped) == 4
    assert [type(layer) for layer in find_head(wrapped)] == [nn.Linear]
    assert find_head(wrapped)[0].out_features == 4
    assert input_spec(wrapped) == input_spec(model)
    assert model_digest(wrapped) == model_digest(model)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("parameters", [None, "4.weight", "module.4.weight", "_orig_mod.[04].*"])
def test_names_do_not_depend_on_wrappers(wrap, parameters):
    model = net()
    expected = ["4.weight"] if parameters and "." in parameters[:8] else ["0.weight", "4.weight"]
    if parameters == "_orig_mod.[04].*":
        expected = ["0.weight", "4.weight"]
    assert list(fastsal.select_parameters(wrap(model), parameters)) == expected


@pytest.mark.parametrize("wrap", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("curvature", ["empirical", "features"])
def test_a_wrapped_model_is_pruned_as_the_model_inside(wrap, curvature):
    plain, wrapped = net(), wrap(net())
    data = [batch()]
    options = {"sparsity": 0.5, "damping": 0.01, "block_size": 16, "curvature": curvature}
    expected = fastsal.prune(plain, data, **options)
    found = fastsal.prune(wrapped, data, **options)
    assert found.masks == expected.masks
    inner = unwrapped(wrapped)
    for name, value in plain.state_dict().items():
        assert torch.equal(inner.state_dict()[name], value), name
    found.masks.verify(wrapped)
    found.masks.verify(plain)


@pytest.mark.parametrize("wrap", MODULES.values(), ids=MODULES)
def test_statistics_scores_and_compensation_of_wrapped_models(wrap):
    model = net()
    wrapped, data = wrap(model), [batch()]
    fisher = fastsal.collect(wrapped, data, block_size=8)
    assert fisher.names == ["0.weight", "4.weight"]
    scores = fastsal.score(wrapped, fisher)
    expected = fastsal.score(model, fastsal.collect(model, data, block_size=8))
    assert all(torch.equal(scores[name], expected[name]) for name in expected)
    masks = fastsal.rank(scores, 0.5)
    fastsal.compensate(wrapped, fisher, masks)
    masks.verify(wrapped)
    assert list(fastsal.per_sample_gradients(wrapped, *data[0])) == fisher.names


def test_masks_and_statistics_with_names_of_a_wrapper_are_understood():
    model, (images, labels) = net(), batch()
    plain = fastsal.collect(model, [(images, labels)], block_size=8)
    masks = fastsal.rank(fastsal.score(model, plain, "magnitude"), 0.5)
    old = fastsal.BlockFisher({f"module.{n}": s for n, s in plain.shapes.items()}, block_size=8)
    rows = fastsal.per_sample_gradients(model, images, labels)
    old.update({f"module.{name}": value for name, value in rows.items()})
    of_old = fastsal.Masks({f"module.{name}": mask for name, mask in masks.items()})
    expected = fastsal.score(model, plain, masks=masks)
    found = fastsal.score(model, old, masks=masks)
    for name, value in expected.items():
        torch.testing.assert_close(found[f"module.{name}"], value)
    again = fastsal.score(model, plain, masks=of_old)
    assert all(torch.equal(again[name], value) for name, value in expected.items())
    fastsal.compensate(model, plain, of_old)
    masks.verify(model)


@pytest.mark.parametrize("wrap", MODULES.values(), ids=MODULES)
def test_a_wrapped_model_is_fine_tuned_under_plain_names(wrap):
    plain, wrapped = net(), wrap(net())
    masks = fastsal.Masks({"0.weight": torch.arange(108).reshape(4, 3, 3, 3) % 2})
    for model in (plain, wrapped):
        fastsal.finetune(model, [batch()], masks, epochs=2, lr=0.1, frozen="0.bias")
    inner = unwrapped(wrapped)
    assert not torch.equal(inner[0].weight, net()[0].weight)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(inner.state_dict()[name], value)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_weights_are_written_and_read_under_ordinary_names(wrap, tmp_path):
    model, path = net(), tmp_path / "w.safetensors"
    save_weights(wrap(model), path)
    assert set(read_weights(path)) == set(model.state_dict())
    other = wrap(net(1))
    load_weights(other, path)
    assert torch.equal(unwrapped(other)[4].weight, model[4].weight)


@pytest.mark.parametrize("wrap", MODULES.values(), ids=MODULES)
def test_the_state_dict_of_a_wrapper_loads(wrap, tmp_path):
    model, path = net(), tmp_path / "w.pth"
    torch.save(wrap(model).state_dict(), path)
    other = net(1)
    load_weights(other, path)
    assert all(torch.equal(other.state_dict()[n], v) for n, v in model.state_dict().items())


class Own(nn.Module):
    """A model whose own names begin as those of a wrapper; `fc` is in both places."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.module = nn.ModuleDict({"fc": nn.Linear(4, 4), "conv": nn.Linear(4, 4)})
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.module["conv"](self.module["fc"](x)))


class AllOwn(nn.Module):
    """A model all of whose names begin with `module.`."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize("kind", [Own, AllOwn])
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, MODULES["compile"]])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_names_of_the_model_itself_are_kept(kind, wrap, suffix, tmp_path):
    model, path = kind(), tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(wrap(model).state_dict(), path)
    else:
        save_weights(wrap(model), path)
        assert set(read_weights(path)) == set(model.state_dict())
    for other in (kind(1), wrap(kind(1))):
        load_weights(other, path)
        inner = unwrapped(other)
        assert all(torch.equal(inner.state_dict()[n], v) for n, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("names", "known", "expected"),
    [
        (["a", "b"], ["a", "b", "c"], {"a": "a", "b": "b"}),
        (["module.a", "module.b"], ["a", "b"], {"module.a": "a", "module.b": "b"}),
        (["a"], ["module.a", "module.b"], {"a": "module.a"}),
        (["_orig_mod.module.a"], ["a"], {"_orig_mod.module.a": "a"}),
        (["module._orig_mod.a"], ["_orig_mod.a"], {"module._orig_mod.a": "_orig_mod.a"}),
        (["module.a", "n_averaged"], ["a"], {"module.a": "a"}),
        # Names of the model that begin with a segment of wrappers.
        (["module.a", "a"], ["module.a", "a"], {"module.a": "module.a", "a": "a"}),
        (
            ["module.module.a", "module.a"],
            ["module.a", "a"],
            {"module.module.a": "module.a", "module.a": "a"},
        ),
        # Segments inside of names, if the result is unambiguous.
        (["x._orig_mod.a"], ["x.a"], {"x._orig_mod.a": "x.a"}),
        (["x.a"], ["x._fsdp_wrapped_module.a"], {"x.a": "x._fsdp_wrapped_module.a"}),
        (
            ["_fsdp_wrapped_module.x._checkpoint_wrapped_module.a"],
            ["x.a"],
            {"_fsdp_wrapped_module.x._checkpoint_wrapped_module.a": "x.a"},
        ),
        (["x._orig_mod.a", "x.module.a"], ["x.a"], {}),
        (["x.a"], ["x._orig_mod.a", "x.module.a"], {}),
        (["amodule.a"], ["a"], {}),
        (["other"], ["a"], {}),
    ],
)
def test_names_are_changed_only_where_the_model_has_others(names, known, expected):
    assert renamed(names, known) == expected


class ChannelsLast(nn.Module):
    """A headless backbone whose features are `[n, h, w, f]`."""

    def __init__(self, **facts):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        for name, value in facts.items():
            setattr(self, name, value)

    def forward_features(self, x):
        return self.conv(x).permute(0, 2, 3, 1)


@pytest.mark.parametrize("facts", [{"output_fmt": "NHWC"}, {"num_features": 6}])
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel])
def test_features_with_channels_last_are_averaged_over_pixels(facts, wrap):
    model, (images, _) = ChannelsLast(**facts), batch(size=9)
    expected = model.conv(images).mean(dim=(2, 3))
    torch.testing.assert_close(features(wrap(model), images), expected)


def test_channels_first_stay_the_default():
    model, (images, _) = ChannelsLast(), batch()
    assert features(model, images).shape == (6, 6)
    model.output_fmt = "NCHW"
    torch.testing.assert_close(
        features(model, images), model.forward_features(images).mean(dim=(2, 3))
    )


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, MODULES["compile"]])
def test_a_swin_transformer_without_a_pooling_head(wrap):
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=28, embed_dim=8, depths=(1, 1), num_heads=(1, 2),
        num_classes=0, global_pool="",
    ).eval()  # fmt: skip
    images, _ = batch(2, 28)
    pooled = model.forward_features(images).mean(dim=(1, 2))
    assert pooled.shape == (2, model.num_features)
    torch.testing.assert_close(features(wrap(model), images), pooled)


class Blocks(nn.Module):
    """A headless model without `forward_features`: its last Linear maps pixels `[n, h, w, f]`."""

    def __init__(self):
        super().__init__()
        self.conv, self.mlp = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

    def forward(self, x):
        return self.mlp(self.conv(x).permute(0, 2, 3, 1))


def test_the_input_of_a_linear_has_its_channels_last():
    model, (images, _) = Blocks(), batch()
    expected = model.conv(images).mean(dim=(2, 3))
    torch.testing.assert_close(features(model, images), expected)


@pytest.fixture
def one_process(tmp_path):
    """A group of one process over gloo."""
    meeting = f"file://{tmp_path / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=meeting, world_size=1, rank=0)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("compiled", [False, True])
def test_distributed_data_parallel_is_seen_through(compiled):
    plain, parallel = net(), nn.parallel.DistributedDataParallel(net())
    wrapped = torch.compile(parallel, backend="eager") if compiled else parallel
    options = {"sparsity": 0.5, "damping": 0.01, "block_size": 16}
    expected = fastsal.prune(plain, [batch()], **options)
    assert fastsal.prune(wrapped, [batch()], **options).masks == expected.masks
    assert unwrapped(wrapped) is parallel.module
    assert torch.equal(parallel.module[4].weight, plain[4].weight)
