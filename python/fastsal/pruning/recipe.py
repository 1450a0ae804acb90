"""A recipe: how to prune, the same for every round and every sparsity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastsal.data.batches import Batches
from fastsal.errors import InvalidArgument
from fastsal.pruning.criteria import CRITERIA
from fastsal.pruning.criteria.scoring import find_criterion
from fastsal.pruning.damping import Damping, Multiple, parse_damping
from fastsal.pruning.history import Round
from fastsal.pruning.masks.joint import LARGEST_GROUP
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.masks.patterns import Pattern
from fastsal.utils.numbers import SEEDS, whole


@dataclass(frozen=True)
class Recipe:
    """How to prune: what is the same for every round and every sparsity.

    Attributes:
        criterion: Name of a criterion.
        compensate: Whether kept weights are updated.
        damping: `λ`, a multiple of the mean diagonal of F, or `"auto"`.
        ranking: Arguments of `fastsal.rank` other than scores and sparsity.
        parameters: Names or patterns of parameters; None for the default.
        block_size: Block size of the statistics.
        seed: Seed of all random numbers.
    """

    criterion: str
    compensate: bool
    damping: Damping
    ranking: Mapping[str, Any]
    parameters: str | Sequence[str] | None
    block_size: int | None
    seed: int

    @classmethod
    def of(
        cls,
        criterion: str,
        *,
        compensate: bool,
        damping: float | str,
        ranking: Mapping[str, Any],
        parameters: str | Sequence[str] | None,
        block_size: int | None,
        seed: int,
    ) -> Recipe:
        """Return a recipe, with numbers and damping in their parsed forms.

        Raises:
            InvalidArgument: An argument is invalid.
        """
        entry = CRITERIA[find_criterion(criterion)]
        is_damped = entry.needs_damping or compensate
        parsed: Damping = "auto"  # not used without an inverse
        if is_damped or isinstance(damping, str):
            parsed = parse_damping(damping, auto=True)
        return cls(
            criterion=criterion,
            compensate=compensate,
            damping=parsed,
            ranking=ranking,
            parameters=parameters,
            block_size=None if block_size is None else whole("block_size", block_size, 1),
            seed=whole("seed", seed, *SEEDS),
        )

    @property
    def needs_fisher(self) -> bool:
        """Whether statistics are needed, for scores or for compensation."""
        return CRITERIA[self.criterion].needs_fisher or self.compensate

    @property
    def needs_damping(self) -> bool:
        """Whether `λ` is needed, for scores or for compensation."""
        return CRITERIA[self.criterion].needs_damping or self.compensate

    @property
    def needs_blocks(self) -> bool:
        """Whether the packed blocks of F are needed, also where gradients are kept."""
        return CRITERIA[self.criterion].needs_blocks or self.compensate or self.joins_groups

    @property
    def is_auto(self) -> bool:
        """Whether `λ` is chosen on held-out images."""
        return self.needs_damping and self.damping == "auto"

    @property
    def joins_groups(self) -> bool:
        """Whether groups of a pattern are compared by their joint cost."""
        pattern = self.ranking["pattern"]
        if pattern is None or not CRITERIA[self.criterion].needs_damping:
            return False
        return Pattern.parse(pattern).m <= LARGEST_GROUP

    def check(
        self,
        rounds: int,
        batches: Batches | None,
        *,
        recalibrate: bool,
        reconstruct: bool = False,
        refits: bool = False,
    ) -> None:
        """Raise InvalidArgument for arguments that exclude each other."""
        if rounds > 1 and (pattern := self.ranking["pattern"]) is not None:
            raise InvalidArgument(f"rounds must be 1 with pattern {pattern!r}, got {rounds}")
        if self.needs_fisher and batches is None:
            cause = "compensation" if self.compensate else repr(self.criterion)
            raise InvalidArgument(f"batches must be images and labels for {cause}, got None")
        if recalibrate and not self.needs_fisher:
            raise InvalidArgument(
                "recalibrate must be False without statistics: it is tested on images held out of "
                "them; use another criterion, or compensate=True"
            )
        for stage, is_on in (("reconstruct", reconstruct), ("refit", refits)):
            if is_on and batches is None:
                raise InvalidArgument(f"batches must be images for {stage}, got None")
        repeats = rounds > 1 or recalibrate or reconstruct or refits
        if repeats and isinstance(batches, Iterator):
            raise InvalidArgument(
                "batches must be iterable several times (a list or a DataLoader) with rounds > 1, "
                "recalibrate=True, reconstruct=True or refit, got an iterator"
            )

    def asked(self) -> dict[str, Any]:
        """Return the recipe as values by which a checkpoint recognizes its run."""
        damping = str(self.damping) if isinstance(self.damping, Multiple) else self.damping
        return {
            **vars(self),
            "damping": damping,
            "needs_fisher": self.needs_fisher,
            "needs_damping": self.needs_damping,
        }

    def sign(self, masks: Masks, history: Sequence[Round], **further: Any) -> None:
        """Record in the masks how they were made, with further facts that are not None."""
        if "costs" in self.ranking:
            masks.recipe["budget"] = "macs"
        masks.recipe.update({k: v for k, v in further.items() if v is not None})
        masks.recipe.update(
            criterion=self.criterion,
            rounds=len(history),
            compensate=self.compensate,
            damping=[entry.damping for entry in history],
            samples=history[-1].samples,
            block_size=self.block_size,
            seed=self.seed,
        )
