"""Tables and models that take tokens, against the loop over single samples, float64."""

# ruff: noqa: E501 (one case a line)
from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastsal
from fastsal.errors import DataError, InvalidArgument, UnsupportedLayer
from fastsal.gradients import GradientEngine, per_sample_gradients, select_parameters

from . import oracle
from .oracle import loop, randomize

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS, WIDTH, CLASSES = 7, 4, 3


class Fn(oracle.Fn):
    """A function of modules, then fixed uneven weights to logits."""

    def forward(self, tokens):
        x = super().forward(tokens).flatten(1)
        ramp = torch.arange(x.shape[1] * CLASSES, dtype=x.dtype).view(x.shape[1], CLASSES)
        return torch.sin(3 * x) @ torch.cos(ramp)


def table(**kw):
    return nn.Embedding(WORDS, WIDTH, **kw)


def alone(m, t):
    return m.e(t)


def tied():
    e, a = table(), nn.Linear(WIDTH, WORDS)
    a.weight = e.weight
    return Fn(lambda m, t: m.a(torch.tanh(m.e(t))), e=e, a=a)


def transposed(m, t):
    return m.e(t.t()).transpose(0, 1)


def with_positions(m, t):
    return m.e(t) * m.p(torch.arange(t.shape[1]))


def with_row_of_positions(m, t):
    return m.e(t) * m.p(torch.arange(t.shape[1])[None])


def with_own_positions(m, t):
    return m.e(t) * m.p(torch.arange(t.shape[1]).expand_as(t))


def mean_then_layer(m, t):
    return m.a(m.e(t).mean(1))


# name: (module, shape of a sample, parameters, plan of the first of them)
FAST = {
    "alone": (lambda: Fn(alone, e=table()), (5,), "e.weight", "embedding"),
    "one token a sample": (lambda: Fn(alone, e=table()), (), "e.weight", "embedding"),
    "two axes of tokens": (lambda: Fn(alone, e=table()), (2, 3), "e.weight", "embedding"),
    "sparse": (lambda: Fn(alone, e=table(sparse=True)), (5,), "e.weight", "embedding"),
    "padded": (lambda: Fn(alone, e=table(padding_idx=2)), (9,), "e.weight", "embedding"),
    "padded, from the end": (lambda: Fn(lambda m, t: F.embedding(t, m.e.weight, padding_idx=-2), e=table()), (9,), "e.weight", "embedding"),
    "tied": (tied, (5,), None, "linear+embedding"),
    "looked up twice": (lambda: Fn(lambda m, t: m.e(t) * m.e((t + 1) % WORDS), e=table()), (5,), "e.weight", "embedding"),
    "part of the tokens": (lambda: Fn(lambda m, t: m.e(t[:, 1:3]), e=table()), (5,), "e.weight", "embedding"),
    "tokens folded": (lambda: Fn(lambda m, t: m.e(t.view(-1)).view(*t.shape, -1), e=table()), (5,), "e.weight", "embedding"),
    "sequence first": (lambda: Fn(transposed, e=table()), (5,), "e.weight", "embedding"),
    "sequence first, L = 2": (lambda: Fn(transposed, e=table()), (2,), "e.weight", "embedding"),
    "sequence first, L = n": (lambda: Fn(transposed, e=table()), (4,), "e.weight", "embedding"),
    "own positions": (lambda: Fn(with_own_positions, e=table(), p=table()), (5,), ["e.weight", "p.weight"], "embedding"),
    "layer after a table": (lambda: Fn(mean_then_layer, e=table(), a=nn.Linear(WIDTH, 5)), (5,), None, "linear"),
    "table and layer": (lambda: Fn(mean_then_layer, e=table(), a=nn.Linear(WIDTH, 5)), (5,), ["e.weight", "a.weight"], "embedding"),
    "one-hot tokens": (lambda: Fn(lambda m, t: m.a(F.one_hot(t, WORDS).double()), a=nn.Linear(WORDS, 5)), (5,), None, "linear"),
    "checkpoint": (lambda: Fn(lambda m, t: checkpoint(lambda z: m.b(m.a(z).relu()), m.e(t), use_reentrant=False), e=table(), a=nn.Linear(WIDTH, 5), b=nn.Linear(5, 2)), (5,), None, "linear"),
}  # fmt: skip

FALLBACK = {
    "shared positions": (lambda: Fn(with_positions, e=table(), p=table()), (5,), "p.weight", "first axis"),
    "shared positions, L = 2": (lambda: Fn(with_positions, e=table(), p=table()), (2,), "p.weight", "first axis"),
    "shared positions, L = n": (lambda: Fn(with_positions, e=table(), p=table()), (4,), "p.weight", "first axis"),
    "row of positions": (lambda: Fn(with_row_of_positions, e=table(), p=table()), (4,), "p.weight", "first axis"),
    "table as a matrix": (lambda: Fn(lambda m, t: m.e(t) @ m.e.weight.t(), e=table()), (5,), "e.weight", "used by"),
    "sparse table as a matrix": (lambda: Fn(lambda m, t: m.e(t) + m.e.weight.sum(0), e=table(sparse=True)), (5,), "e.weight", "used by"),
}  # fmt: skip


def check(make, shape, parameters, n=4, dtype=torch.int64, **options):
    torch.manual_seed(0)
    model = randomize(make()).double()
    tokens = torch.randint(WORDS, (n, *shape), dtype=dtype)
    labels = torch.arange(n) % CLASSES
    parts = {}
    with GradientEngine(model, select_parameters(model, parameters), **options) as engine:
        engine.run(tokens, labels, lambda name, r: parts.setdefault(name, []).append(r.clone()))
    expected = loop(model, tokens, labels, list(parts))
    for name, rows in parts.items():
        want = expected[name]
        torch.testing.assert_close(torch.cat(rows), want.to_dense(), rtol=1e-9, atol=1e-12)
        assert want.to_dense().any()
    return engine.operations


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("case", FAST)
def test_rule_equals_loop(case, micro_batch):
    make, shape, parameters, operation = FAST[case]
    plan = check(make, shape, parameters, micro_batch=micro_batch)
    assert next(iter(plan.values())) in (operation, "+".join(reversed(operation.split("+"))))
    assert not any("torch.func" in how for how in plan.values())


@pytest.mark.parametrize("case", FALLBACK)
def test_fallback_equals_loop(case):
    make, shape, parameters, reason = FALLBACK[case]
    plan = check(make, shape, parameters)
    assert all(p.startswith("torch.func: ") and reason in p for p in plan.values()), plan


@pytest.mark.parametrize("case", ["alone", "tied", "own positions"])
def test_batch_of_one_and_short_integers(case):
    make, shape, parameters, _ = FAST[case]
    check(make, shape, parameters, n=1)
    check(make, shape, parameters, dtype=torch.int32)


def test_padding_has_no_gradient():
    model = Fn(alone, e=table(padding_idx=2)).double()
    rows = per_sample_gradients(
        model, torch.tensor([[2, 1, 2], [2, 2, 2]]), torch.tensor([0, 1]), parameters="e.weight"
    )["e.weight"]
    assert rows[0, 1].any()
    assert not rows[:, 2].any()
    assert not rows[1].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 0.1}, r"e\.weight: max_norm changes the weight"),
        ({"scale_grad_by_freq": True}, r"e\.weight: scale_grad_by_freq divides"),
    ],
)
def test_what_tables_are_refused(options, message):
    model = Fn(alone, e=table(**options)).double()
    before = model.e.weight.detach().clone()
    with pytest.raises(UnsupportedLayer, match=message):
        per_sample_gradients(
            model, torch.tensor([[1, 2]]), torch.tensor([0]), parameters="e.weight"
        )
    assert torch.equal(model.e.weight, before)


def test_a_table_that_is_not_selected_may_be_of_any_kind():
    make = lambda: Fn(  # noqa: E731
        mean_then_layer, e=table(max_norm=1.0, scale_grad_by_freq=True), a=nn.Linear(WIDTH, 5)
    )
    assert check(make, (5,), None) == {"a.weight": "linear"}


@pytest.mark.parametrize(
    "mix", [lambda x: x - x[:1], lambda x: x + x.roll(1, 0), lambda x: (x - x.mean(0)) / 2]
)
def test_samples_that_mix_are_refused(mix):
    make = lambda: Fn(lambda m, t: m.a(mix(m.e(t))), e=table(), a=nn.Linear(WIDTH, 5))  # noqa: E731
    for parameters in (None, "e.weight"):
        with pytest.raises(UnsupportedLayer, match="other samples"):
            check(make, (5,), parameters)


@pytest.mark.parametrize(
    "lookup",
    [
        lambda m, t: m.e(t.long()),
        lambda m, t: m.e((t + 1) % WORDS),
        lambda m, t: m.e(t.view(-1)).view(*t.shape, -1),
        lambda m, t: m.e(input=t[:, 1:]),
    ],
)
def test_samples_that_mix_are_seen_at_any_lookup(lookup):
    make = lambda: Fn(lambda m, t: m.a(lookup(m, t).cumsum(0)), e=table(), a=nn.Linear(WIDTH, 5))  # noqa: E731
    with pytest.raises(UnsupportedLayer, match="other samples"):
        check(make, (5,), None, dtype=torch.int32)


def test_integers_that_are_not_tokens():
    model, labels = Fn(alone, e=table()), torch.tensor([0, 1])
    for images in (
        torch.zeros(2, 1, 3, 3, dtype=torch.long),
        torch.zeros(2, 3, dtype=torch.uint8),
        torch.zeros(2, 3, dtype=torch.bool),
        torch.tensor(3),
    ):
        with pytest.raises(DataError, match="token ids"):
            per_sample_gradients(model, images, labels, parameters="e.weight")


# Selection.


def test_tables_are_selected_by_name_or_pattern():
    model = nn.ModuleDict(
        {
            "emb": nn.ModuleDict({"word": table(), "norm": nn.LayerNorm(WIDTH)}),
            "pos": table(),
            "fc": nn.Linear(WIDTH, 5),
        }
    )
    assert list(select_parameters(model)) == ["fc.weight"]
    assert list(select_parameters(model, "*")) == ["fc.weight"]
    assert list(select_parameters(model, "emb.word.weight")) == ["emb.word.weight"]
    assert list(select_parameters(model, "emb.*")) == ["emb.word.weight"]
    assert list(select_parameters(model, ["*", "pos.*"])) == ["pos.weight", "fc.weight"]
    assert list(select_parameters(model, "emb.norm.*")) == ["emb.norm.weight", "emb.norm.bias"]


def test_a_tied_table_is_the_weight_of_its_layer():
    model = tied()
    assert list(select_parameters(model)) == ["e.weight"]
    assert list(select_parameters(model, "a.weight")) == ["e.weight"]
    with pytest.raises(InvalidArgument, match="must select at least one parameter"):
        select_parameters(model, ["*", "!a.weight"])


# A small decoder.


def decoder(*, tied, seed=0):
    path = Path(__file__).resolve().parents[3] / "examples" / "transformer.py"
    spec = importlib.util.spec_from_file_location("transformer_example", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    torch.manual_seed(seed)
    model = module.Decoder(words=11, width=8, layers=2, heads=2, context=16, tied=tied)
    return randomize(model, seed), module.next_token_loss


def sequences(n=5, length=6):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (n, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("extra", [[], ["wte.weight"], ["wpe.weight"]])
def test_decoder(is_tied, extra):
    model, loss = decoder(tied=is_tied)
    model = model.double()
    tokens, labels = sequences()
    names = list(select_parameters(model, ["*", *extra]))
    parts = {}
    with GradientEngine(model, select_parameters(model, names), loss=loss, micro_batch=2) as engine:
        engine.run(tokens, labels, lambda name, r: parts.setdefault(name, []).append(r.clone()))
    rows = {name: torch.cat(parts[name]) for name in names}
    torch.testing.assert_close(
        rows, loop(model, tokens, labels, names, loss), rtol=1e-9, atol=1e-12
    )
    slow = [name for name, how in engine.operations.items() if how.startswith("torch.func")]
    assert slow == [name for name in extra if name == "wpe.weight"]
    assert ("wte.weight" in names) == (is_tied or "wte.weight" in extra)


@pytest.mark.parametrize("is_tied", [True, False])
def test_decoder_is_pruned(is_tied):
    model, loss = decoder(tied=is_tied)
    batches = [sequences(8), sequences(8)]
    result = fastsal.prune(
        model, batches, 0.5, loss=loss, block_size=8, parameters=["*", "wte.weight"]
    )
    assert result.masks.sparsity == pytest.approx(0.5, abs=1e-3)
    assert result.history[0].samples == 16
    result.masks.verify(model)
    assert {"wte.weight", "blocks.0.q.weight"} <= set(result.masks)
    outputs = model(sequences(2)[0])
    assert outputs.isfinite().all()


def test_decoder_without_labels():
    model, _ = decoder(tied=False)
    tokens = sequences(16)[0]
    fisher = fastsal.collect(model, [tokens], curvature="features", block_size=8)
    assert "head.weight" not in fisher.names
    assert all(v.any() for v in fisher.diagonal().values())
    result = fastsal.prune(model, [tokens], 0.5, curvature="features", block_size=8)
    result.masks.verify(model)


def test_logits_of_sequences_need_a_loss():
    model, _ = decoder(tied=False)
    tokens, labels = sequences()
    with pytest.raises(InvalidArgument, match=r"logits \[2, C\].*pass loss="):
        fastsal.collect(model, [(tokens, labels[:, 0])])
    with pytest.raises(DataError, match="pass loss="):
        fastsal.collect(model, [(tokens, labels)])
