"""The package nncf as deploykit calls it: without its analytics and its notices, on calibration images in batches."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deploykit.arrays import FloatArray
from deploykit.calibration.images import CalibrationSet
from deploykit.errors import CalibrationError, plain_reason
from deploykit.onnx_session import graph_batch
from deploykit.optional import OptionalPackage

PACKAGE = OptionalPackage(
    module="nncf",
    distribution="nncf",
    extra="nncf",
    feature="recipe='nncf'",
    prepare="deploykit.calibration.nncf_package:block_reports",
)
MOST_IMAGES = 300
"""How many images NNCF sees at most: what it takes by default."""


def block_reports() -> None:
    """Let nncf do without its reporter, which asks for an analytics host: a build machine's has none."""
    os.environ.setdefault("NNCF_CI", "1")


@dataclass(frozen=True, kw_only=True, eq=False)
class Batches:
    """Images ``(N, C, H, W)`` in batches of the size that a graph takes; can be gone through again and again."""

    images: FloatArray
    size: int

    @classmethod
    def of(cls, images: CalibrationSet, model: ir.Model, most: int = MOST_IMAGES) -> Batches:
        """Return some calibration images, evenly spaced, in a graph's batches."""
        return cls(images=images.sample(most), size=graph_batch(model))

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.size)

    def __iter__(self) -> Iterator[FloatArray]:
        for start in range(0, len(self.images), self.size):
            piece = self.images[start : start + self.size]
            yield piece[np.arange(self.size) % len(piece)]


def is_transformer(model: ir.Model) -> bool:
    """Return whether a graph has attention: NNCF has settings of its own for these."""
    return any(node.op_type == "Softmax" for node in model.graph)


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Run a block of NNCF's without its progress bars and notices: an error that it raises says it all.

    Raises:
        CalibrationError: it fails on the graph.
    """
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # nncf raises classes of its own, and those of onnx and onnxruntime
        raise CalibrationError(
            f"NNCF does not quantize this graph ({plain_reason(error)}). Fix: choose another recipe."
        ) from error
    finally:
        logger.setLevel(level)
