"""Does a runtime fail on a part of a graph? Run by polygraphy, once a part, in a process of its own.

``python -m deploykit.export.reduce_check PART.onnx REQUEST.json``. Exit status: 0 the part is well, 1 it
fails, 2 nobody can tell (so polygraphy takes it as well, and looks elsewhere).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from deploykit.calibration.plan import onnx_session
from deploykit.errors import ExportError, ParityError
from deploykit.export.tensorrt_linter import quantize_layers
from deploykit.export.to_tensorrt import DEFAULT_CAPABILITY
from deploykit.parity.metrics import sqnr_db
from deploykit.runtimes import tensorrt_api as api
from deploykit.runtimes.tensorrt_build import BuildSettings, build_plan

WELL, FAILS, UNKNOWN = 0, 1, 2

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class CheckRequest:
    """The graph that the part is of, the images ``(N, C, H, W)`` in a ``.npy`` file, and what counts as failing."""

    whole: str
    images: str
    runtime: str
    min_sqnr_db: float


def main(part_file: str, request_file: str) -> int:
    """The exit status for a part."""
    request = msgspec.json.decode(Path(request_file).read_bytes(), type=CheckRequest)
    try:
        problem = find_problem(onnx.load(part_file), request)
    except Exception as error:  # the part, not the runtime, is at fault: any class may come
        sys.stderr.write(f"cannot be told: {error}\n")
        return UNKNOWN
    sys.stderr.write(f"{problem or 'well'}\n")
    return FAILS if problem else WELL


def find_problem(part: onnx.ModelProto, request: CheckRequest) -> str | None:
    """What a runtime does wrong with a part of a graph, on the values that the whole graph gives it; None: nothing."""
    if request.runtime == "tensorrt":
        return _build_problem(part)
    inputs = values_of(onnx.load(request.whole), [value.name for value in part.graph.input], np.load(request.images))
    names = [value.name for value in part.graph.output]
    expected = dict(zip(names, onnx_session(part, optimize=False).run(names, inputs), strict=True))
    try:
        found = dict(zip(names, onnx_session(part).run(names, inputs), strict=True))
    except Exception as error:  # onnxruntime's classes share no base
        return f"the runtime refuses it: {error}"
    try:
        compare_runs({"as written": expected, request.runtime: found}, min_sqnr_db=request.min_sqnr_db)
    except ParityError as error:
        return str(error)
    return None


def compare_runs(runs: Mapping[str, Arrays], *, min_sqnr_db: float) -> None:
    """Compare what several runners gave, the first being the reference.

    Raises:
        ParityError: fewer than two runners, an output that one lacks, no data, another shape, or
            an SQNR below the budget; every such output is named.
    """
    if len(runs) < 2:
        raise ParityError(f"a comparison needs two runners; there is {len(runs)}: {', '.join(runs) or 'none'}.")
    (first, reference), *others = runs.items()
    faults = [] if reference else [f"{first} gave no output"]
    for runner, outputs in others:
        for name in dict.fromkeys((*reference, *outputs)):
            fault = _fault(reference.get(name), outputs.get(name), first, runner, min_sqnr_db)
            faults += [f"{name}: {fault}"] if fault else []
    if faults:
        raise ParityError("; ".join(faults))


def values_of(whole: onnx.ModelProto, names: list[str], images: npt.NDArray[Any]) -> Arrays:
    """The value of any tensors of a graph on an image, node by node in ONNX Runtime."""
    source = whole.graph.input[0].name
    inner = [name for name in names if name != source]
    size = whole.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
    batch = np.ascontiguousarray(images[np.arange(size) % len(images)])
    copy = ir.from_proto(whole)
    values = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values[name] for name in inner)
    found: Arrays = {source: batch} if source in names else {}
    if inner:
        found |= dict(
            zip(inner, onnx_session(ir.to_proto(copy), optimize=False).run(inner, {source: batch}), strict=True)
        )
    return found


def _fault(
    expected: npt.NDArray[Any] | None, found: npt.NDArray[Any] | None, first: str, other: str, budget: float
) -> str | None:
    if expected is None or found is None:
        return f"{first if expected is None else other} did not give it"
    if not expected.size or expected.shape != found.shape:
        return f"shapes {expected.shape} and {found.shape}; expected two equal ones with data"
    figure = sqnr_db(expected.astype(np.float32), found.astype(np.float32))
    return f"{figure:.1f} dB in {other}; expected at least {budget:g}" if not figure >= budget else None


def _build_problem(part: onnx.ModelProto) -> str | None:
    flavour = api.default_flavour()
    settings = BuildSettings(
        flavour=flavour,
        input=part.graph.input[0].name,
        capability=DEFAULT_CAPABILITY if flavour == api.RTX else None,
        quantize_layers=quantize_layers(part),
    )
    with tempfile.TemporaryDirectory(prefix="deploykit-reduce-") as scratch:
        file = Path(scratch) / "part.onnx"
        onnx.save(part, str(file))
        try:
            build_plan(file, Path(scratch) / "part.plan", settings)
        except ExportError as error:
            return str(error)
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
