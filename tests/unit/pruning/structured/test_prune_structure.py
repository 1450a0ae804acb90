"""`prune_structure`: budgets, the fold, what is left unchanged, and runs that are saved."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import fastsal
from fastsal.errors import InvalidArgument, UnknownParameter
from fastsal.models.evaluating import set_modes
from fastsal.models.features import features
from fastsal.models.widths import widths_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=4,
        num_classes=5, mlp_ratio=3,
    )  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "mlp.fc1.weight" in name:  # units of different importance
                p.mul_(torch.linspace(0.2, 6, len(p))[:, None])
            else:
                p.add_(0.05 * torch.randn(p.shape))
    set_modes(model, False)
    return model


@pytest.fixture
def model(original):
    return copy.deepcopy(original)


@pytest.fixture(scope="module")
def batches():
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(32, 3, 16, 16, generator=draw) for _ in range(4)]


def error(model, dense, images):
    f, wanted = features(model, images), features(dense, images)
    return float((f - wanted).square().sum() / wanted.square().sum())


def total(model):
    return sum(p.numel() for p in model.parameters())


def test_half_of_the_units_go(model, original, batches):
    result = fastsal.prune_structure(model, batches, 0.5, scope="global", reconstruct=False)
    assert result.before.units == 3 * 96
    assert 0 <= 3 * 48 - result.after.units < 8
    assert total(model) == result.after.parameters < result.before.parameters == total(original)
    assert list(model.state_dict()) == list(original.state_dict())
    for name, (before, after) in result.widths.items():
        fc1, fc2 = model.get_submodule(name), model.get_submodule(name.replace("fc1", "fc2"))
        assert before == 96
        assert after % 8 == 0
        assert tuple(fc1.weight.shape) == (after, 32) == (fc1.out_features, 32)
        assert fc2.in_features == fc2.weight.shape[1] == after
        kept = sorted(set(range(96)) - set(result.removed[name].tolist()))
        dense = original.get_submodule(name)
        assert torch.equal(fc1.weight, dense.weight[kept])
    assert result.samples == 128
    assert result.masks.sparsity == 0
    result.masks.verify(model)
    assert "structure" in result.as_dict()
    assert "288" in repr(result)


def test_the_fold_and_the_score_both_help(original, batches):
    held = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(2))

    def run(**how):
        model = copy.deepcopy(original)
        fastsal.prune_structure(model, batches, 0.5, reconstruct=False, **how)
        return error(model, original, held)

    best = run()
    assert best < run(compensate=False)
    assert best < run(criterion="random")
    assert best < 1.02 * run(criterion="magnitude")


@pytest.mark.parametrize("structure", ["mlp", "heads"])
@pytest.mark.parametrize("budget", ["parameters", "macs"])
def test_budgets_of_the_whole_model(model, batches, structure, budget):
    result = fastsal.prune_structure(
        model, batches, 0.12, structure=structure, budget=budget, multiple=1
    )
    before, after = getattr(result.before, budget), getattr(result.after, budget)
    assert 0.12 <= 1 - after / before < 0.17
    assert total(model) == result.after.parameters


def test_macs_are_those_of_the_layers(model, batches):
    result = fastsal.prune_structure(model, batches, 0.0)
    tokens = 5
    block = tokens * (32 * 96 + 32 * 32 + 2 * 32 * 96)
    assert result.after.macs == result.before.macs == 4 * 32 * 192 + 3 * block + 32 * 5


def test_each_layer_loses_the_same(model, batches):
    result = fastsal.prune_structure(model, batches, 0.25, scope="layer")
    assert set(result.widths.values()) == {(96, 72)}
    result = fastsal.prune_structure(model, batches, 0.5, scope="layer", structure="heads")
    assert set(result.widths.values()) == {(4, 2)}
    assert model.blocks[0].attn.num_heads == 2
    assert model.blocks[0].attn.qkv.out_features == 3 * 16
    assert set(widths_of(model)) >= {"blocks.0.attn", "blocks.0.attn.proj", "blocks.0.mlp.fc1"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(original, batches, dtype):
    model = copy.deepcopy(original).to(dtype)
    result = fastsal.prune_structure(model, batches, 0.25, scope="layer")
    assert {after for _, after in result.widths.values()} == {72}
    assert {p.dtype for p in model.parameters()} == {dtype}
    dense = copy.deepcopy(original)
    fastsal.prune_structure(dense, batches, 0.25, scope="layer")
    found, wanted = model(batches[0].to(dtype)).float(), dense(batches[0])
    rest = original(batches[0]) - wanted
    assert (found - wanted).norm() < 0.5 * rest.norm() + 0.05 * wanted.norm()


def test_several_passes_within_a_memory_budget_are_equal(original, batches):
    found = []
    for budget in (None, 2 * 8 * 96**2 * 4):
        model = copy.deepcopy(original)
        result = fastsal.prune_structure(
            model, batches, 0.5, memory_budget=budget, reconstruct=False
        )
        found.append((result, model))
    (one, a), (several, b) = found
    assert one.widths == several.widths
    # The noise of the features is drawn again in each pass.
    for name in one.removed:
        assert torch.equal(one.removed[name], several.removed[name])
    for left, right in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(left, right)
    with pytest.raises(InvalidArgument, match="memory_budget must be at least"):
        fastsal.prune_structure(copy.deepcopy(original), batches, 0.5, memory_budget=1000)


def test_a_reconstruction_that_does_not_fit_into_the_budget(original, batches):
    model, budget = copy.deepcopy(original), 2 * 8 * 96**2 * 4
    assert fastsal.prune_structure(model, batches, 0.5, memory_budget=budget).reconstruction is None
    model = copy.deepcopy(original)
    with pytest.raises(InvalidArgument, match="memory_budget is too small for reconstruct"):
        fastsal.prune_structure(model, batches, 0.5, memory_budget=budget, reconstruct=True)
    assert_equal(model, original)
    result = fastsal.prune_structure(model, batches, 0.5, memory_budget="64MiB")
    assert result.reconstruction is not None


@pytest.mark.parametrize("structure", ["mlp", "heads"])
def test_a_reconstruction_is_that_of_the_masked_model(model, original, batches, structure):
    result = fastsal.prune_structure(model, batches, 0.5, structure=structure)
    assert result.reconstruction is not None
    assert result.reconstruction.kept
    assert result.reconstruction.before == result.held_out_loss
    masked, folded = copy.deepcopy(original), copy.deepcopy(original)
    fastsal.prune_structure(folded, batches, 0.5, structure=structure, reconstruct=False)
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in fastsal_weights(masked).items()}
    for name, units in result.removed.items():
        block = name.split(".")[1]
        if structure == "mlp":
            masks[f"blocks.{block}.mlp.fc1.weight"][units] = False
            masks[f"blocks.{block}.mlp.fc2.weight"][:, units] = False
            put_folded(masked.blocks[int(block)].mlp.fc2, folded.blocks[int(block)].mlp.fc2, units)
        else:
            rows = (units[:, None] * 8 + torch.arange(8)).flatten()
            for third in range(3):
                masks[f"blocks.{block}.attn.qkv.weight"][third * 32 + rows] = False
            masks[f"blocks.{block}.attn.proj.weight"][:, rows] = False
            put_folded(
                masked.blocks[int(block)].attn.proj, folded.blocks[int(block)].attn.proj, rows
            )
    slow = fastsal.reconstruct(masked, original, batches, fastsal.Masks(masks))
    assert slow.after == pytest.approx(result.reconstruction.after, rel=1e-4)
    torch.testing.assert_close(model(batches[0]), masked(batches[0]), rtol=1e-3, atol=1e-3)


def put_folded(layer, folded, gone):
    """Give the columns of a layer that remain the values of a layer without the others."""
    kept = sorted(set(range(layer.in_features)) - set(gone.tolist()))
    with torch.no_grad():
        layer.weight[:, kept] = folded.weight
        layer.bias.copy_(folded.bias)


def fastsal_weights(model):
    return {n: p for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n} | {
        "patch_embed.proj.weight": model.patch_embed.proj.weight
    }


def test_a_worse_reconstruction_is_undone(model, original, batches, monkeypatch):
    def harm(model, dense, masks, source, **rest):
        for p in model.parameters():
            p.data.mul_(1.5)
        return [], 1

    monkeypatch.setattr("fastsal.pruning.structured.judging.reconstruct_on", harm)
    result = fastsal.prune_structure(model, batches, 0.5)
    assert result.reconstruction is not None
    assert not result.reconstruction.kept
    monkeypatch.undo()
    folded = copy.deepcopy(original)
    fastsal.prune_structure(folded, batches, 0.5, reconstruct=False)
    for left, right in zip(model.parameters(), folded.parameters(), strict=True):
        assert torch.equal(left, right)


def test_widths_are_chosen_by_held_out_features(original, batches):
    def run(**how):
        return fastsal.prune_structure(copy.deepcopy(original), batches, 0.4, **how)

    best = run()
    for scope in ("global", "layer"):
        assert best.held_out_loss <= run(scope=scope, reconstruct=True).held_out_loss
    assert run(scope="global", reconstruct=False).held_out_loss is None


def test_layers_are_chosen_by_name(model, batches):
    result = fastsal.prune_structure(model, batches, 0.5, layers=["blocks.*", "!blocks.1.*"])
    assert list(result.widths) == ["blocks.0.mlp.fc1", "blocks.2.mlp.fc1"]
    assert result.left_out["blocks.1.mlp.fc1"] == "not selected by layers"
    with pytest.raises(UnknownParameter, match="'block' matches none"):
        fastsal.prune_structure(model, batches, 0.5, layers="block")


def test_an_iterator_is_enough(model, batches):
    result = fastsal.prune_structure(model, iter(batches), 0.5)
    assert result.samples == 112  # without those that are held out
    with pytest.raises(InvalidArgument, match="iterable several times"):
        fastsal.prune_structure(model, iter(batches), 0.5, refit="blocks")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be"),
        ({"sparsity": 0.95}, "sparsity must be at most 0.[89]"),
        ({"structure": "layers"}, "structure must be 'mlp', 'heads' or 'channels'"),
        ({"structure": "channels"}, "no units that can be removed as 'channels'"),
        ({"budget": "time"}, "budget must be"),
        ({"criterion": "taylor"}, "criterion must be"),
        ({"floor": 2}, "floor must be"),
        ({"damping": 0}, "damping must be"),
        ({"multiple": 0}, "multiple must be"),
    ],
)
def test_errors_leave_the_model(model, original, batches, change, message):
    with pytest.raises(InvalidArgument, match=message):
        fastsal.prune_structure(model, batches, **{"sparsity": 0.5, **change})
    assert_equal(model, original)


def test_an_interrupt_leaves_the_model(model, original, batches):
    def broken():
        yield batches[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastsal.prune_structure(model, broken(), 0.5)
    assert_equal(model, original)


@pytest.mark.parametrize("name", ["judging.reconstruct_on", "prune_structure.refit_model"])
def test_an_error_in_a_late_step_leaves_the_model(model, original, batches, monkeypatch, name):
    def broken(model, *_args, **_options):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(2)
        raise KeyboardInterrupt

    monkeypatch.setattr(f"fastsal.pruning.structured.{name}", broken)
    with pytest.raises(KeyboardInterrupt):
        fastsal.prune_structure(model, batches, 0.5, refit="blocks")
    assert_equal(model, original)


def assert_equal(model, original):
    assert widths_of(model) == {}
    for (name, a), (_, b) in zip(
        model.state_dict().items(), original.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name
    assert [m.training for m in model.modules()] == [m.training for m in original.modules()]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_refit_lowers_the_held_out_error(model, original, batches):
    how = fastsal.Refit(steps=12, lr=1e-3, batch_size=32, augment=None, checks=3)
    result = fastsal.prune_structure(model, batches, 0.6, refit=how)
    assert result.refit is not None
    assert result.refit.after <= result.refit.before
    assert "seconds" in result.as_dict()["refit"]


def test_windows_without_some_of_their_outputs_are_not_matched():
    model = fastsal.load_model("test_efficientnet", num_classes=3)
    dense = copy.deepcopy(model)
    x = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    how = {"structure": "channels", "scope": "layer", "reconstruct": False}
    result = fastsal.prune_structure(model, [x], 0.5, refit=fastsal.Refit(steps=2), **how)
    assert widths_of(model) != widths_of(dense)
    # The outputs of every block lost channels: only the features are matched.
    assert result.refit.windows == []
    masks, block = result.masks, "blocks.1.0"
    with pytest.raises(InvalidArgument, match="must have as many outputs as in the dense model"):
        fastsal.refit(model, dense, [x], masks, fastsal.Refit(windows=[block], steps=1))


def test_batch_normalization_takes_the_mean_of_a_layer_without_bias():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 1)
            self.conv1, self.bn1 = nn.Conv2d(6, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
            self.conv2, self.bn2 = nn.Conv2d(10, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
            self.fc = nn.Linear(6, 2)

        def forward(self, x):
            x = self.stem(x)
            h = torch.relu(self.bn1(self.conv1(x)) + 1)
            return self.fc((x + self.bn2(self.conv2(h))).mean(dim=(2, 3)))

    torch.manual_seed(0)
    model = Block().eval()
    dense, x = copy.deepcopy(model), torch.randn(64, 3, 6, 6)
    result = fastsal.prune_structure(
        model, [x], 0.5, structure="channels", multiple=1, scope="layer", reconstruct=False
    )
    assert result.widths == {"conv1": (10, 5)}
    kept = sorted(set(range(10)) - set(result.removed["conv1"].tolist()))

    def inner(m):
        h = torch.relu(m.bn1(m.conv1(m.stem(x))) + 1)
        return m.bn2(m.conv2(h)), h

    (wanted, h), (found, small) = inner(dense), inner(model)
    torch.testing.assert_close(small, h[:, kept])
    # Least squares on patches and a constant, by hand; λ is small.
    rows = torch.nn.functional.unfold(small, 3, padding=1).transpose(1, 2).reshape(-1, 45)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1).double()
    target = wanted.movedim(1, -1).reshape(-1, 6).double()
    best = target - rows @ torch.linalg.lstsq(rows, target).solution
    error = target - found.movedim(1, -1).reshape(-1, 6)
    assert best.square().sum() <= error.square().sum() <= 1.01 * best.square().sum()
    assert error.mean(dim=0).abs().max() < 1e-4


def test_export_and_deepcopy_of_a_smaller_model(model, batches):
    fastsal.prune_structure(model, batches, 0.5)
    again = copy.deepcopy(model)
    assert widths_of(again) == widths_of(model) != {}
    x = batches[0][:2]
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


def test_a_smaller_model_is_compiled_and_trained_in_parallel(model, batches, tmp_path):
    fastsal.prune_structure(model, batches, 0.5)
    x = batches[0][:4]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
        before = model.blocks[0].mlp.fc1.weight.detach().clone()
        parallel(x).square().mean().backward()
        optimizer.step()
        assert before.shape == model.blocks[0].mlp.fc1.weight.shape
        assert not torch.equal(before, model.blocks[0].mlp.fc1.weight)
    finally:
        torch.distributed.destroy_process_group()
