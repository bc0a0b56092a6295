"""Three errors apart, each with a cure of its own: of the conversion, of the quantization, and of the runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from deploykit.backends.runtime import Runtime, run_in_batches
from deploykit.parity.metrics import sqnr_db
from deploykit.parity.reference import REFERENCE_FILE, ParityReference
from deploykit.parity.report import capped

Kind: TypeAlias = Literal["conversion", "quantization", "runtime"]
Outputs: TypeAlias = Mapping[str, npt.NDArray[np.float32]]

TORCH = "torch fp32"
FULL = "fp32"


@dataclass(frozen=True, kw_only=True)
class ErrorApart:
    """One error of one output, in dB on the same images: of ``bundle`` against ``against``.

    ``conversion``: a runtime's FP32 against torch. ``quantization``: a lower precision against FP32 in one runtime.
    ``runtime``: INT8 from the same calibration in two runtimes.
    """

    kind: Kind
    bundle: str
    against: str
    level: str
    sqnr_db: float


def errors_apart(models: Mapping[str, Runtime]) -> tuple[ErrorApart, ...]:
    """Compare engines of the same weights and input, by name, on the images of the first in a lower precision.

    What cannot be compared is left out: a quantization error needs an FP32 engine of the same runtime beside it.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, model in models.items():
        groups.setdefault(_network(model), []).append(name)
    return tuple(error for names in groups.values() for error in _of_group({name: models[name] for name in names}))


def _network(model: Runtime) -> tuple[object, ...]:
    taken, given = model.input_spec, model.manifest.outputs
    outputs = tuple((output.name, output.shape[1:]) for output in given)
    return model.manifest.weights_digest, taken.shape_at(1)[1:], taken.dtype, taken.preprocessing, outputs


def _of_group(models: Mapping[str, Runtime]) -> Iterator[ErrorApart]:
    # Images that one of them was calibrated for: an FP32 export may carry synthetic ones, which INT8 cuts off.
    first = next((model for model in models.values() if model.precision.name != FULL), next(iter(models.values())))
    truth = ParityReference.load(first.read_file(REFERENCE_FILE))
    images = truth.images.astype(first.input_spec.dtype, copy=False)
    outputs = {name: truth.sample(run_in_batches(model, images)) for name, model in models.items()}
    floats = {model.runtime: name for name, model in models.items() if model.precision.name == FULL}
    for name, model in models.items():
        if model.precision.name == FULL:
            yield from _errors("conversion", name, TORCH, truth.expected, outputs[name])
        elif model.runtime in floats:
            reference = floats[model.runtime]
            yield from _errors("quantization", name, reference, outputs[reference], outputs[name])
    for one, other in _pairs(models):
        yield from _errors("runtime", other, one, outputs[one], outputs[other])


def _pairs(models: Mapping[str, Runtime]) -> Iterator[tuple[str, str]]:
    """Yield INT8 engines of two runtimes that were calibrated alike."""
    integers: Sequence[str] = [name for name, model in models.items() if model.precision.name == "int8"]
    for one, other in combinations(integers, 2):
        its, others = models[one].manifest, models[other].manifest
        if its.runtime != others.runtime and its.calibration_digest == others.calibration_digest:
            yield one, other


def _errors(kind: Kind, bundle: str, against: str, expected: Outputs, found: Outputs) -> Iterator[ErrorApart]:
    for level, values in expected.items():
        if not np.isfinite(values).all():
            continue
        figure = capped(sqnr_db(values, found[level]))
        yield ErrorApart(kind=kind, bundle=bundle, against=against, level=level, sqnr_db=figure)
