"""Plans that were made before: a plan is the same for every runtime, so a second export need not calibrate."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
from filelock import FileLock

import deploykit
from deploykit.cache import default_root
from deploykit.calibration.checkpoint import Checkpoint
from deploykit.calibration.plan import QuantizationPlan
from deploykit.errors import CalibrationError

logger = logging.getLogger(__name__)


class PlanCache:
    """A folder of plans, one a key; safe to use from several processes at once.

    Args:
        root: the folder; None: ``plans`` beside the engine cache's folder.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else default_root() / "plans"

    def get_or_make(self, key: str, make: Callable[[], QuantizationPlan]) -> QuantizationPlan:
        """The plan under ``key``; made once, whoever asks. A damaged one is made again.

        Where the folder cannot be written, the plan is made and not kept, which a log line says.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / f"{key}.lock")
            lock.acquire()
        except OSError as error:
            logger.warning("The plan is not kept, because %s cannot be written: %s", self.root, error)
            return make()
        try:
            found = self._read(key)
            if found is not None:
                return found
            plan = make()
            self._write(key, plan)
            self.checkpoint(key).remove()
            return plan
        finally:
            lock.release()

    def checkpoint(self, key: str) -> Checkpoint:
        """Where the calibration for a key is kept while it runs."""
        return Checkpoint(self.root / f"{key}.statistics")

    def _read(self, key: str) -> QuantizationPlan | None:
        entry = self.root / key
        if not entry.is_dir():
            return None
        try:
            plan = QuantizationPlan.load(entry)
        except CalibrationError as error:
            logger.warning("The cached plan %s is made again, because %s", entry, error)
            shutil.rmtree(entry, ignore_errors=True)
            return None
        logger.info("The plan %s was made before", key[:12])
        return plan

    def _write(self, key: str, plan: QuantizationPlan) -> None:
        """Whole or not at all: into a neighbour, which is then renamed."""
        try:
            with tempfile.TemporaryDirectory(dir=self.root, prefix="plan-", ignore_cleanup_errors=True) as scratch:
                written = Path(scratch) / key
                written.mkdir()
                plan.save(written)
                written.rename(self.root / key)
        except OSError as error:
            logger.warning("The plan is not kept, because %s cannot be written: %s", self.root, error)


def cache_key(key: str, model: ir.Model) -> str:
    """The digest of a plan's own key, of the graph that it is for, and of what makes plans."""
    digest = hashlib.sha256(f"{key}\n{deploykit.__version__}\n".encode())
    digest.update(ir.to_proto(model).SerializeToString(deterministic=True))
    return digest.hexdigest()
