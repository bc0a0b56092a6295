"""What one pass over the calibration images finds, in memory that does not grow with their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deploykit.arrays import Array, FloatArray
from deploykit.calibration.counting import CountedBatch
from deploykit.calibration.image_checks import ImageChecks, SeenImage
from deploykit.calibration.ranges import Histogram
from deploykit.errors import CalibrationError
from deploykit.npz import read_npz
from deploykit.spec import Preprocessing


class Statistics:
    """The histogram of each tensor, the mean of each probe, and what the images themselves look like.

    ``images`` and ``batches`` were added so far. Saved after a batch and loaded again, statistics go on
    to the same bits as without the stop.

    Args:
        preprocessing: what the images should have been normalised with; None leaves them unchecked.
    """

    def __init__(self, preprocessing: Preprocessing | None = None) -> None:
        self.images = 0
        self.batches = 0
        self.histograms: dict[str, Histogram] = {}
        self.checks = ImageChecks(preprocessing) if preprocessing else None
        self._sums: dict[str, npt.NDArray[np.float64]] = {}

    def update(self, images: FloatArray, tensors: Mapping[str, Array], probes: Mapping[str, Array]) -> None:
        """Add one batch.

        Args:
            images: ``(N, C, H, W)`` float32, as the network takes them.
            tensors: what needs a range, by name, each of any shape.
            probes: what is averaged over batches, by name, each of the same shape in every batch.

        Raises:
            CalibrationError: NaN or infinity in a tensor.
        """
        if self.checks:
            self.checks.update(images)
        for name, values in tensors.items():
            self.histograms.setdefault(name, Histogram()).update(values)
        for name, values in probes.items():
            self._sums[name] = self._sums.get(name, 0.0) + values.astype(np.float64)
        self.images += len(images)
        self.batches += 1

    def add(
        self, images: Sequence[SeenImage], tensors: Mapping[str, CountedBatch], probes: Mapping[str, FloatArray]
    ) -> None:
        """Add one batch that was counted elsewhere, as `update` would have counted it here; see `partial`."""
        if self.checks:
            for image in images:
                self.checks.add(image)
        for name, counted in tensors.items():
            self.histograms.setdefault(name, Histogram()).add(counted)
        for name, values in probes.items():
            self._sums[name] = self._sums.get(name, 0.0) + values.astype(np.float64)
        self.images += len(images)
        self.batches += 1

    def mean(self, probe: str) -> npt.NDArray[np.float32]:
        """Return the mean of a probe over all batches."""
        return (self._sums[probe] / self.batches).astype(np.float32)

    def save(self, path: Path) -> None:
        """Write everything as one ``.npz``.

        Raises:
            OSError: it cannot be written.
        """
        arrays: dict[str, Array] = {
            "seen": np.array([self.images, self.batches]),
            "tensors": np.array(list(self.histograms)),
            "probes": np.array(list(self._sums)),
        }
        arrays |= {f"tensor/{name}": histogram.state() for name, histogram in self.histograms.items()}
        arrays |= {f"probe/{name}": total for name, total in self._sums.items()}
        if self.checks:
            arrays |= {f"images/{name}": state for name, state in self.checks.state().items()}
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path, preprocessing: Preprocessing | None = None) -> Statistics:
        """Read what `save` wrote; nothing is unpickled.

        Raises:
            FileNotFoundError: it is not there.
            CalibrationError: it is damaged, or holds something else.
        """
        found = cls(preprocessing)
        try:
            stored = read_npz(path)
            found.images, found.batches = (int(number) for number in stored["seen"])
            for name in stored["tensors"]:
                found.histograms[str(name)] = Histogram.of(stored[f"tensor/{name}"])
            for name in stored["probes"]:
                found._sums[str(name)] = stored[f"probe/{name}"].astype(np.float64, copy=False)
            if found.checks:
                found.checks.restore({name: stored[f"images/{name}"] for name in found.checks.state()})
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CalibrationError(f"{path}: not the statistics of a calibration ({error!r}).") from error
        return found
