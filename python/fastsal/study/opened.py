"""The model and the source that the cells of a process use at the moment."""

from __future__ import annotations

from collections.abc import Mapping

from fastsal.study.backbones import Backbone, open_backbone
from fastsal.study.cells import Cell
from fastsal.study.images import source_images
from fastsal.study.settings.schema import Study
from fastsal.study.sources import PruningSource
from fastsal.study.store import Store
from fastsal.study.turns import Group, group_of
from fastsal.transfer.tasks import Task


class Opened:
    """The backbone and the source of the last cell, which the next cell may share.

    Args:
        study: Settings of the study.
        store: Results folder.
        tasks: All tasks.
    """

    def __init__(self, study: Study, store: Store, tasks: Mapping[str, Task]) -> None:
        self._study, self._store, self._tasks = study, store, tasks
        self._model: str | None = None
        self._group: Group | None = None
        self._backbone: Backbone | Exception | None = None
        self._source: PruningSource | Exception | None = None

    def source(self, cell: Cell) -> PruningSource | Exception:
        """Return the source of a cell, or the error that prevented opening it.

        Cells of one model share the backbone; cells of one source, seed and curvature share
        statistics. Those of the last cell are given up first.
        """
        if self._source is None or group_of(cell) != self._group:
            self._source = None
            try:
                self._source = self._opened(self._backbone_of(cell), cell)
            except Exception as error:  # of the user's model too: recorded with its cells
                self._source = error
            self._group = group_of(cell)
        return self._source

    def _backbone_of(self, cell: Cell) -> Backbone:
        if self._backbone is None or cell.model.name != self._model:
            self._backbone = None
            try:
                self._backbone = open_backbone(
                    self._study, cell.model, self._tasks, self._store.heads
                )
            except Exception as error:
                self._backbone = error
            self._model = cell.model.name
        if isinstance(self._backbone, Exception):
            raise self._backbone
        return self._backbone

    def _opened(self, backbone: Backbone, cell: Cell) -> PruningSource:
        images = source_images(cell.source, self._tasks, cell.seed)
        return PruningSource(self._study, cell.source, backbone, images, cell.seed, cell.curvature)
