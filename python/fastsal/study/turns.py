"""Which cell of a study comes next in this process, beside other processes on the same folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fastsal.study.cells import Cell
from fastsal.study.folder_format import FAILED
from fastsal.study.store import Store
from fastsal.utils.claims import Claim, Claims

Result = dict[str, Any]
Group = tuple[str, str, int, str]  # cells that share statistics


class Turns:
    """The cells of a study that have no result yet, and the results of the others.

    Each process prefers cells whose statistics it has, then statistics that no other process works
    on, of its own model and then of the model with the fewest processes. Only then does it help
    with cells of others, from their end. Cells in which a process was killed come last, so that one
    that needs too much memory does not keep the others from being computed.

    Args:
        store: Results folder.
        claims: Claims of this process on cells.
        cells: All cells of the study, in the order of the grid.
        retry: Whether cells that failed before are computed again.

    Attributes:
        results: `{key: result}` of all cells; None for those without a result.
        left: `{key: cell}` of the cells without a result, or to compute again.
        computed: Keys of the cells that this process has computed.
        others: `{key: process}` of the cells that other processes work on, at the last look.
    """

    def __init__(self, store: Store, claims: Claims, cells: Sequence[Cell], *, retry: bool) -> None:
        self._store = store
        self._claims = claims
        self.results: dict[str, Result | None] = {cell.key: store.read(cell.key) for cell in cells}
        self._before = {
            key: found
            for key, found in self.results.items()
            if found is not None and retry and found["status"] == FAILED
        }
        self.left = {
            cell.key: cell
            for cell in cells
            if self.results[cell.key] is None or cell.key in self._before
        }
        self._order = {cell.key: i for i, cell in enumerate(cells)}
        self._group: Group | None = None
        self.computed: list[str] = []
        self.others: dict[str, str] = {}

    def next(self) -> Cell | None:
        """Claim a cell; None if there is none that can be claimed now."""
        self.refresh()
        if not self.left:
            return None
        claims = self._claims.all()
        self._note_others(claims)
        for cell in self._by_preference(claims):
            if not self._claims.take(cell.key):
                continue
            self._look(cell.key)
            if cell.key not in self.left:  # finished by another process after the last look
                self._claims.finish(cell.key)
                continue
            self._group = group_of(cell)
            return cell
        return None

    def finish(self, cell: Cell, result: Result) -> None:
        """Store the result of a claimed cell, unless another process took it over."""
        if self._claims.is_mine(cell.key):
            self.results[cell.key] = self._store.write(cell.key, result)
            self.computed.append(cell.key)
            del self.left[cell.key]
        self._claims.finish(cell.key)

    def refresh(self) -> None:
        """Read the results that other processes have stored."""
        for key in self._store.keys() & self.left.keys():
            self._look(key)

    def _look(self, key: str) -> None:
        found = self._store.read(key)
        if found is not None and found != self._before.get(key):
            self.results[key] = found
            del self.left[key]

    def _note_others(self, claims: Mapping[str, Claim]) -> None:
        self.others = {
            key: self._claims.describe(claim)
            for key, claim in claims.items()
            if claim.is_held and key in self.left
        }

    def _by_preference(self, claims: Mapping[str, Claim]) -> list[Cell]:
        """Return the cells that nobody works on, the preferred ones first."""
        busy = [self.left[key] for key in self.others]
        busy_groups = {group_of(cell) for cell in busy}
        on_model = Counter(cell.model.name for cell in busy)
        mine = self._group

        def preference(cell: Cell) -> tuple[int, ...]:
            group, place = group_of(cell), self._order[cell.key]
            claim = claims.get(cell.key)
            was_killed = int(claim is not None and claim.owner != "")
            is_my_model = mine is not None and mine[0] == cell.model.name
            if group == mine:
                return was_killed, 0, 0, place
            if group not in busy_groups:
                return was_killed, 1 if is_my_model else 2, on_model[cell.model.name], place
            return was_killed, 3 if is_my_model else 4, on_model[cell.model.name], -place

        return sorted((c for k, c in self.left.items() if k not in self.others), key=preference)


def group_of(cell: Cell) -> Group:
    """Return what cells that share statistics have in common."""
    return cell.model.name, cell.source.name, cell.seed, cell.curvature
