"""Every call with a model on a device equals the same call with the model on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastsal
from fastsal.finetuning.freezing import trained_parameters
from fastsal.fisher.collection import passes
from fastsal.fisher.sinks.downloads import Downloads
from fastsal.fisher.sinks.streaming import RowStream
from fastsal.fisher.sinks.tiles import DeviceTiles, triangles
from fastsal.gradients import per_sample_gradients
from fastsal.transfer import Task
from fastsal.transfer.evaluation import measure
from fastsal.transfer.headed import Headed, SegmentedCrossEntropy
from fastsal.transfer.loss_line import measure_line

from .conftest import PRETENDED, assert_close, assert_same_masks, net, state

pytestmark = pytest.mark.usefixtures("one_thread")
CURVATURES = ("empirical", "sampled", "features")
needs_autocast = pytest.mark.skipif(PRETENDED, reason="the pretended device has no autocast")


def device_of(model):
    places = {p.device for p in (*model.parameters(), *model.buffers())}
    assert len(places) == 1
    return places.pop()


def test_gradients_of_samples(model, there, batches):
    x, y = batches[0]
    assert_close(per_sample_gradients(there, x, y), per_sample_gradients(model, x, y))


@pytest.mark.parametrize("chunk", [7, 10, 23, 10_000])
@pytest.mark.parametrize(("d", "block"), [(40, 4), (41, 4), (3, 4), (23, 23)])
def test_sums_in_main_memory(device, d, block, chunk):
    count = -(-d // block)
    squares = torch.arange(count * block**2, dtype=torch.float32).reshape(count, block, block)
    expected = [
        squares[k, i, i : min(block, d - k * block)]
        for k in range(count)
        for i in range(min(block, d - k * block))
    ]
    expected = torch.cat(expected)
    downloads = Downloads(device, chunk)
    for _ in range(2):
        found = downloads.array(triangles(squares.to(device), d, chunk), len(expected))
        assert torch.equal(torch.from_numpy(found), expected)


SINKS = {
    "tiles": lambda sums, parameters, *_, **__: DeviceTiles(
        sums, next(iter(parameters.values())).device
    ),
    "stream": lambda sums, parameters, *_, samples=None, **__: RowStream(
        sums, next(iter(parameters.values())).device, expected=samples
    ),
}


@pytest.mark.parametrize("sink", ["tiles", "stream", "chosen"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_statistics(model, there, batches, monkeypatch, sink, curvature):
    expected = fastsal.collect(model, batches, curvature=curvature, block_size=16)
    if sink != "chosen":
        monkeypatch.setattr(passes, "choose_sink", SINKS[sink])
    found = fastsal.collect(there, batches, curvature=curvature, block_size=16)
    assert found.samples == expected.samples == 96
    names = expected.names
    assert_close({n: found.blocks(n) for n in names}, {n: expected.blocks(n) for n in names})
    assert_close(found.mean_gradient(), expected.mean_gradient())


def test_statistics_in_float64_and_in_passes(model, there, batches, tmp_path):
    expected = fastsal.collect(model, batches, precision="float64")
    found = fastsal.collect(there, batches, precision="float64")
    assert_close(found.diagonal(), expected.diagonal())
    how = {"memory_budget": "128MiB", "scratch": tmp_path, "micro_batch": 4}
    in_passes = fastsal.collect(there, batches, **how)
    assert_close(in_passes.diagonal(), expected.diagonal())


@needs_autocast
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 0.15), (torch.float16, 0.05)])
def test_statistics_of_mixed_precision(model, there, batches, dtype, rtol):
    expected = fastsal.collect(model, batches)
    found = fastsal.collect(there, batches, autocast=dtype)
    assert_close(found.diagonal(), expected.diagonal(), rtol)
    assert measure(there, batches, autocast=dtype).accuracy == pytest.approx(
        measure(model, batches).accuracy, abs=0.1
    )


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("criterion", ["taylor", "block-fisher", "obs-greedy"])
def test_prune(device, model, there, batches, curvature, criterion):
    how = {"criterion": criterion, "curvature": curvature, "block_size": 16, "damping": "0.1x"}
    expected = fastsal.prune(model, batches, 0.5, **how)
    found = fastsal.prune(there, batches, 0.5, **how)
    assert device_of(there) == device
    assert_same_masks(found.masks, expected.masks)
    found.masks.verify(there)
    if found.masks == expected.masks:
        assert_close(state(there), state(model), 1e-3)


WAYS = {
    "auto": {"sparsity": 0.6},
    "macs": {"sparsity": 0.6, "budget": "macs"},
    "rounds": {"sparsity": 0.6, "rounds": 2},
    "recalibrate": {"sparsity": 0.6, "recalibrate": True},
    "limit": {"max_accuracy_drop": 0.3, "confidence": 0.6},
    "loss": {"max_loss_increase": 0.3, "confidence": 0.6},
    "pattern": {"pattern": "2:4", "block_size": 8},
    "refit": {"sparsity": 0.6, "refit": fastsal.Refit(windows="whole", steps=20)},
    "magnitude": {"sparsity": 0.6, "criterion": "magnitude", "compensate": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_prune_in_every_way(model, there, batches, way):
    if PRETENDED and way == "refit":
        pytest.skip("models on the pretended device cannot be copied")
    expected = fastsal.prune(model, batches, **WAYS[way])
    found = fastsal.prune(there, batches, **WAYS[way])
    # Neighbors among the tested sparsities and dampings may be equally good.
    assert found.masks.sparsity == pytest.approx(expected.masks.sparsity, abs=0.06)
    dampings = [r.history[-1].damping or 0.0 for r in (found, expected)]
    is_same = dampings[0] == pytest.approx(dampings[1], rel=1e-3)
    if is_same and found.masks.sparsity == expected.masks.sparsity:
        assert_same_masks(found.masks, expected.masks, 0.02)
    after = [measure(m, batches).loss for m in (there, model)]
    assert after[0] == pytest.approx(after[1], rel=0.1)


def test_prune_within_a_budget_and_from_a_checkpoint(there, model, batches, tmp_path):
    how = {"rounds": 2, "damping": "0.1x", "checkpoint": tmp_path / "state.pt"}
    expected = fastsal.prune(model, batches, 0.5, rounds=2, damping="0.1x")
    found = fastsal.prune(there, batches, 0.5, memory_budget="256MiB", scratch=tmp_path, **how)
    assert_same_masks(found.masks, expected.masks)


def test_a_failure_leaves_the_model_as_it_was(there, batches):
    before = state(there)
    bad = [*batches, (torch.full((4, 3, 8, 8), torch.nan), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(fastsal.FastsalError):
        fastsal.prune(there, bad, 0.5)
    with pytest.raises(fastsal.FastsalError):
        fastsal.finetune(
            there, bad, fastsal.Masks({"fc.weight": torch.ones(3, 24)}), epochs=1, lr=0.1
        )
    assert all(torch.equal(value, before[name]) for name, value in state(there).items())


def test_step_by_step(model, there, batches):
    fisher = fastsal.collect(there, batches, block_size=16)
    scores = fastsal.score(there, fisher)
    masks = fastsal.rank(scores, 0.5)
    assert_same_masks(masks, fastsal.rank(fastsal.score(model, fisher), 0.5))
    for each in (model, there):
        fastsal.compensate(each, fisher, masks)
    masks.apply(there)
    masks.verify(there)
    assert_close(state(there), state(model), 1e-6)
    optimizer = torch.optim.AdamW(there.parameters())
    x, y = batches[0]
    with masks.hold(there, optimizer):
        nn.functional.cross_entropy(
            there(x.to(device_of(there))), y.to(device_of(there))
        ).backward()
        optimizer.step()
    masks.verify(there)


def test_rows_of_the_device_can_be_fed(there, batches):
    x, y = batches[0]
    rows = per_sample_gradients(there, x, y)
    assert {value.device for value in rows.values()} == {device_of(there)}
    fisher = fastsal.BlockFisher({n: tuple(v.shape[1:]) for n, v in rows.items()}, block_size=8)
    fisher.update(rows)
    assert fisher.samples == 16


def finetuned(model, batches, **how):
    masks = fastsal.rank(fastsal.score(model, None, "magnitude"), 0.5)
    given = {"epochs": 2, "lr": 0.05, "train_head": True, "train_normalization": True} | how
    done = fastsal.finetune(model, batches, masks, held_out=batches, **given)
    masks.verify(model)
    return done


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_finetune(model, there, batches, optimizer):
    expected = finetuned(model, batches, optimizer=optimizer)
    found = finetuned(there, batches, optimizer=optimizer)
    for a, b in zip(found.history, expected.history, strict=True):
        assert a["held_out_loss"] == pytest.approx(b["held_out_loss"], rel=1e-3)
    if optimizer == "sgd":  # Adam moves weights whose gradient is rounding alone
        assert_close(state(there), state(model), 1e-2)


@needs_autocast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_finetune_in_mixed_precision(model, there, batches, dtype):
    expected = finetuned(model, batches)
    found = finetuned(there, batches, autocast=dtype)
    assert found.history[-1]["held_out_loss"] == pytest.approx(
        expected.history[-1]["held_out_loss"], rel=0.05
    )


@pytest.mark.skipif(PRETENDED, reason="files cannot hold tensors of the pretended device")
def test_finetune_resumes(there, batches, tmp_path):
    path = tmp_path / "state.pt"

    def stop(done, total):
        if done > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetuned(there, batches, checkpoint=path, progress=stop)
    assert path.exists()
    assert len(finetuned(there, batches, checkpoint=path).history) == 2


def test_only_what_is_trained_moves(there, batches):
    before = state(there)
    finetuned(there, batches, train_head=False, train_normalization=False)
    trained = trained_parameters(there, (), train_head=False, train_normalization=False)
    for name, value in state(there).items():
        if name not in trained and name != "deep.weight":  # masked
            kept = value != 0
            assert torch.equal(value[kept], before[name][kept]), name


def test_refit(device, model, there, batches):
    found = []
    for each in (model, there):
        masks = fastsal.rank(fastsal.score(each, None, "magnitude"), 0.5)
        dense = net().to(device_of(each))
        how = fastsal.Refit(windows=["deep", "hidden"], steps=20, batch_size=16)
        found.append(fastsal.refit(each, dense, batches, masks, how))
        masks.verify(each)
    assert found[1].before == pytest.approx(found[0].before, rel=1e-3)
    assert found[1].after == pytest.approx(found[0].after, rel=0.1)
    assert device_of(there) == device


@pytest.mark.parametrize("kind", ["ridge", "knn", "probe", "own"])
def test_heads(model, there, images, kind):
    tasks = [Task.split(name, images, seed=seed) for seed, name in enumerate("ab")]
    expected = fastsal.fit_heads(model, tasks, kind=kind)
    found = fastsal.fit_heads(there, tasks, kind=kind)
    if kind in ("ridge", "probe"):
        for name, head in found.items():
            assert head.weight.device.type == "cpu"
            assert_close({"w": head.weight}, {"w": expected[name].weight}, 1e-2)
    accuracies = fastsal.evaluate(there, tasks, found)
    assert accuracies == pytest.approx(fastsal.evaluate(model, tasks, expected), abs=0.1)
    # Heads of a model on the CPU serve one on the device.
    assert fastsal.evaluate(there, tasks, expected) == pytest.approx(accuracies, abs=0.1)


def test_headed(model, there, images, batches):
    task = Task.split("a", images, seed=0)
    heads = fastsal.fit_heads(model, [task, Task("b", task.fit, task.test)])
    pairs = [Headed(each, list(heads.values())) for each in (model, there)]
    assert device_of(pairs[1]) == device_of(there)
    loss = SegmentedCrossEntropy([3, 3])
    shifted = [(x, y + 3 * (i % 2)) for i, (x, y) in enumerate(batches)]
    names = [f"backbone.{name}.weight" for name in ("conv", "deep", "hidden")]
    found = [fastsal.collect(each, shifted, loss=loss, parameters=names) for each in pairs]
    assert_close(found[1].diagonal(), found[0].diagonal())


def test_loss_lines(model, there, batches):
    def measured(each):
        return tuple(measure(each, batches))

    end = {name: value * 0.5 if value.is_floating_point() else value
           for name, value in state(model).items()}  # fmt: skip
    lines = [measure_line(each, state(model), end, measured, points=3) for each in (model, there)]
    for a, b in zip(*lines, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4)


def test_plans(there, batches):
    plan = fastsal.plan_memory(there, batches, samples=96)
    assert set(plan.seconds) == {"statistics", "prune", "total"}
    assert plan.statistics == fastsal.plan_memory(net(), batches, samples=96).statistics


def test_for_the_time_of_a_call(device, images, batches):
    """`device=` of a call; afterwards the model has its own tensors."""
    model, expected = net(), net()
    task = Task.split("a", images, seed=0)
    tensors = {name: value.data_ptr() for name, value in model.state_dict().items()}
    heads = fastsal.fit_heads(model, task, device=str(device))
    assert fastsal.evaluate(model, task, heads, device=device) == pytest.approx(
        fastsal.evaluate(expected, task, fastsal.fit_heads(expected, task)), abs=0.1
    )
    assert all(torch.equal(v, state(expected)[name]) for name, v in state(model).items())
    finetuned(expected, batches)
    finetuned(model, batches, device=str(device))
    assert device_of(model).type == "cpu"
    assert {n: v.data_ptr() for n, v in model.state_dict().items()} == tensors
    assert_close(state(model), state(expected), 1e-2)


@pytest.mark.skipif(PRETENDED, reason="the pretended device has no collectives")
def test_a_job_of_one_rank(device, model, there, batches, tmp_path):
    import torch.distributed as dist

    expected = fastsal.prune(model, batches, 0.5, damping="0.1x")
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = (tmp_path / "store").as_uri()
    dist.init_process_group(backend, rank=0, world_size=1, init_method=store)
    try:
        found = fastsal.distributed.prune(there, batches, sparsity=0.5, damping="0.1x")
    finally:
        dist.destroy_process_group()
    assert_same_masks(found.masks, expected.masks)
    found.masks.verify(there)
