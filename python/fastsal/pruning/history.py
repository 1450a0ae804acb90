"""The record of a pruning: one `Round` for each round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastsal.pruning.recalibration import Recalibration
from fastsal.pruning.reconstruction_result import Reconstruction
from fastsal.pruning.refit_result import RefitResult

# Left out of `Round.as_dict` where they are None.
_OPTIONAL = (
    "held_out_joined",
    "memory_plan",
    "reconstruction",
    "recalibration",
    "refit",
    "ranks",
)


@dataclass(frozen=True)
class RankTraffic:
    """Data that one process of a distributed job exchanged with the others.

    Attributes:
        size: Number of processes.
        sent_bytes: Kind of data to the bytes that this process sent.
        in_flight_bytes: Most bytes of gradients that this process received at once.
    """

    size: int
    sent_bytes: dict[str, int]
    in_flight_bytes: int


_KINDS: dict[str, Callable[..., Any]] = {
    "reconstruction": Reconstruction,
    "recalibration": Recalibration,
    "refit": RefitResult,
    "ranks": RankTraffic,
}


@dataclass(frozen=True)
class Round:
    """What one round of pruning did.

    Attributes:
        round: Number of the round, from 1.
        sparsity: Fraction of the weights that are pruned after it.
        samples: Samples of its statistics; 0 without statistics.
        damping: Absolute `λ`; None where neither criterion nor compensation has one.
        damping_evidence: Pairs `(λ, held-out loss)` that `damping="auto"` chose from, in the first
            round.
        predicted_increase: Predicted increase of the loss, `δᵀAδ / 2`; None without compensation.
        seconds: Name of a step to its wall-clock time.
        held_out_joined: Whether the images held out for `damping="auto"` were added to the
            statistics that the result was pruned with; None where none were held out.
        memory_plan: With `memory_budget`, the plan that was followed, as
            `fastsal.MemoryPlan.as_dict` returns it.
        reconstruction: With `reconstruct=True`: its effect on the held-out loss.
        recalibration: In the last round with `recalibrate=True`: its effect on the held-out loss.
        refit: With `refit`, in the last round or in each: what refitting did.
        ranks: In the last round of a distributed job: its number of processes and its traffic.
    """

    round: int
    sparsity: float
    samples: int | float
    damping: float | None
    damping_evidence: list[tuple[float, float]]
    predicted_increase: float | None
    seconds: dict[str, float]
    held_out_joined: bool | None = None
    memory_plan: dict[str, Any] | None = None
    reconstruction: Reconstruction | None = None
    recalibration: Recalibration | None = None
    refit: RefitResult | None = None
    ranks: RankTraffic | None = None

    def __repr__(self) -> str:
        facts = [f"sparsity={self.sparsity:.4f}", f"samples={self.samples}"]
        if self.damping is not None:
            facts.append(f"damping={self.damping:.3g}")
        if self.damping_evidence:
            facts.append(f"chosen from {len(self.damping_evidence)}")
        if self.predicted_increase is not None:
            facts.append(f"predicted_increase={self.predicted_increase:.3g}")
        if self.refit is not None:
            facts.append(f"refit {self.refit.before:.3g} -> {self.refit.after:.3g}")
        facts.append(f"{sum(self.seconds.values()):.1f} s")
        return f"Round({self.round}, {', '.join(facts)})"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the last six attributes only where they are not None."""
        found = {**vars(self)}
        for name in _KINDS:
            if found[name] is not None:
                found[name] = asdict(found[name])
        return {k: v for k, v in found.items() if v is not None or k not in _OPTIONAL}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Round:
        """Return the round that `as_dict` describes, also after it was read from JSON.

        Raises:
            TypeError: A key is missing or unknown.
        """
        found = dict(values)
        for name, kind in _KINDS.items():
            if found.get(name) is not None:
                found[name] = kind(**found[name])
        evidence = [(damping, loss) for damping, loss in found.pop("damping_evidence", [])]
        return cls(damping_evidence=evidence, **found)
