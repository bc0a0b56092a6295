"""Does a runtime fail on a part of a graph? Run by polygraphy, once a part, in a process of its own.

``python -m deploykit.export.reduce_check PART.onnx REQUEST.json``. Exit status: 0 the part is well, 1 it
fails, 2 nobody can tell (so polygraphy takes it as well, and looks elsewhere).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from deploykit.backends.backend import resolve
from deploykit.backends.table import load_backend
from deploykit.onnx_session import values_of

WELL, FAILS, UNKNOWN = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class CheckRequest:
    """The graph that the part is of, the images ``(N, C, H, W)`` in a ``.npy`` file, and what counts as failing."""

    whole: str
    images: str
    runtime: str
    min_sqnr_db: float


def main(part_file: str, request_file: str) -> int:
    """Return the exit status for a part."""
    request = msgspec.json.decode(Path(request_file).read_bytes(), type=CheckRequest)
    try:
        problem = find_problem(ir.load(part_file), request)
    except Exception as error:  # the part, not the runtime, is at fault: any class may come
        sys.stderr.write(f"cannot be told: {error}\n")
        return UNKNOWN
    sys.stderr.write(f"{problem or 'well'}\n")
    return FAILS if problem else WELL


def find_problem(part: ir.Model, request: CheckRequest) -> str | None:
    """Return what a runtime does wrong with a part of a graph, on the values that the whole graph gives it."""
    names = [str(value.name) for value in part.graph.inputs]
    inputs = values_of(ir.load(request.whole), names, np.load(request.images))
    problem: str | None = resolve(str(load_backend(request.runtime).debug))(part, inputs, request.min_sqnr_db)
    return problem


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
