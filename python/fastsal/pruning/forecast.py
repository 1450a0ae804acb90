"""Estimate the memory, disk, passes and time of collecting statistics and of pruning.

Memory is that of the plan that a run follows. Time is measured in a trial of a few passes, sums and
eliminations, and extrapolated. On the meta device, where nothing can run, the operations of a pass
are counted and divided by the rate of a matrix product on this machine.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

import fastsal._core as _core
from fastsal.data.batches import Batches, first_images
from fastsal.data.class_order import size_of
from fastsal.data.unpacking import BatchRule, ruled
from fastsal.fisher.collection.budget import sums_nbytes
from fastsal.fisher.collection.pass_memory import drop, first_samples
from fastsal.fisher.collection.prepare import prepare
from fastsal.fisher.collection.work import Work
from fastsal.fisher.memory_plan import MemoryPlan, Share, Use
from fastsal.fisher.model_sums import ModelSums
from fastsal.fisher.parts import Part, by_key, uncut
from fastsal.gradients import select_parameters
from fastsal.models.classifier import using_head
from fastsal.pruning.criteria import CRITERIA
from fastsal.pruning.criteria.scoring import find_criterion
from fastsal.pruning.damping import Damping, Multiple, parse_damping
from fastsal.pruning.memory_use import tuning_bytes, use_by_pruning
from fastsal.utils.choices import CriterionName
from fastsal.utils.live_memory import trim_heap
from fastsal.utils.mapped_files import FileArrays
from fastsal.utils.numbers import whole

# Weights in the trial of sums and eliminations.
_TRIED = 2**20
# Bytes that are written to the scratch folder to measure its speed.
_WRITTEN = 2**27
# Seconds of a trial from which on time is taken to be proportional to the samples.
_LONG = 0.5
# Steps with `damping="auto"`: one for each candidate, and one with the best.
_DAMPINGS = 8


def plan_memory(
    model: nn.Module,
    batches: Batches,
    *,
    samples: int | None = None,
    prunes: bool = True,
    criterion: CriterionName = "obs-greedy",
    compensate: bool = True,
    damping: float | str = "auto",
    rounds: int = 1,
    parameters: str | Sequence[str] | None = None,
    memory_budget: int | str | None = None,
    scratch: str | os.PathLike[str] | None = None,
    ranks: int = 1,
    calibrate: bool = True,
    batch: BatchRule | None = None,
    **options: Any,
) -> MemoryPlan:
    """Estimate memory, disk, passes and time of `collect` or `prune` with the same arguments.

    Memory and passes are those of the plan that the run then follows; time is extrapolated from a
    trial of a few passes and sums on this machine. On the meta device the operations of a pass are
    counted instead, and divided by the rate of a matrix product.

    Args:
        model: The model; it may be on the meta device.
        batches: Pairs `(images, labels)`; a few samples are enough if `samples` is given.
        samples: Number of samples of the run; None counts those of `batches`.
        prunes: Whether `prune` is planned; False plans `collect` alone.
        criterion: Criterion of `prune`.
        compensate: Whether kept weights are updated.
        damping: `λ`: a positive number, a multiple such as `"0.1x"`, or `"auto"`.
        rounds: Number of rounds.
        parameters: Names or patterns of parameters; None for the default.
        memory_budget: Bytes that may be added to the process, or text such as `"8GiB"`; None plans
            everything in memory.
        scratch: Folder for statistics that exceed the budget. It need not exist; the speed is then
            that of the folder for temporary files.
        ranks: Number of processes of a job (`fastsal.distributed`). Memory and time are those of
            one process, with the speed of this machine and without communication.
        calibrate: Whether time is estimated.
        batch: Function from a batch to `(images, labels)`, for batches of another form.
        options: Other arguments of `fastsal.collect`.

    Returns:
        The plan. Its `seconds` has the entries `"statistics"`, `"prune"` and `"total"`.

    Raises:
        InvalidArgument: An argument is invalid, or the budget is too small.
        UnknownParameter: A name or pattern of `parameters` matches nothing.
        DataError: Images or labels are invalid.
        UnsupportedLayer: The gradients of a weight for single samples cannot be computed.
    """
    batches = ruled(batches, batch)
    ranks, rounds = whole("ranks", ranks, 1), whole("rounds", rounds, 1)
    samples = None if samples is None else whole("samples", samples, 1)
    chosen = select_parameters(model, parameters)
    entry = CRITERIA[find_criterion(criterion)]
    parsed: Damping | None = None
    if prunes and (entry.needs_damping or compensate):
        parsed = parse_damping(damping, auto=True)
    is_auto = parsed == "auto"
    images = 0
    if is_auto and (memory_budget is None or isinstance(batches, Iterator)):
        first, again = first_images(batches, samples)
        batches = batches if again is None else again
        images = 0 if first is None else tuning_bytes(first, samples or size_of(batches))
    if memory_budget is None:
        options["use"] = Use(images=images)
    elif prunes:
        options["use"] = use_by_pruning(
            chosen,
            is_auto=is_auto,
            rounds=rounds,
            has_scratch=scratch is not None,
            needs_fisher=entry.needs_fisher,
            joins=is_auto,
            ranks=ranks,
            images=images,
        )
    options["needs_blocks"] = prunes and (entry.needs_blocks or compensate)
    with using_head(model, options.pop("head", None)):
        start = time.perf_counter()
        work = prepare(
            model,
            batches,
            samples=None if prunes else samples,
            parameters=parameters,
            memory_budget=memory_budget,
            scratch=scratch,
            is_dry=True,
            share=Share(ranks),
            **options,
        )
        planning = time.perf_counter() - start
        count = samples or sum(len(images) for images, _ in work.source())
        steps = rounds + (_DAMPINGS - 1 if is_auto else 0)
        times = rounds
        if work.plan.place == "recomputed":  # for scores, compensation, and the mean diagonal
            means = rounds if isinstance(parsed, Multiple) else int(is_auto)
            times = steps * (entry.needs_fisher + compensate) + means
        if ranks > 1:
            work = replace(work, plan=replace(work.plan, sent=_sent(work, count, times, steps)))
        if not calibrate:
            return work.plan
        disk = _Disk.of(work.plan)
        seconds = {"statistics": times * _statistics_seconds(work, count, disk)}
        if memory_budget is not None:
            seconds["statistics"] += rounds * planning  # each collection makes its own plan
        if prunes:
            each = _step_seconds(work, entry.needs_damping, disk, compensate=compensate)
            seconds["prune"] = steps * each / ranks
        seconds["total"] = sum(seconds.values())
        return replace(work.plan, seconds={name: round(s, 1) for name, s in seconds.items()})


def _sent(work: Work, samples: int, times: int, steps: int) -> dict[str, int]:
    """Return the bytes that one process sends at most, by kind of data.

    Args:
        work: The planned collection.
        samples: Number of samples.
        times: Number of collections.
        steps: Number of pruning steps.
    """
    from fastsal.fisher.collection.traffic import costs

    how = work.how
    paper = costs(
        {name: tuple(p.shape) for name, p in how.chosen.items()},
        samples,
        work.plan.ranks,
        block_size=work.sums.block_size,
        micro_batch=how.micro_batch,
        step=how.step,
    )
    return {
        "rows": times * max(paper.rows),
        "weights": steps * max(paper.weights),
        "masks": steps * max(paper.masks),
    }


def _statistics_seconds(work: Work, samples: int, disk: _Disk) -> float:
    """Return the time of all passes over the images."""
    how, plan = work.how, work.plan
    groups = plan.groups
    is_meta = next(iter(how.chosen.values())).device.type == "meta"
    tried = sorted({0, len(groups) - 1})
    times = {i: _counted(work) if is_meta else _timed(work, groups[i]) for i in tried}
    total = 0.0
    for i in range(len(groups)):
        # Deeper layers need less of the backward pass; interpolate between the measured groups.
        share = i / max(1, len(groups) - 1)
        first, last = times[tried[0]], times[tried[-1]]
        probe, micro = ((1 - share) * a + share * b for a, b in zip(first, last, strict=True))
        total += probe + samples / (how.micro_batch * plan.ranks) * micro
    weights = sum(p.numel() for p in how.chosen.values())
    total += _sums_seconds(work, samples) * weights / plan.ranks
    # The system writes in the background.
    return max(total, disk.write * plan.disk)


def _timed(work: Work, group: Sequence[Part]) -> tuple[float, float]:
    """Return the seconds of the probe and of a micro-batch, for the gradients of some parts."""
    how = work.how
    given = work.source.first()
    with how.engine({part.name for part in group}) as engine:
        two = first_samples(*given, 2)
        probe = _seconds(lambda: engine.prepare(*two))
        first = _seconds(lambda: engine.run(*two, drop))
        if first > _LONG:
            micro = first / 2 * how.micro_batch
        else:
            every = first_samples(*given, how.micro_batch)
            engine.run(*every, drop)  # the first run is slower
            micro = _seconds(lambda: engine.run(*every, drop))
    trim_heap()
    return probe, micro


def _counted(work: Work) -> tuple[float, float]:
    """Return the same from the operations of a forward pass; a backward pass has twice as many."""
    from torch.utils.flop_counter import FlopCounterMode

    images, _ = work.source.first()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work.how.model(images[:1].to("meta"))
    a = torch.randn(1024, 1024, dtype=torch.float32, device="cpu")
    rate = 2 * 1024**3 / min(_seconds(lambda: a @ a) for _ in range(5))
    one = 3 * counter.get_total_flops() / rate
    return 2.5 * one, one * work.how.micro_batch


def _sums_seconds(work: Work, samples: int) -> float:
    """Return the seconds per weight of adding the rows of all samples and of storing the sums."""
    how, sums, plan = work.how, work.sums, work.plan
    size = min(sums.block_size or 64, _TRIED)
    count = _TRIED // size * size
    parts = by_key(uncut({"tried": (count,)}))
    trial = ModelSums.empty({"tried": (count,)}, size, sums.precision)
    if plan.place == "file":
        nbytes = sums_nbytes(trial, parts["tried"], how.samples) + 256
        trial.move_to_file(FileArrays(_folder(plan), nbytes), how.samples)
    rows = torch.ones(min(how.step, samples), count, dtype=torch.float32, device="cpu")
    steps = -(-samples // len(rows))
    # The first gradients are stored as rows, which become blocks when there are more of them.
    tried = min(steps, (size + 1) // 2 // len(rows) + 3)
    some = trial.like(parts)
    seconds = [_seconds(lambda: some.add("tried", rows, how.samples)) for _ in range(tried)]
    total = sum(seconds) + (steps - tried) * seconds[-1]
    if plan.place == "file":
        total += _seconds(lambda: trial.merge_parts(some, parts))
    return total / count


@dataclass(frozen=True)
class _Disk:
    """Seconds per byte of writing to and reading from the scratch folder."""

    write: float = 0.0
    read: float = 0.0

    @classmethod
    def of(cls, plan: MemoryPlan) -> _Disk:
        """Measure the scratch folder, if the plan uses it."""
        if plan.place != "file":
            return cls()
        piece = np.random.default_rng(0).bytes(2**22)
        with tempfile.TemporaryFile(dir=_folder(plan)) as file:

            def write() -> None:
                for _ in range(_WRITTEN // len(piece)):
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())

            def read() -> None:
                file.seek(0)
                while file.read(len(piece)):
                    pass

            written = _seconds(write)
            if hasattr(os, "posix_fadvise"):  # else the data is read from the page cache
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return cls(written / _WRITTEN, _seconds(read) / _WRITTEN)


def _folder(plan: MemoryPlan) -> str:
    """Return the scratch folder, or the one for temporary files where it does not exist."""
    if plan.scratch and os.path.isdir(plan.scratch):
        return plan.scratch
    return tempfile.gettempdir()


def _step_seconds(work: Work, is_second_order: bool, disk: _Disk, *, compensate: bool) -> float:
    """Return the seconds of scoring, ranking and compensating the whole model once."""
    size = min(work.sums.block_size or 64, 512)
    count = _TRIED // size * size
    generator = np.random.default_rng(0)
    given = generator.standard_normal((8, count), np.float32)
    packed = np.zeros(_core.packed_len(count, size), np.float32)
    sums = np.zeros(count, np.float32)
    _core.accumulate(given, "float32", size, packed, sums)
    weights = generator.standard_normal(count, np.float32)
    parameter = [(packed, count, 8.0, None)]
    total = 0.0
    if is_second_order:
        total += _seconds(lambda: _core.eliminate(parameter, [weights], size, 1e-3))
    if compensate:
        kept = np.arange(count) % 10 >= 7
        total += _seconds(lambda: _core.compensate(parameter, [weights], [kept], size, 1e-3))
    total += _seconds(lambda: _core.prune_smallest([weights], count // 2, []))
    seconds = total / count * sum(p.numel() for p in work.how.chosen.values())
    return seconds + (1 + compensate) * disk.read * work.plan.disk


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
