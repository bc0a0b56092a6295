"""A calibration under way, kept in the store, so that one that was stopped goes on where it was."""

from __future__ import annotations

import logging
from pathlib import Path
from time import monotonic

from deploykit.calibration.statistics import Statistics
from deploykit.errors import CalibrationError
from deploykit.spec import Preprocessing
from deploykit.store import Address, Store

SAVE_SECONDS = 5.0
"""How much work a stop loses at most."""

STATISTICS = "statistics.npz"

logger = logging.getLogger(__name__)


class Checkpoint:
    """The statistics of one calibration, which are removed when its plan is made.

    Nothing that goes wrong with them stops a calibration: it starts anew, or is not kept, and a log line says so.
    """

    def __init__(self, store: Store, where: Address) -> None:
        self._store = store
        self._where = where
        self._saved = monotonic()

    def started(self, preprocessing: Preprocessing | None) -> Statistics:
        """Return what a stopped calibration has found; empty statistics where there was none."""
        with self._store.found(self._where) as folder:
            if folder is None:
                return Statistics(preprocessing)
            try:
                return Statistics.load(folder / STATISTICS, preprocessing)
            except (CalibrationError, OSError) as error:
                logger.warning("The stopped calibration starts anew, because %s", error)
        self.remove()
        return Statistics(preprocessing)

    def keep(self, statistics: Statistics) -> None:
        """Save the statistics when `SAVE_SECONDS` have gone by since they were saved."""
        if monotonic() - self._saved < SAVE_SECONDS:
            return

        def save(folder: Path) -> None:
            statistics.save(folder / STATISTICS)

        self._store.put(self._where, save)
        self._saved = monotonic()

    def remove(self) -> None:
        """Forget it."""
        self._store.remove(self._where)
