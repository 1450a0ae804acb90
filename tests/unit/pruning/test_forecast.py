"""Plans: what would be done is what is done, also for models that are nowhere."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

import fastsal
from fastsal.cli import main
from fastsal.errors import InvalidArgument
from fastsal.fisher.collection.groups import collected
from fastsal.fisher.collection.traffic import costs
from fastsal.fisher.memory_plan import PassMemory
from fastsal.pruning.forecast import plan_memory
from fastsal.utils.live_memory import LiveMemory

from ..small_net import net


def images(count=48):
    torch.manual_seed(1)
    return [(torch.randn(count, 3, 8, 8), torch.randint(0, 10, (count,)))]


BUDGET = {"memory_budget": "92MiB", "micro_batch": 4}


def test_collect_does_what_was_planned(tmp_path):
    plan = plan_memory(
        net(), images(), prunes=False, samples=48, calibrate=False, scratch=tmp_path, **BUDGET
    )
    done = collected(net(), images(), samples=48, scratch=tmp_path, **BUDGET).plan
    assert (plan.passes, plan.micro_batch, plan.place) == (done.passes, 4, "file")
    assert plan.memory == done.memory


def test_prune_tells_what_was_planned(tmp_path):
    how = {"damping": 1e-3, "scratch": tmp_path, **BUDGET}
    plan = plan_memory(net(), images(), samples=48, calibrate=False, **how)
    told = fastsal.prune(net(), images(), 0.5, **how).history[0].memory_plan
    assert told["memory"] == plan.memory
    assert told["passes"] == plan.passes
    assert told["kept"] == plan.kept > 0


def test_sums_that_are_nowhere_are_collected_for_each_use(monkeypatch):
    how = {"damping": 1e-3, "micro_batch": 4, "memory_budget": "102MiB"}
    told = fastsal.prune(net(), images(), 0.5, **how).history[0].memory_plan
    monkeypatch.setattr("fastsal.pruning.forecast._statistics_seconds", lambda *_: 10_000.0)

    def uses(**more):
        plan = plan_memory(net(), images(), samples=48, **how | more)
        assert plan.place == told["place"] == "recomputed"
        assert plan.disk == 0
        return round(plan.seconds["statistics"] / 10_000)

    assert plan_memory(net(), images(), samples=48, **how).memory == told["memory"]
    assert uses(compensate=False) == 1
    assert uses() == 2
    assert uses(rounds=3) == 6
    # To find candidates, and to score and compensate with seven and then with the best.
    assert uses(damping="auto") == 1 + 2 * 8


@pytest.mark.parametrize("budget", [None, "104MiB"])
def test_one_of_several_ranks(budget):
    chosen = fastsal.select_parameters(net())
    shapes = {name: tuple(p.shape) for name, p in chosen.items()}
    how = {"micro_batch": 4, "memory_budget": budget, "damping": 1e-3, "calibrate": False}
    one, four = (plan_memory(net(), images(), ranks=n, **how) for n in (1, 4))
    assert four.ranks == 4
    assert four.statistics == pytest.approx(one.statistics / 4, rel=0.1)
    paper = costs(shapes, 48, 4, micro_batch=4, step=one.step)
    times = 2 if four.place == "recomputed" else 1
    assert four.sent == {
        "rows": times * max(paper.rows),
        "weights": max(paper.weights),
        "masks": max(paper.masks),
    }
    with pytest.raises(InvalidArgument, match="ranks must be at least 1, got 0"):
        plan_memory(net(), images(), ranks=0)


def test_held_out_images_that_are_kept_are_counted():
    """Without a budget those of the damping; within one, only where the images come once."""
    each = 3 * 8 * 8 * 4
    free = plan_memory(net(), images(), samples=100, calibrate=False)
    assert free.images == free.as_dict()["images"] == 13 * each
    assert free.memory == plan_memory(net(), images(), damping=1.0, calibrate=False).memory + (
        13 * each
    )
    assert plan_memory(net(), images(), samples=10**6, calibrate=False).images == 1024 * each
    assert plan_memory(net(), images(), prunes=False, calibrate=False).images == 0
    how = {"samples": 48, "memory_budget": "1GiB", "micro_batch": 4}
    again = plan_memory(net(), images(), calibrate=False, **how)
    once = plan_memory(net(), iter(images()), calibrate=False, **how)
    assert (again.images, once.images) == (0, 6 * each)
    assert once.memory == again.memory + 6 * each
    done = fastsal.prune(net(), iter(images()), 0.5, **how).history[0].memory_plan
    assert done["images"] == 6 * each
    # Twelve for the test of a limit, and one in eight of the others.
    limit = {"max_loss_increase": 2.0, "confidence": 0.1}
    done = fastsal.prune(net(), iter(images()), **limit, **how).history[0].memory_plan
    assert done["images"] == (13 + 5) * each


def test_images_that_come_once_need_a_number_within_a_budget():
    how = {"max_loss_increase": 0.5, "damping": 1e-3, "memory_budget": "1GiB"}
    with pytest.raises(InvalidArgument, match="samples must be given for a limit with memory_budg"):
        fastsal.prune(net(), iter(images()), **how)
    with pytest.raises(InvalidArgument, match="held_out must be .* several times.* an iterator"):
        fastsal.prune(net(), images(), held_out=iter(images()), **how)
    with pytest.raises(InvalidArgument, match="memory_budget must be .* for held-out images"):
        fastsal.prune(net(), iter(images()), 0.5, samples=48, memory_budget="10MiB")


def test_time_is_tried(tmp_path):
    plan = plan_memory(net(), images(), samples=1000, scratch=tmp_path, **BUDGET)
    more = plan_memory(net(), images(), samples=100_000, scratch=tmp_path, **BUDGET)
    assert 0 < plan.seconds["statistics"] < more.seconds["statistics"]
    assert plan.seconds["total"] == pytest.approx(
        plan.seconds["statistics"] + plan.seconds["prune"], abs=0.2
    )


def test_a_model_on_the_meta_device(tmp_path):
    here = plan_memory(net(), images(), samples=48, scratch=tmp_path, **BUDGET)
    there = plan_memory(net("meta"), images(), samples=48, scratch=tmp_path, **BUDGET)
    assert there.statistics == here.statistics
    assert there.activations == pytest.approx(here.activations, rel=0.1)
    assert there.seconds["total"] > 0


def test_live_memory_counts_what_is_alive():
    with LiveMemory() as live:
        a = torch.zeros(1000)
        b = a + 1
        c = b.view(10, 100)  # the same memory
        assert live.alive == 8000
        del a
        assert live.alive == 4000
        live.reset()
        d = c * 2 + 1  # two at once, and one left
        assert live.peak == 4000 + 8000
        del b, c, d
    assert live.alive == 0


def test_live_memory_sees_backward_passes():
    x = torch.randn(64, 32)
    layers = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)])
    with LiveMemory() as live:
        loss = layers(x).square().sum()
        forward = live.peak
        loss.backward()
    assert live.peak > forward > 4 * 64 * 32 * 4


def test_a_probe_takes_two_samples():
    memory = PassMemory(fixed=100.0, sample=10.0)
    assert memory.of(1) == memory.of(2) < memory.of(3)


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_the_command(capsys, tmp_path):
    more = ("--size", 64, "--memory-budget", "1GiB", "--scratch", tmp_path, "--damping", "1e-4")
    code, out, _ = run(capsys, "plan", "resnet18", "--samples", 8, *more, "--json")
    assert code == 0
    told = json.loads(out)
    assert told["weights"] == 11_678_912
    assert told["memory"] <= told["memory_budget"] == 2**30
    assert told["passes"] > 1
    assert told["disk"] == told["statistics"]
    assert told["seconds"]["total"] > 0
    code, out, _ = run(capsys, "plan", "resnet18", "--meta", "--no-time", *more)
    assert code == 0
    assert "passes over the images" in out
    code, out, _ = run(capsys, "plan", "resnet18", "--meta", "--no-time", "--ranks", 4, *more)
    assert code == 0
    assert "by each of 4 ranks" in out
    code, out, _ = run(
        capsys, "plan", "resnet18", "--no-time", "--size", 64, "--memory-budget", "1GiB"
    )
    assert code == 0
    assert "recomputed on each use" in out
    code, _, err = run(capsys, "plan", "resnet18", "--memory-budget", "50MiB", "--no-time")
    assert code == 2
    assert re.search("memory_budget must be at least .*, got 50 MiB", err)


def test_a_billion_weights_are_planned_on_the_meta_device(capsys, tmp_path):
    model = "examples/transformer.py:gpt_1b"
    more = ("--meta", "--tokens", 64, "--memory-budget", "16GiB", "--scratch", tmp_path)
    code, out, err = run(capsys, "plan", model, "--samples", 32, *more, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["weights"] > 9e8
    assert told["memory"] <= 16 * 2**30
    assert told["passes"] > 5
    code, _, err = run(capsys, "plan", model, "--tokens", 64)
    assert code == 2
    assert "tokens requires --meta" in err
