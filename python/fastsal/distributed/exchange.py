"""Send gradients, or partial sums of them, to the ranks that own the sums.

By default rows (gradients of single samples) are sent. Rows are `4 d` bytes per sample, packed sums
`2 (B + 1) d` bytes once: from more than `(B + 1) / 2` samples per rank on, sums are fewer bytes.
But then a rank holds sums of the whole model, which is `ranks` times the memory, and sums round
differently from those of one process; with rows the masks are equal bit for bit. To that end a
micro-batch is never split, as kernels of PyTorch round differently for another number of samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastsal.data.batches import Pair, in_micro_batches
from fastsal.distributed.ranks import Ranks
from fastsal.errors import DataError
from fastsal.fisher.collection.passes import PassSettings, add_pass
from fastsal.fisher.model_sums import ModelSums
from fastsal.fisher.parts import Part, by_key, shapes_of
from fastsal.fisher.rows import flat_rows
from fastsal.utils.progress import Report


class StepSums:
    """Adds rows to sums in steps of a fixed number of samples, whatever the sizes they arrive in.

    Args:
        sums: Sums of this rank's parts.
        step: Rows of one addition.
        expected: Total number of samples, if known.
    """

    def __init__(self, sums: ModelSums, step: int, expected: int | None) -> None:
        self._sums = sums
        self._step = step
        self._expected = expected
        self._rest: dict[str, Tensor] = {}
        self._waiting = 0

    def add(self, key: str, rows: Tensor) -> None:
        """Add the rows `[n, d]` of a part, once per micro-batch."""
        rest = self._rest.pop(key, None)
        if rest is not None:
            rows = torch.cat([rest, rows])
        seen = self._sums.rows_seen
        steps = len(rows) // self._step * self._step
        for start in range(0, steps, self._step):
            self._sums.rows_seen = seen + start  # so that an error names the sample
            self._sums.add(key, rows[start : start + self._step], self._expected)
        self._sums.rows_seen = seen
        if len(rows) > steps:
            self._rest[key] = rows[steps:].clone()

    def end_micro_batch(self, n: int) -> None:
        """Count `n` samples, after the rows of all parts were added."""
        self._waiting += n
        while self._waiting >= self._step:
            self._sums.count(self._step)
            self._waiting -= self._step

    def flush(self) -> None:
        """Add the rows of an incomplete step."""
        for key, rows in self._rest.items():
            self._sums.add(key, rows, self._expected)
        self._rest.clear()
        if self._waiting:
            self._sums.count(self._waiting)
        self._waiting = 0


class OwnerSink:
    """Sends the rows of each part to its owner, which joins them in the order of the samples.

    Args:
        sink: Takes rows of this rank's parts.
        shares: Parts of every rank.
        ranks: The processes.
    """

    def __init__(self, sink: StepSums, shares: Sequence[Sequence[Part]], ranks: Ranks) -> None:
        self._sink = sink
        self._ranks = ranks
        self._owned: dict[str, list[tuple[int, Part]]] = {}
        for owner, share in enumerate(shares):
            for part in share:
                self._owned.setdefault(part.name, []).append((owner, part))
        self._counts = [0] * ranks.size
        self._most = 0

    def begin(self, counts: Sequence[int]) -> None:
        """Set the number of samples of each rank in the next micro-batches."""
        self._counts = list(counts)
        self._most = max(counts)

    def __call__(self, name: str, rows: Tensor) -> None:
        """Send this rank's rows `[n, *shape]` of a parameter."""
        flat = flat_rows(rows)
        missing = self._most - flat.shape[0]
        for owner, part in self._owned[name]:
            piece = flat[:, part.start : part.stop]
            if missing > 0:
                piece = torch.nn.functional.pad(piece, (0, 0, 0, missing))
            found = self._ranks.gather(piece[: self._most], owner)
            if found is not None:
                joined = torch.cat([p[:n] for p, n in zip(found, self._counts, strict=True)])
                self._sink.add(part.key, joined.cpu())

    def end_micro_batches(self) -> None:
        """Count the samples of the micro-batches, after the rows of all parameters were sent."""
        self._sink.end_micro_batch(sum(self._counts))

    def flush(self) -> None:
        """Add the rows of an incomplete step."""
        self._sink.flush()


def add_sharded_pass(
    settings: PassSettings,
    sums: ModelSums,
    shares: Sequence[Sequence[Part]],
    ranks: Ranks,
    pairs: Iterable[Pair],
    report: Report,
) -> None:
    """Make one pass over the images; ranks run the micro-batches of one process in turn.

    Args:
        settings: Settings of the pass, the same on all ranks.
        sums: Sums of this rank's parts, by their keys.
        shares: Parts of every rank.
        ranks: The processes.
        pairs: Images and labels, the same on all ranks.
        report: Called with the number of samples done.

    Raises:
        DataError: Ranks have different numbers of samples.
    """
    steps = StepSums(sums, settings.step, settings.samples)
    sink = OwnerSink(steps, shares, ranks)
    total = 0
    with settings.engine(part.name for share in shares for part in share) as engine:
        micro_batches = in_micro_batches(pairs, settings.micro_batch, settings.step)
        while dealt := list(itertools.islice(micro_batches, ranks.size)):
            if total == 0:
                engine.prepare(*dealt[0])
            counts = [len(images) for images, _ in dealt] + [0] * (ranks.size - len(dealt))
            total += sum(counts)
            sink.begin(counts)
            with engine.rewinding():
                engine.skip(sum(counts[: ranks.rank]))
                # All ranks must take part: one without a micro-batch runs the last, and drops it.
                engine.run(*dealt[min(ranks.rank, len(dealt) - 1)], sink)
            engine.skip(sum(counts))
            sink.end_micro_batches()
            report(total, settings.samples)
        sink.flush()
    _check_same(ranks, total)


def _check_same(ranks: Ranks, samples: int) -> None:
    """Raise DataError unless all ranks have the same number of samples."""
    seen = ranks.all_gather(samples)
    if len(set(seen)) > 1:
        raise DataError(f"batches must be the same on every rank, got {seen} samples")


def add_summed_pass(
    settings: PassSettings,
    sums: ModelSums,
    shares: Sequence[Sequence[Part]],
    ranks: Ranks,
    pairs: Iterable[Pair],
    report: Report,
) -> None:
    """Make one pass in which each rank sums the whole model over its samples, then add the sums.

    Args:
        settings: Settings of the pass, the same on all ranks.
        sums: Sums of this rank's parts, by their keys.
        shares: Parts of every rank.
        ranks: The processes.
        pairs: Images and labels, the same on all ranks.
        report: Called with the number of samples done.

    Raises:
        DataError: Ranks have different numbers of samples.
    """
    every = by_key([part for share in shares for part in share])
    shapes = {name: tuple(p.shape) for name, p in settings.chosen.items()}
    own = ModelSums.empty(shapes_of(every, shapes), sums.block_size, sums.precision)
    total = 0

    def mine() -> Iterator[Pair]:
        nonlocal total
        size = settings.micro_batch * ranks.size
        for images, labels in in_micro_batches(pairs, size, size):
            total += len(images)
            some = slice(ranks.rank, None, ranks.size)
            if len(images[some]):
                yield images[some], None if labels is None else labels[some]

    add_pass(settings, own, every, mine(), report)
    for owner, share in enumerate(shares):
        for part in share:
            found = own.parameters[part.key]
            packed = ranks.reduce(torch.from_numpy(found.fold()), owner)
            plain = ranks.reduce(torch.from_numpy(found.sums), owner)
            if owner == ranks.rank:
                sums.parameters[part.key].add_sums(packed.numpy(), plain.numpy())
            found.clear()
    _check_same(ranks, total)
    sums.count(total)
