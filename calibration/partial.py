"""Statistics in parts: batches that were counted anywhere, and the statistics that one process would have of them.

A histogram's bins double in width with the largest value so far, and its sample of a large tensor goes by how many
values came before. Both follow from the ends and sizes of the batches before, so that two passes make the parts
independent: `measure_ends` of every batch; `start_places`, which walks over them in order; `count_batch` of every batch
where it starts. `merge` adds what was counted in order, to the same bits as a single pass.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deploykit.arrays import Array, FloatArray
from deploykit.calibration.counting import CountedBatch, CountedValues, extremes, read_values, widened
from deploykit.calibration.image_checks import SeenImage, look_at
from deploykit.calibration.statistics import Statistics
from deploykit.errors import CalibrationError

Ends = npt.NDArray[np.float64]
"""``(tensors, 3)``: of each tensor of a batch, in the order of its names, the least value, the greatest, how many."""

Places = npt.NDArray[np.float64]
"""``(tensors, 2)``: the edge of each histogram, widened for a batch, and how many values came before it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CountedImages:
    """What statistics take of one batch, by its number in the calibration set."""

    number: int
    images: tuple[SeenImage, ...]
    tensors: dict[str, CountedBatch]
    probes: dict[str, FloatArray]

    def to_bytes(self) -> bytes:
        """Return it as one ``.npz``, without pickle."""
        parts = [(position, part) for position, each in enumerate(self.tensors.values()) for part in each.parts]
        arrays: dict[str, Array] = {
            "number": np.array([self.number]),
            "digests": np.frombuffer(b"".join(each.digest for each in self.images), np.uint8),
            "image_counts": np.array([(each.constant, each.size) for each in self.images], np.int64),
            "image_figures": np.array([(each.low, each.high, each.squares) for each in self.images], np.float64),
            "tensors": np.array(list(self.tensors)),
            "ends": np.array([(each.low, each.high) for each in self.tensors.values()], np.float64),
            "sizes": np.array([each.size for each in self.tensors.values()], np.int64),
            "owners": np.array([position for position, _ in parts], np.int64),
            "figures": np.array([(part.weight, part.total, part.squares) for _, part in parts], np.float64),
            "bins": np.array([part.bins for _, part in parts], np.int64),
            "probes": np.array(list(self.probes)),
        }
        arrays |= {f"probe/{name}": values for name, values in self.probes.items()}
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, **arrays)
        return content.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> CountedImages:
        """Read what `to_bytes` wrote.

        Raises:
            CalibrationError: it is something else.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as stored:
                return cls(
                    number=int(stored["number"][0]),
                    images=tuple(_images(stored)),
                    tensors=dict(_tensors(stored)),
                    probes={str(name): stored[f"probe/{name}"] for name in stored["probes"]},
                )
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise CalibrationError(f"a part of the statistics cannot be read ({error!r}). Calibrate again.") from error


def measure_ends(tensors: Mapping[str, Array]) -> Ends:
    """Return the ends and the size of each tensor of one batch.

    Raises:
        CalibrationError: NaN or infinity in a tensor.
    """
    return np.array([(*extremes(values), values.size) for values in tensors.values()], np.float64)


def start_places(ends: Iterable[Ends]) -> Iterator[Places]:
    """Yield where each batch starts, from the ends of all batches in order."""
    edges: Sequence[float] = ()
    seen = np.zeros(0)
    for batch in ends:
        edges = edges or [0.0] * len(batch)
        seen = seen if len(seen) else np.zeros(len(batch))
        edges = [widened(edge, low, high) for edge, (low, high, _) in zip(edges, batch.tolist(), strict=True)]
        yield np.stack([np.array(edges), seen], axis=1)
        seen = seen + batch[:, 2]


def count_batch(
    number: int, batch: FloatArray, tensors: Mapping[str, Array], probes: Mapping[str, Array], places: Places
) -> CountedImages:
    """Count one batch where it starts.

    Args:
        number: of the batch, from 0.
        batch: the images, ``(N, C, H, W)`` float32.
        tensors: what needs a range, in the order of ``places``.
        probes: what is averaged over batches.
        places: from `start_places`.
    """
    counted = {
        name: read_values(values, first=int(first)).counted(edge)
        for (name, values), (edge, first) in zip(tensors.items(), places.tolist(), strict=True)
    }
    return CountedImages(
        number=number,
        images=tuple(look_at(image) for image in batch),
        tensors=counted,
        probes={name: values.astype(np.float32) for name, values in probes.items()},
    )


def merge(parts: Iterable[CountedImages], statistics: Statistics) -> Statistics:
    """Add parts, in the order of their numbers, to statistics that have seen the batches before the first of them.

    Raises:
        CalibrationError: a batch is missing, or there twice.
    """
    for part in parts:
        if part.number != statistics.batches:
            raise CalibrationError(
                f"the part of batch {part.number} follows {statistics.batches} batches; expected batch "
                f"{statistics.batches}. Fix: give every part once, in order."
            )
        statistics.add(part.images, part.tensors, part.probes)
    return statistics


def _images(stored: Mapping[str, Array]) -> Iterator[SeenImage]:
    digests = stored["digests"].tobytes()
    counts, figures = stored["image_counts"].tolist(), stored["image_figures"].tolist()
    length = len(digests) // max(1, len(counts))
    for position, ((constant, size), (low, high, squares)) in enumerate(zip(counts, figures, strict=True)):
        digest = digests[position * length : (position + 1) * length]
        yield SeenImage(digest=digest, constant=bool(constant), low=low, high=high, squares=squares, size=size)


def _tensors(stored: Mapping[str, Array]) -> Iterator[tuple[str, CountedBatch]]:
    owners, figures, bins = stored["owners"], stored["figures"].tolist(), stored["bins"]
    for position, (name, (low, high), size) in enumerate(
        zip(stored["tensors"], stored["ends"].tolist(), stored["sizes"].tolist(), strict=True)
    ):
        parts = tuple(
            CountedValues(weight=weight, total=total, squares=squares, bins=bins[index])
            for index in np.flatnonzero(owners == position)
            for weight, total, squares in [figures[index]]
        )
        yield str(name), CountedBatch(low=low, high=high, size=size, parts=parts)
