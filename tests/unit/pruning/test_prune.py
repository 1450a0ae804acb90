"""Pruning as a whole: counts, rounds, damping, history, and models that errors leave alone."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsal
import fastsal.pruning.process
from fastsal import collect, prune, rank, score
from fastsal.errors import (
    DataError,
    FactorizationError,
    InvalidArgument,
    NonFiniteGradient,
    UnknownParameter,
)
from fastsal.pruning.criteria import CRITERIA
from fastsal.pruning.damping import candidates, choose_damping, mean_diagonal
from fastsal.pruning.measured import HeldOut

from ..held_out_places import held_out_mask

pytestmark = pytest.mark.usefixtures("one_thread")


def data(n=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randn(n, 3, 6, 6, generator=generator)
    images[torch.arange(n), labels] += 1
    return images, labels


BATCHES = [tuple(part) for part in zip(*(t.split(20) for t in data()), strict=True)]


def net(steps=10):
    """A small network that has learnt a little."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    images, labels = data(seed=1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


TRAINED = net()
WEIGHTS = ["0.weight", "3.weight", "7.weight"]
TOTAL = 162 + 270 + 15


def trained():
    return copy.deepcopy(TRAINED)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def gone(masks):
    return masks.total - sum(masks.kept.values())


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_every_criterion(criterion, compensate, sparsity):
    model = trained()
    before = state(model)
    result = prune(
        model, BATCHES, sparsity, criterion=criterion, compensate=compensate, damping=0.01, seed=4
    )
    masks = result.masks
    assert list(masks) == WEIGHTS
    assert masks.total == TOTAL
    assert gone(masks) == round(sparsity * TOTAL)
    masks.verify(model)
    for name, value in model.state_dict().items():
        if name not in masks:
            assert torch.equal(value, before[name])
        elif not compensate or sparsity in (0, 1):
            assert torch.equal(value, before[name] * masks[name])
    if compensate and 0 < sparsity < 1:
        assert any((state(model)[n] != before[n] * masks[n]).any() for n in WEIGHTS)

    # By hand.
    by_hand = trained()
    fisher = collect(by_hand, BATCHES)
    scores = score(by_hand, fisher, criterion, 0.01, seed=4)
    want = rank(scores, sparsity)
    assert masks == want
    assert all(torch.equal(result.scores[name], scores[name]) for name in WEIGHTS)
    if compensate:
        report = fastsal.compensate(by_hand, fisher, want, 0.01)
    want.apply(by_hand)
    assert_same(model, state(by_hand))

    needs_fisher = CRITERIA[criterion].needs_fisher or compensate
    needs_damping = CRITERIA[criterion].needs_damping or compensate
    (entry,) = result.history
    assert entry.round == 1
    assert entry.sparsity == masks.sparsity
    assert entry.samples == (64 if needs_fisher else 0)
    assert entry.damping == (0.01 if needs_damping else None)
    assert entry.damping_evidence == []
    assert entry.predicted_increase == (report.total if compensate else None)
    assert set(entry.seconds) == {"statistics", "damping", "prune"}
    assert all(seconds >= 0 for seconds in entry.seconds.values())
    recipe = masks.recipe
    assert (recipe["criterion"], recipe["rounds"], recipe["compensate"]) == (
        criterion,
        1,
        compensate,
    )
    assert (recipe["sparsity"], recipe["seed"], recipe["block_size"]) == (sparsity, 4, 64)


def test_defaults():
    a, b = trained(), trained()
    default = prune(a, BATCHES, 0.5)
    explicit = prune(
        b, BATCHES, sparsity=0.5, criterion="obs-greedy", rounds=1, compensate=True, damping="auto"
    )
    assert default.masks == explicit.masks
    assert_same(a, state(b))


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.7, 0.9])
@pytest.mark.parametrize("d", [5, 15, 25, 35, 45, 1005])
def test_counts_are_those_of_the_sparsity_asked_for(d, sparsity):
    """Halves of a weight round as `round(sparsity * d)` does."""
    model = nn.Sequential(nn.Linear(d, 1, bias=False))
    result = prune(model, None, sparsity, criterion="magnitude", compensate=False)
    assert gone(result.masks) == round(sparsity * d)
    assert result.masks.recipe["sparsity"] == sparsity


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_without_images(criterion):
    model = trained()
    result = prune(model, None, 0.5, criterion=criterion, compensate=False)
    assert gone(result.masks) == round(0.5 * TOTAL)
    result.masks.verify(model)


@pytest.mark.parametrize(
    "arguments",
    [
        {"scope": "layer"},
        {"scope": "erk"},
        {"floor": 0.2},
        {"pattern": "1:2"},
        {"parameters": ["3.*", "7.weight"]},
        {"block_size": None},
        {"precision": "float64"},
        {"samples": 30},
    ],
)
def test_arguments_reach_their_place(arguments):
    model, by_hand = trained(), trained()
    result = prune(model, BATCHES, 0.5, damping=0.01, **arguments)
    ranking = {k: v for k, v in arguments.items() if k in ("scope", "floor", "pattern")}
    fisher = collect(by_hand, BATCHES, **{k: v for k, v in arguments.items() if k not in ranking})
    if "pattern" in arguments:
        masks = fastsal.rank_pattern(by_hand, fisher, arguments["pattern"], damping=0.01)
    else:
        masks = rank(score(by_hand, fisher, "obs-greedy", 0.01), 0.5, **ranking)
    assert result.masks == masks
    fastsal.compensate(by_hand, fisher, masks, 0.01)
    assert_same(model, state(by_hand))
    assert result.history[0].samples == arguments.get("samples", 64)


def test_a_pattern_needs_no_sparsity():
    result = prune(trained(), BATCHES, pattern="1:3", damping=0.01)
    assert gone(result.masks) == sum(
        int((~m).sum()) for m in rank(result.scores, pattern="1:3").values()
    )


# Rounds.


@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_rounds(monkeypatch, criterion, compensate, scope):
    seen = []

    def watch(scores, sparsity, **arguments):
        masks = rank(scores, sparsity, **arguments)
        seen.append((sparsity, masks))
        return masks

    monkeypatch.setattr("fastsal.pruning.process.rank", watch)
    model = trained()
    result = prune(
        model,
        BATCHES,
        0.8,
        criterion=criterion,
        compensate=compensate,
        scope=scope,
        rounds=4,
        damping=0.01,
    )
    rounds = seen
    goals = [1 - 0.2 ** (r / 4) for r in range(1, 5)]
    assert [s for s, _ in rounds] == pytest.approx(goals)
    assert rounds[-1][0] == 0.8
    for (_, earlier), (_, later) in itertools.pairwise(rounds):
        for name in earlier:
            assert not (later[name] & ~earlier[name]).any(), "a pruned weight came back"
    assert [e.round for e in result.history] == [1, 2, 3, 4]
    if scope == "global":
        reached = [gone(masks) for _, masks in rounds]
        assert reached == [round(goal * TOTAL) for goal in goals]
        assert [e.sparsity for e in result.history] == [m.sparsity for _, m in rounds]
    assert result.masks == rounds[-1][1]
    result.masks.verify(model)


def test_rounds_by_hand():
    model, by_hand = trained(), trained()
    result = prune(model, BATCHES, 0.8, rounds=3, damping=0.01)
    masks, increases = None, []
    for r in (1, 2, 3):
        fisher = collect(by_hand, BATCHES)
        scores = score(by_hand, fisher, "obs-greedy", 0.01, masks=masks)
        new = rank(scores, 1 - (1 - 0.8) ** (r / 3) if r < 3 else 0.8)
        increases.append(fastsal.compensate(by_hand, fisher, new, 0.01, before=masks).total)
        masks = new
    assert result.masks == masks
    assert_same(model, state(by_hand))
    assert [e.predicted_increase for e in result.history] == increases
    assert result.masks.recipe["damping"] == [0.01] * 3
    one = prune(trained(), BATCHES, 0.8, damping=0.01)
    assert one.masks != result.masks


# The choice of damping.


def test_damping_auto_takes_the_least_held_out_loss():
    model = trained()
    result = prune(model, BATCHES, 0.6, precision="float64")
    (entry,) = result.history
    dampings, losses = zip(*entry.damping_evidence, strict=True)
    assert list(dampings) == sorted(dampings)
    assert len(dampings) >= 3
    assert entry.damping == dampings[min(range(len(losses)), key=losses.__getitem__)]
    assert len(set(losses)) > 1, "dampings differ"
    assert entry.samples == 64
    assert result.masks.recipe["damping"] == [entry.damping]

    # By hand: one image in eight is held out, and joins the statistics afterwards.
    images, labels = data()
    out = held_out_mask(64)
    assert int(out.sum()) == 8
    by_hand = trained().eval()
    fisher = collect(by_hand, [(images[~out], labels[~out])], precision="float64")
    grid = candidates(mean_diagonal(fisher))
    best = grid.index(entry.damping)
    assert set(grid[max(0, best - 1) : best + 2]) <= set(dampings) <= set(grid)
    for damping, loss in entry.damping_evidence:
        again = trained().eval()
        masks = rank(score(again, fisher, "obs-greedy", damping), 0.6)
        fastsal.compensate(again, fisher, masks, damping)
        with torch.no_grad():
            want = F.cross_entropy(again(images[out]), labels[out])
        assert loss == pytest.approx(float(want), rel=1e-3)
    # Which of the two is kept is a matter of the machine's last digits; each is tested below.
    used = collect(by_hand, [(images, labels)], precision="float64")
    if not entry.held_out_joined:
        used = fisher
    scores = score(by_hand, used, "obs-greedy", entry.damping)
    for name in WEIGHTS:
        torch.testing.assert_close(result.scores[name], scores[name], rtol=1e-3, atol=1e-9)


def test_damping_auto_in_rounds():
    result = prune(trained(), BATCHES, 0.8, rounds=3)
    first, *others = result.history
    best = min((loss, damping) for damping, loss in first.damping_evidence)
    assert first.damping == best[1]
    assert [e.damping_evidence for e in others] == [[], []]
    assert {e.damping for e in result.history} == {best[1]}
    assert {e.samples for e in result.history} == {64}
    assert result.masks.recipe["damping"] == [best[1]] * 3
    # It is chosen for the last goal, not for the first step.
    (once,) = prune(trained(), BATCHES, 0.8).history
    assert first.damping_evidence == once.damping_evidence


@pytest.mark.parametrize("worse", [True, False])
def test_what_was_measured_stays_where_more_images_make_it_worse(worse, monkeypatch):
    calls = []
    true_loss = HeldOut.mean_loss
    (plain,) = prune(trained(), BATCHES, 0.6).history
    tried = len(plain.damping_evidence)

    def loss(held, model):
        # The last call, after the candidates, is on the statistics of all images.
        value = true_loss(held, model) + (len(calls) >= tried) * (1 if worse else -1)
        calls.append((value, state(model)))
        return value

    monkeypatch.setattr(HeldOut, "mean_loss", loss)
    model = trained()
    (entry,) = prune(model, BATCHES, 0.6).history
    assert entry.held_out_joined is not worse
    least = dict(entry.damping_evidence)[entry.damping]
    assert_same(model, dict(calls)[least] if worse else calls[-1][1])


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_damping_auto_holds_nothing_out_where_nothing_is_damped(criterion):
    model, other = trained(), trained()
    result = prune(model, BATCHES, 0.5, criterion=criterion, compensate=False)
    (entry,) = result.history
    assert (entry.damping, entry.damping_evidence) == (None, [])
    assert entry.samples == (64 if criterion == "taylor" else 0)
    fixed = prune(other, BATCHES, 0.5, criterion=criterion, compensate=False, damping=3.0)
    assert fixed.masks == result.masks


def test_candidates_scale_with_the_gradients():
    fisher = fastsal.BlockFisher({"w": (4,)}, precision="float64")
    fisher.update({"w": torch.full((3, 4), 1e-3)})
    grid = candidates(mean_diagonal(fisher))
    assert grid == sorted(grid)
    assert min(grid) < 1e-6 < max(grid)
    dead = fastsal.BlockFisher({"w": (4,)})
    dead.update({"w": torch.zeros(3, 4)})
    assert min(candidates(mean_diagonal(dead))) > 0


def choice_among(losses):
    """Choose among dampings whose loss is a number, or an error of the factorization."""
    current = []

    def prune_with(damping):
        current[:] = [damping]
        if isinstance(losses[damping], Exception):
            raise losses[damping]

    return choose_damping(list(losses), prune_with, lambda: losses[current[0]])


def test_choose_damping():
    failed = FactorizationError("damping: no")
    choice = choice_among({0.1: 3.0, 0.2: 1.0, 0.3: failed, 0.4: 1.0, 0.5: math.inf})
    assert [d for d, _ in choice.evidence] == [0.3, 0.4, 0.5]
    assert choice.damping == 0.4
    assert math.isnan(choice.evidence[0][1])
    # The smaller of equals.
    assert choice_among({0.1: 2.0, 0.2: 1.0, 0.3: 1.0, 0.4: 1.5}).damping == 0.2


@pytest.mark.parametrize("count", range(1, 8))
def test_choose_damping_of_one_valley_finds_its_bottom(count):
    for best in range(count):
        losses = {float(1 + i): abs(i - best) + 0.5 for i in range(count)}
        choice = choice_among(losses)
        assert choice.damping == 1 + best
        tried = [d for d, _ in choice.evidence]
        assert tried == sorted(tried)
        assert {1.0 + i for i in (best - 1, best, best + 1) if 0 <= i < count} <= set(tried)


@pytest.mark.parametrize("usable", range(7))
def test_choose_damping_finds_the_only_one_that_can_be_factored(usable):
    losses = {float(1 + i): FactorizationError("no") for i in range(7)} | {1.0 + usable: 2.0}
    assert choice_among(losses).damping == 1 + usable


def test_choose_damping_without_a_usable_one():
    with pytest.raises(FactorizationError, match="damping: no"):
        choice_among({0.3: FactorizationError("damping: no")})
    with pytest.raises(DataError, match="held-out images is NaN"):
        choice_among({0.1: math.nan, 0.2: math.nan})


def test_held_out_loss_is_the_mean_over_samples():
    model = trained().train()
    images, labels = data(10)
    before = state(model)

    def loss(out, labels):
        return F.cross_entropy(out, labels, reduction="none")

    held = HeldOut.of(model, [(images[:7], labels[:7]), (images[7:], labels[7:])], loss)
    with torch.no_grad():
        want = F.cross_entropy(trained().eval()(images), labels)
        own = trained().eval()(images).softmax(1)
    assert held.samples == 10
    assert held.mean_loss(model) == pytest.approx(float(want))
    # Without labels the model's own outputs stand in, of when the images were held out.
    held = HeldOut.of(model, [(images, None)], loss)
    assert held.mean_loss(model) == pytest.approx(float(-(own * own.log()).sum(1).mean()), rel=1e-4)
    assert model.training
    assert_same(model, before)


def test_labels_may_be_missing_where_they_are_drawn():
    images, labels = data()
    results = []
    for batches in ([images], [(images, None)], [(images, labels)]):
        model = trained()
        result = prune(model, batches, 0.5, curvature="sampled", seed=2)
        assert gone(result.masks) == round(0.5 * TOTAL)
        assert result.history[0].samples == 64
        results.append((result.masks, state(model)))
    assert results[0][0] == results[1][0]
    assert_same(model, results[2][1])


def test_compensation_is_worth_it():
    """On the images that it saw, compensated networks lose less."""
    images, labels = data()

    def loss_of(compensate):
        model = trained()
        prune(model, BATCHES, 0.6, criterion="magnitude", compensate=compensate, damping=1e-3)
        with torch.no_grad():
            return float(F.cross_entropy(model.eval()(images), labels))

    assert loss_of(True) < loss_of(False)


# Refusals.


HELD = int(held_out_mask(64).nonzero()[3])


def nan_in(at):
    images, labels = data()
    images[at] = math.nan
    return [(images, labels)]


def wrong_label(at, label):
    images, labels = data()
    labels[at] = label
    return [(images, labels)]


def interrupted():
    yield BATCHES[0]
    raise KeyboardInterrupt


REFUSED = {
    "sparsity below": ({"sparsity": -0.1}, InvalidArgument, "^sparsity must be in .*, got -0.1"),
    "sparsity above": ({"sparsity": 1.1}, InvalidArgument, "^sparsity must be in .*, got 1.1"),
    "sparsity in rounds": ({"sparsity": 2, "rounds": 3}, InvalidArgument, "^sparsity must .*got 2"),
    "sparsity NaN": ({"sparsity": math.nan}, InvalidArgument, "^sparsity must be in .*, got nan"),
    "sparsity text": ({"sparsity": "0.5"}, InvalidArgument, "^sparsity must be a num.*, got '0.5'"),
    "sparsity missing": ({"sparsity": None}, InvalidArgument, "^sparsity must be in .*, got None"),
    "criterion": ({"criterion": "obs"}, InvalidArgument, "^criterion must be .*, got 'obs'"),
    "rounds 0": ({"rounds": 0}, InvalidArgument, "^rounds must be at least 1, got 0"),
    "rounds 1.5": ({"rounds": 1.5}, InvalidArgument, "^rounds must be an integer, got 1.5"),
    "rounds of a pattern": ({"rounds": 2, "pattern": "2:4"}, InvalidArgument, "^rounds must be 1 "),
    "damping 0": ({"damping": 0.0}, InvalidArgument, "^damping must be .*, got 0.0"),
    "damping NaN": ({"damping": math.nan}, InvalidArgument, "^damping must be .*, got nan"),
    "damping text": ({"damping": "best"}, InvalidArgument, "^damping must be .*, got 'best'"),
    "samples 0": ({"samples": 0}, InvalidArgument, "^samples must be at least 1, got 0"),
    "samples -1": ({"samples": -1}, InvalidArgument, "^samples must be at least 1, got -1"),
    "samples too many": ({"samples": 65}, DataError, "^samples must be at most .*got 65"),
    "scope": ({"scope": "here"}, InvalidArgument, "^scope must be .*, got 'here'"),
    "pattern": ({"pattern": "4:2", "sparsity": None}, InvalidArgument, "^pattern must .*got '4:2'"),
    "pattern and sparsity": ({"pattern": "1:4"}, InvalidArgument, "^sparsity must be None or 0.75"),
    "floor": ({"floor": 2}, InvalidArgument, r"^floor must be in \[0, 1\], got 2"),
    "floor and sparsity": ({"floor": 0.6}, InvalidArgument, "^sparsity 0.5 prunes"),
    "block size": ({"block_size": 0}, InvalidArgument, "^block_size must be at least 1, got 0"),
    "curvature": ({"curvature": "none"}, InvalidArgument, "^curvature must be"),
    "loss": ({"loss": "l2"}, InvalidArgument, "^loss must be"),
    "parameters": ({"parameters": "x"}, UnknownParameter, "^parameters: 'x'"),
    "no batches": ({"batches": None}, InvalidArgument, "^batches must be .*, got None"),
    "empty": ({"batches": []}, DataError, "^batches must contain at least one batch"),
    "iterator": ({"batches": iter(BATCHES), "rounds": 2}, InvalidArgument, "^batches must be iter"),
    "too few to hold out": (
        {"samples": 7}, InvalidArgument, "^batches must have at least 8 samples.*damping",
    ),
    "NaN image": ({"batches": nan_in(20), "damping": 0.1}, NonFiniteGradient, "^sample 20: "),
    "NaN image held out": ({"batches": nan_in(HELD)}, NonFiniteGradient, "loss must be finite"),
    "label": (
        {"batches": wrong_label(9, 3), "damping": 0.1},
        DataError,
        "^labels must be .*got 3 for sample 9",
    ),
    "label held out": ({"batches": wrong_label(HELD, 3)}, DataError, "^labels must be .*got 3"),
    "label held out below": ({"batches": wrong_label(HELD, -100)}, DataError, "^labels .*got -100"),
    "labels missing": (
        {"batches": [(data()[0], None)], "curvature": "empirical"},
        DataError,
        "^labels must be given",
    ),
    "interrupt": ({"batches": interrupted()}, KeyboardInterrupt, None),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_errors_leave_the_model_as_it_was(case):
    arguments, error, message = REFUSED[case]
    model = trained().train()
    model[1].eval()
    before, modes = state(model), [m.training for m in model.modules()]
    arguments = {"batches": BATCHES, "sparsity": 0.5, **arguments}
    with pytest.raises(error, match=message):
        prune(model, **arguments)
    assert_same(model, before)
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("how", [{"sparsity": 0.5}, {"max_loss_increase": 0.5}], ids=str)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("no memory")], ids=str)
def test_errors_after_the_last_round_give_all_weights_back(how, error, monkeypatch):
    def stopped(*_):
        raise error

    monkeypatch.setattr(fastsal.Masks, "in_use", stopped)
    model = trained()
    before = state(model)
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        prune(model, BATCHES, **how, damping=0.1)
    assert_same(model, before)


def test_an_iterator_is_enough_for_one_round():
    a, b = trained(), trained()
    prune(a, iter(BATCHES), 0.5)
    prune(b, BATCHES, 0.5)
    assert_same(a, state(b))


@pytest.mark.parametrize("damping", ["auto", 0.01])
def test_errors_in_a_later_round_give_all_weights_back(damping):
    class Fails:
        rounds = 0

        def __iter__(self):
            self.rounds += 1
            if self.rounds == 3:
                raise OSError("the disk is gone")
            return iter(BATCHES)

    model = trained()
    before = state(model)
    with pytest.raises(OSError, match="the disk is gone"):
        prune(model, Fails(), 0.8, rounds=4, damping=damping)
    assert_same(model, before)


@pytest.mark.parametrize("step", ["score", "rank", "moves"])
def test_errors_in_any_step_give_all_weights_back(monkeypatch, step):
    model = trained()
    before = state(model)
    original = getattr(fastsal.pruning.process, step)
    calls = []

    def fails(*args, **arguments):
        calls.append(1)
        if len(calls) == 3:
            raise FactorizationError("damping: no")
        return original(*args, **arguments)

    monkeypatch.setattr(fastsal.pruning.process, step, fails)
    with pytest.raises(FactorizationError):
        prune(model, BATCHES, 0.8, rounds=4, damping=0.01)
    assert_same(model, before)


@pytest.mark.parametrize("damping", ["auto", 0.01])
def test_modes_and_randomness_are_left_alone(damping):
    model = trained().train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    prune(model, BATCHES, 0.5, rounds=2, damping=damping, criterion="random")
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
