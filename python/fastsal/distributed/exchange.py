"""Send gradients, or partial sums of them, to the ranks that own the sums.

By default rows (gradients of single samples) are sent. Rows are `4 d` bytes per sample, packed sums
`2 (B + 1) d` bytes once: from more than `(B + 1) / 2` samples per rank on, sums are fewer bytes.
But then a rank holds sums of the whole model, which is `ranks` times the memory, and sums round
differently from those of one process; with rows the masks are equal bit for bit. To that end a
micro-batch is never split, as kernels of PyTorch round differently for another number of samples.

All ranks exchange the rows of a round, one micro-batch each, in one order: that in which gradients
arrive for the first two images. Where they arrive otherwise, as a model may use other layers for
other images, rows wait for their turn; layers that a micro-batch does not use send zeros at theirs.
A rank that fails in a round sends zeros to its end, and tells the others when they meet ahead of
the next one.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastsal.data.batches import Pair, in_micro_batches
from fastsal.distributed.failures import is_told
from fastsal.distributed.ranks import Ranks
from fastsal.errors import DataError, FastsalError
from fastsal.fisher.collection.passes import PassSettings, add_pass
from fastsal.fisher.model_sums import ModelSums
from fastsal.fisher.parts import Part, by_key, shapes_of
from fastsal.fisher.rows import flat_rows
from fastsal.fisher.sinks.gathering import MANY
from fastsal.gradients.precision import row_dtype
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
        self._rest: dict[str, list[Tensor]] = {}
        self._waiting = 0

    def add(self, key: str, rows: Tensor) -> None:
        """Add the rows `[n, d]` of a part, once per micro-batch."""
        rest = self._rest.setdefault(key, [])
        held, seen = sum(map(len, rest)), self._sums.rows_seen
        if held == self._step:  # it has waited for more rows
            self._add_steps(key, torch.cat(rest), seen)
            rest.clear()
            held, seen = 0, seen + self._step
        steps = self._whole_steps(held + len(rows))
        if steps == 0:
            rest.append(rows.clone())
            return
        # Joined once a step: at every micro-batch, rows would be copied again and again.
        rows = torch.cat([*rest, rows]) if rest else rows
        rest.clear()
        self._add_steps(key, rows[:steps], seen)
        if len(rows) > steps:
            rest.append(rows[steps:].clone())

    def _add_steps(self, key: str, rows: Tensor, seen: int) -> None:
        """Add the rows of whole steps, of which `seen` samples came before."""
        counted = self._sums.rows_seen
        expected = MANY if self._expected is None else self._expected
        for start in range(0, len(rows), self._step):
            self._sums.rows_seen = seen + start  # so that an error names the sample
            self._sums.add(key, rows[start : start + self._step], expected)
        self._sums.rows_seen = counted

    def end_micro_batch(self, n: int) -> None:
        """Count `n` samples, after the rows of all parts were added."""
        self._waiting += n
        steps = self._whole_steps(self._waiting)
        for _ in range(0, steps, self._step):
            self._sums.count(self._step)
        self._waiting -= steps

    def _whole_steps(self, rows: int) -> int:
        """Return how many of some rows are added now.

        As in `RowGatherer`, a whole step waits until more rows come if their total is unknown.
        """
        return (rows - (self._expected is None)) // self._step * self._step

    def flush(self) -> None:
        """Add the rows of an incomplete step."""
        for key, rows in self._rest.items():
            if rows:
                self._sums.add(key, torch.cat(rows), self._expected)
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
        parameters: Name to parameter, of all parts.
        order: Names in the order in which all ranks send them.
    """

    def __init__(
        self,
        sink: StepSums,
        shares: Sequence[Sequence[Part]],
        ranks: Ranks,
        parameters: Mapping[str, Tensor],
        order: Iterable[str],
    ) -> None:
        self._sink = sink
        self._ranks = ranks
        self._parameters = parameters
        owned: dict[str, list[tuple[int, Part]]] = {name: [] for name in order}
        for owner, share in enumerate(shares):
            for part in share:
                owned[part.name].append((owner, part))
        self._turns = [turn for turns in owned.values() for turn in turns]
        self._next = len(self._turns)
        # Rows that arrived ahead of their turn; None for zeros.
        self._early: dict[str, Tensor | None] = {}
        self._counts = [0] * ranks.size
        self._most = 0
        self._drops = False

    def begin(self, counts: Sequence[int]) -> None:
        """Set the number of samples of each rank in the next round."""
        self._counts = list(counts)
        self._most = max(counts)
        self._next = 0
        self._early.clear()

    def __call__(self, name: str, rows: Tensor) -> None:
        """Send this rank's rows `[n, *shape]` of a parameter, or keep them until their turn."""
        flat = flat_rows(rows)
        if self._is_next(name):
            self._send(name, flat)
            self._send_early()
        else:
            self._early[name] = flat.clone()  # its memory is reused after this call

    def skip(self, name: str) -> None:
        """Send rows of zeros of a parameter that this rank's micro-batch does not use."""
        self._early[name] = None
        self._send_early()

    def _is_next(self, name: str) -> bool:
        return self._next < len(self._turns) and self._turns[self._next][1].name == name

    def _send_early(self) -> None:
        while self._next < len(self._turns):
            name = self._turns[self._next][1].name
            if name not in self._early:
                return
            self._send(name, self._early.pop(name))

    def _send(self, name: str, flat: Tensor | None) -> None:
        """Send the rows `[n, d]` of a parameter whose turn it is; None for zeros."""
        while self._is_next(name):
            owner, part = self._turns[self._next]
            found = self._ranks.gather(self._piece(part, flat), owner)
            self._next += 1  # before sums can fail, so that `abandon` begins with what is not sent
            if found is not None and not self._drops:
                joined = torch.cat([p[:n] for p, n in zip(found, self._counts, strict=True)])
                self._sink.add(part.key, joined.cpu())

    def _piece(self, part: Part, flat: Tensor | None) -> Tensor:
        """Return the rows of a part, as many as the rank with the most samples has."""
        if flat is None:
            p = self._parameters[part.name]
            return torch.zeros(self._most, len(part), dtype=row_dtype(p), device=p.device)
        missing = self._most - flat.shape[0]
        piece = flat[:, part.start : part.stop]
        if missing > 0:
            piece = torch.nn.functional.pad(piece, (0, 0, 0, missing))
        return piece[: self._most]

    def end_round(self) -> None:
        """Count the samples of the round, after the rows of all parameters were sent."""
        if self._next < len(self._turns):
            name = self._turns[self._next][1].name
            self.abandon()
            raise FastsalError(f"{name}: no rows were formed")  # an internal error
        self._sink.end_micro_batch(sum(self._counts))

    def abandon(self) -> None:
        """Take part in the rest of a round that fails on this rank, whose rows are dropped."""
        self._drops = True
        self._early.clear()
        while self._next < len(self._turns):
            self._send(self._turns[self._next][1].name, None)

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
    sink: OwnerSink | None = None
    total = 0
    with settings.engine(part.name for share in shares for part in share) as engine:
        micro_batches = in_micro_batches(pairs, settings.micro_batch, settings.step)
        while dealt := list(itertools.islice(micro_batches, ranks.size)):
            if sink is None:
                engine.prepare(*dealt[0])
                order = ranks.all_gather(engine.order)[0]
                sink = OwnerSink(steps, shares, ranks, settings.chosen, order)
            counts = [len(images) for images, _ in dealt]
            _check_same(ranks, total, dealt)
            sink.begin(counts + [0] * (ranks.size - len(dealt)))
            # All ranks must take part: one without a micro-batch runs the last, and drops it.
            mine = min(ranks.rank, len(dealt) - 1)
            with engine.rewinding():
                engine.skip(sum(counts[: ranks.rank]))
                engine.samples_seen = total + sum(counts[:mine])  # so that an error names the image
                try:
                    engine.run(*dealt[mine], sink)
                except BaseException as error:
                    if not is_told(error):
                        sink.abandon()
                    raise
            engine.skip(sum(counts))
            sink.end_round()
            total += sum(counts)
            report(total, settings.samples)
        if sink is not None:
            sink.flush()
    _check_same(ranks, total, [])


def _check_same(ranks: Ranks, done: int, dealt: Sequence[Pair]) -> None:
    """Raise DataError unless all ranks have the same samples next, as far as their labels tell.

    Args:
        ranks: The processes, which meet here ahead of every round.
        done: Number of samples of all earlier rounds.
        dealt: Micro-batches of the round; empty at the end of the batches.
    """
    total = done + sum(len(images) for images, _ in dealt)
    seen = ranks.all_gather((total, len(dealt), _labels_digest(dealt)))
    if len({count for count, _, _ in seen}) > 1 or len({len_ for _, len_, _ in seen}) > 1:
        counts = [count for count, _, _ in seen]
        raise DataError(f"batches must be the same on every rank, got {counts} samples")
    if len({digest for _, _, digest in seen}) > 1:
        raise DataError(
            f"batches must be the same on every rank, in the same order, but samples {done} to "
            f"{total - 1} have other labels; seed the generator of a DataLoader that shuffles"
        )


def _labels_digest(dealt: Iterable[Pair]) -> int:
    """Return a digest of integer labels; others may be rounded differently on another machine."""
    digest = 0
    for _, labels in dealt:
        if labels is not None and not (labels.is_floating_point() or labels.is_complex()):
            digest = zlib.crc32(labels.detach().cpu().contiguous().numpy().tobytes(), digest)
    return digest


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
            _check_same(ranks, total, [(images, labels)])
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
    _check_same(ranks, total, [])
    sums.count(total)
