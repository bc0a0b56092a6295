"""A calibration under way, kept on disk, so that one that was stopped goes on where it was."""

from __future__ import annotations

import logging
from pathlib import Path
from time import monotonic

from deploykit.calibration.statistics import Statistics
from deploykit.errors import CalibrationError
from deploykit.spec import Preprocessing

SAVE_SECONDS = 5.0
"""How much work a stop loses at most."""

logger = logging.getLogger(__name__)


class Checkpoint:
    """The statistics of one calibration in one file, which is removed when its plan is made.

    Nothing that goes wrong with the file stops a calibration: it starts anew, or is not kept, and a log
    line says so.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.partial")
        self._saved = monotonic()

    def started(self, preprocessing: Preprocessing | None) -> Statistics:
        """What a stopped calibration has found; empty statistics where there was none."""
        try:
            return Statistics.load(self._path, preprocessing)
        except FileNotFoundError:
            pass
        except CalibrationError as error:
            logger.warning("The stopped calibration starts anew, because %s", error)
            self.remove()
        return Statistics(preprocessing)

    def keep(self, statistics: Statistics) -> None:
        """Save the statistics when `SAVE_SECONDS` have gone by since they were saved."""
        if monotonic() - self._saved < SAVE_SECONDS:
            return
        try:
            statistics.save(self._partial)
            self._partial.replace(self._path)
        except OSError as error:
            logger.warning("A stopped calibration could not go on, because %s cannot be written: %s", self._path, error)
        self._saved = monotonic()

    def remove(self) -> None:
        """Forget it."""
        try:
            for path in (self._path, self._partial):
                path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s is of no more use and cannot be removed: %s", self._path, error)
