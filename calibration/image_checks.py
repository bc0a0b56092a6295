"""What is wrong with calibration images, told from the batches as they stream by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from deploykit.arrays import Array, FloatArray
from deploykit.spec import Preprocessing

ENOUGH_IMAGES = 16
"""With fewer different images, the ranges are those of these images and not of the network's work."""
SPREAD = 1.5
"""How far outside the range of normalised pixels the root mean square may lie."""


@dataclass(frozen=True, kw_only=True)
class SeenImage:
    """What the checks take of one image; ``constant``: each channel has one value."""

    digest: bytes
    constant: bool
    low: float
    high: float
    squares: float
    size: int


def look_at(image: FloatArray, *, hashed: bool = True) -> SeenImage:
    """Return what the checks take of an image, ``(C, H, W)`` float32; ``hashed``: with its digest."""
    return SeenImage(
        digest=hashlib.sha256(image.tobytes()).digest() if hashed else b"",
        constant=bool(np.ptp(image.reshape(len(image), -1), axis=1).max() == 0),
        low=float(image.min()),
        high=float(image.max()),
        squares=float(np.square(image, dtype=np.float64).sum()),
        size=image.size,
    )


class ImageChecks:
    """Statistics of all images of one calibration, in memory that does not grow with their number."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        mean, std = (np.asarray(values, np.float64) for values in (preprocessing.mean, preprocessing.std))
        self._low, self._high = float((-mean / std).min()), float(((1 - mean) / std).max())
        self._different: set[bytes] = set()  # digests, up to ENOUGH_IMAGES of them
        self._seen = 0
        self._constant = 0
        self._squares = 0.0
        self._values = 0
        self._least = np.inf
        self._most = -np.inf

    def update(self, batch: FloatArray) -> None:
        """Add a batch of images, ``(N, C, H, W)`` float32, as the network takes them."""
        for image in batch:
            self.add(look_at(image, hashed=len(self._different) < ENOUGH_IMAGES))

    def add(self, image: SeenImage) -> None:
        """Add what was seen of one image."""
        self._seen += 1
        if len(self._different) < ENOUGH_IMAGES:
            self._different.add(image.digest)
        self._constant += image.constant
        self._least, self._most = min(self._least, image.low), max(self._most, image.high)
        self._squares += image.squares
        self._values += image.size

    def state(self) -> dict[str, Array]:
        """Return all that was seen, exactly."""
        return {
            "digests": np.frombuffer(b"".join(sorted(self._different)), np.uint8),
            "counts": np.array([self._seen, self._constant, self._values]),
            "figures": np.array([self._squares, self._least, self._most], np.float64),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Take over what was seen from the `state` of others with the same preprocessing."""
        size = hashlib.sha256().digest_size
        digests = state["digests"].tobytes()
        self._different = {digests[start : start + size] for start in range(0, len(digests), size)}
        self._seen, self._constant, self._values = (int(count) for count in state["counts"])
        self._squares, self._least, self._most = (float(figure) for figure in state["figures"])

    def problems(self) -> tuple[str, ...]:
        """Return one message a fault: what was seen, what was expected, and what to do."""
        found = (self._too_few(), self._too_flat(), self._not_normalised())
        return tuple(message for message in found if message is not None)

    def _too_few(self) -> str | None:
        different = len(self._different)
        if different >= ENOUGH_IMAGES or not self._seen:
            return None
        if different == 1 and self._seen > 1:
            seen = f"all {self._seen} calibration images are identical"
        else:
            seen = f"only {different} different calibration images were given"
        return (
            f"{seen}; expected at least {ENOUGH_IMAGES}, and a hundred are better. The ranges fit these images alone: "
            "give more photographs like those that the model will see."
        )

    def _too_flat(self) -> str | None:
        if not self._constant:
            return None
        return (
            f"{self._constant} of {self._seen} calibration images are constant, one value a channel; expected "
            "photographs. Take blank images out: they say nothing about the ranges."
        )

    def _not_normalised(self) -> str | None:
        if not self._values:
            return None
        bounds = f"{self._low:.2g} to {self._high:.2g}"
        spread = float(np.sqrt(self._squares / self._values))
        if spread > SPREAD * max(-self._low, self._high):
            what = "were mean and std applied, and pixels divided by 255"
        elif self._low < -0.5 and self._least >= 0 and self._constant < self._seen:
            what = "were mean and std left out"
        else:
            return None
        return (
            f"the calibration images do not look normalised: their values run from {self._least:.3g} to "
            f"{self._most:.3g}, and the preprocessing of these weights gives {bounds} ({what}?). Give image files, or "
            "arrays normalised as the model's input_spec.preprocessing says."
        )
