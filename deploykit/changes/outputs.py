"""Two engines on the same images: how far each is from torch, and how far they are from each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deploykit.arrays import FloatArray, ImageArray
from deploykit.backends.runtime import Runtime, run_in_batches
from deploykit.images.preprocess import load_images, network_images
from deploykit.parity.compare import ParityAccumulator
from deploykit.parity.dead import dead_outputs
from deploykit.parity.interval import Interval, wilson
from deploykit.parity.reference import REFERENCE_FILE, ParityReference
from deploykit.parity.report import MAX_SQNR_DB
from deploykit.timing import time_calls

CHUNK = 16
"""Images in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class Between:
    """The new engine's output against the old one's on the same images; ``fault`` says what it cannot be."""

    sqnr_db: float
    agreement: Interval | None = None
    fault: str | None = None


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What two engines gave: SQNR against torch by output in dB, each other's distance, milliseconds an image."""

    images: int = 0
    old_db: dict[str, float] = field(default_factory=dict)
    new_db: dict[str, float] = field(default_factory=dict)
    between: dict[str, Between] = field(default_factory=dict)
    latency_ms: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class OpenBundle:
    """An engine, and the reference that travels with it."""

    model: Runtime
    reference: ParityReference

    @property
    def images(self) -> ImageArray:
        """The reference's images as the engine takes them."""
        taken: ImageArray = self.reference.images.astype(self.model.input_spec.dtype, copy=False)
        return taken

    @property
    def is_quantized(self) -> bool:
        """Whether the engine computes in integers."""
        return self.model.precision.name == "int8"

    def against_torch(self, truth: ParityReference, images: ImageArray) -> dict[str, float]:
        """Return each output's distance from ``truth``, in dB; `MAX_SQNR_DB` at most."""
        accumulator = ParityAccumulator(logits=truth.logits)
        for start in range(0, len(images), CHUNK):
            piece = slice(start, start + CHUNK)
            expected = {name: values[piece] for name, values in truth.expected.items()}
            accumulator.update(expected, truth.sample(run_in_batches(self.model, images[piece])))
        levels = accumulator.result(min_sqnr_db=-MAX_SQNR_DB)
        return {level.name: level.sqnr_db for level in levels}


def run_both(old: Runtime, new: Runtime, files: Sequence[Path] | None) -> Ran:
    """Run two engines on image files, or on the reference images of one of them, and time them in turns.

    Where both have the same weights, both are compared with the same outputs of torch; else each with its own.

    Raises:
        ParityError: the old engine gives NaN or infinity, so that nothing can be compared with it.
        ImageError: an image file cannot be read.
    """
    before, after = _opened(old), _opened(new)
    common = _paired_references(before, after)
    names = _comparable(old, new)
    same_weights = old.manifest.weights_digest == new.manifest.weights_digest
    if same_weights and common is not None and _names(old) == names == _names(new):
        truth, old_images, new_images = common
        old_db, new_db = before.against_torch(truth, old_images), after.against_torch(truth, new_images)
    else:
        old_db = before.against_torch(before.reference, before.images)
        new_db = after.against_torch(after.reference, after.images)
    pairs = _file_pairs(old, new, files) if files is not None else _array_pairs(common)
    logits = before.reference.logits
    compared, count = _between(old, new, pairs, names, logits) if names else ({}, 0)
    return Ran(images=count, old_db=old_db, new_db=new_db, between=compared, latency_ms=_latency(old, new))


def _opened(model: Runtime) -> OpenBundle:
    return OpenBundle(model=model, reference=ParityReference.load(model.read_file(REFERENCE_FILE)))


def _names(model: Runtime) -> list[str]:
    return [output.name for output in model.manifest.outputs]


def _comparable(old: Runtime, new: Runtime) -> list[str]:
    """Return the outputs that both give, of one shape without the batch."""
    shapes = {output.name: output.shape[1:] for output in old.manifest.outputs}
    return [each.name for each in new.manifest.outputs if shapes.get(each.name) == each.shape[1:]]


def _paired_references(old: OpenBundle, new: OpenBundle) -> tuple[ParityReference, ImageArray, ImageArray] | None:
    """Return the reference whose images both can take, and these as each takes them; None where the inputs differ.

    The old bundle's, but for: a new one of pixels beside an old one of normalised images, since pixels can be
    normalised without a loss; and a new one of INT8 beside an old one of floats.
    """
    before, after = old.model.input_spec, new.model.input_spec
    if (before.channels, before.height, before.width) != (after.channels, after.height, after.width):
        return None
    if before.embeds_preprocessing == after.embeds_preprocessing:
        # Images that INT8 was calibrated for: an FP32 export may carry synthetic ones, which INT8 cuts off.
        chosen = new if new.is_quantized and not old.is_quantized else old
        return chosen.reference, chosen.images, chosen.images
    pixels = old if before.embeds_preprocessing else new
    images = network_images(pixels.images, pixels.model.input_spec)
    return (old.reference, old.images, images) if pixels is old else (new.reference, images, new.images)


def _file_pairs(old: Runtime, new: Runtime, files: Sequence[Path]) -> Iterator[tuple[ImageArray, ImageArray]]:
    """Yield image files a few at a time, prepared as each engine's manifest says."""
    for start in range(0, len(files), CHUNK):
        piece = list(files[start : start + CHUNK])
        yield load_images(piece, old.input_spec), load_images(piece, new.input_spec)


def _array_pairs(
    common: tuple[ParityReference, ImageArray, ImageArray] | None,
) -> Iterator[tuple[ImageArray, ImageArray]]:
    if common is not None:
        _, old, new = common
        for start in range(0, len(old), CHUNK):
            yield old[start : start + CHUNK], new[start : start + CHUNK]


def _between(
    old: Runtime,
    new: Runtime,
    pairs: Iterator[tuple[ImageArray, ImageArray]],
    names: Sequence[str],
    logits: str | None,
) -> tuple[dict[str, Between], int]:
    """Compare the outputs of two engines on pairs of batches; also count the images, 0 where there are none."""
    accumulator = ParityAccumulator(logits=logits)
    faults: dict[str, str] = {}
    for old_images, new_images in pairs:
        expected, found = _chosen(old, old_images, names), _chosen(new, new_images, names)
        accumulator.update(expected, found)
        faults = dead_outputs(expected, found) | faults
    if not accumulator.images:
        return {}, 0
    results = {}
    for level in accumulator.result(min_sqnr_db=-MAX_SQNR_DB):
        share = level.top1_agreement
        agreement = None if share is None else wilson(round(share * accumulator.images), accumulator.images)
        results[level.name] = Between(sqnr_db=level.sqnr_db, agreement=agreement, fault=faults.get(level.name))
    return results, accumulator.images


def _chosen(model: Runtime, images: ImageArray, names: Sequence[str]) -> dict[str, FloatArray]:
    outputs = run_in_batches(model, images)
    return {name: outputs[name] for name in names}


def one_call(model: Runtime) -> tuple[Callable[[], object], int]:
    """Return a call of one batch of a bundle's own images, to be timed, and how many images that is."""
    side = _opened(model)
    size = model.input_spec.best_batch
    images = side.images[np.arange(size) % len(side.images)]
    return lambda: model(images), size


def _latency(old: Runtime, new: Runtime) -> tuple[float, float]:
    """Time one batch of each in turns; milliseconds an image."""
    (before, its_size), (after, size) = one_call(old), one_call(new)
    times, _ = time_calls([before, after])
    return times[0] / its_size, times[1] / size
