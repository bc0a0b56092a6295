"""The statistics of a calibration, counted in the processes of a Ray cluster: equal, bit by bit, to those of one pass.

Two passes over the images, since a histogram's bins and samples follow the batches before (see `partial`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from deploykit.calibration.images import CalibrationSet
from deploykit.calibration.instrumented import Instrumented
from deploykit.calibration.partial import CountedImages, Ends, Places, count_batch, measure_ends, merge, start_places
from deploykit.calibration.statistics import Statistics
from deploykit.cluster import cluster, run_pieces
from deploykit.errors import SpecError
from deploykit.onnx_session import graph_batch
from deploykit.spec import Int8


def count_on_cluster(
    model: ir.Model,
    images: CalibrationSet,
    settings: Int8,
    on_batch: Callable[[Statistics], None],
    *,
    workers: int | None = None,
) -> Statistics:
    """Return the statistics of all calibration images.

    Args:
        model: the FP32 master graph.
        images: whose files every process reaches under the same paths.
        settings: filled; whether biases are corrected.
        on_batch: called with what has been found so far, after each batch.
        workers: how many processes; None: one for each processor of the cluster.

    Raises:
        SpecError: unreadable images are to be left out, so that no process knows which batch it has.
        CalibrationError: images that cannot be used.
        MissingDependency: ray is not installed.
    """
    if images.skip_corrupt:
        raise SpecError(
            "skip_corrupt=True and ray=True were both given; each process has to know which images are in its batches. "
            "Fix: take the unreadable files out, or leave ray out."
        )
    size = graph_batch(model)
    numbers = list(range(-(-len(images) // size)))
    arguments: dict[str, Any] = {
        "here": Path.cwd(),
        "model": ir.to_proto(model).SerializeToString(),
        "images": replace(images),  # without what it has worked out
        "settings": settings,
        "size": size,
    }
    with cluster() as ray:
        found = run_pieces(ray, EndsWorker, arguments, numbers, workers)
        places = list(start_places(np.frombuffer(ends, np.float64).reshape(-1, 3) for ends in found))
        parts = run_pieces(ray, CountWorker, {**arguments, "places": places}, numbers, workers)
        statistics = Statistics(images.spec.preprocessing)
        for part in parts:
            merge([CountedImages.from_bytes(part)], statistics)
            on_batch(statistics)
    return statistics


class EndsWorker:
    """Measures the ends of the tensors of a batch, in a process of its own."""

    def __init__(self, here: Path, model: bytes, images: CalibrationSet, settings: Int8, size: int) -> None:
        import onnx

        os.chdir(here)  # the files may have paths relative to it
        self.images, self.size = images, size
        self.network = Instrumented(ir.from_proto(onnx.ModelProto.FromString(model)), settings)

    def __call__(self, number: int) -> bytes:
        """Return the `Ends` of one batch."""
        ends: Ends = measure_ends(self.network.observe(self.images.batch_at(number, self.size))[0])
        return ends.tobytes()


class CountWorker(EndsWorker):
    """Counts the tensors of a batch where it starts."""

    def __init__(self, places: Sequence[Places], **others: Any) -> None:
        super().__init__(**others)
        self.places = places

    def __call__(self, number: int) -> bytes:
        """Return the `CountedImages` of one batch."""
        batch = self.images.batch_at(number, self.size)
        return count_batch(number, batch, *self.network.observe(batch), self.places[number]).to_bytes()
