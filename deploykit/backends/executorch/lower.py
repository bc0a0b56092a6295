"""Torch program -> ``model.pte``, which has the names of its input and outputs in methods of its own."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from deploykit.backends.backend import Engine, LowerOptions
from deploykit.backends.conversion import (
    CONVERSION_SECONDS,
    ConversionRequest,
    lacks_operator,
    run_converter,
    write_request,
)
from deploykit.backends.executorch.inspect import describe_coverage
from deploykit.backends.executorch.package import PACKAGE
from deploykit.errors import ExportError
from deploykit.graph import TorchProgram
from deploykit.optional import installed_version, require_version
from deploykit.places import scratch_folder

ENGINE = "model.pte"
TITLE = "ExecuTorch"

_UNKNOWN_OPERATORS = tuple(
    re.compile(pattern)
    for pattern in (
        r"Operator torch\._ops\.aten\.(?P<operator>\w+)\.\w+ is not in Core ATen",
        r"no kernel of aten::(?P<operator>\w+)",
        r"Missing out variants: \{'aten::(?P<operator>\w+)",
    )
)
"""What the exporter, the converter and the exporter's last stage say of an operator that they do not have."""


def lower(graph: TorchProgram, folder: Path, options: LowerOptions) -> Engine:
    """Convert the program in a process of its own and write ``model.pte``, whole or not at all; 10 to 60 s.

    A dynamic batch becomes a network of one image, which the adapter runs once for each.

    Args:
        graph: in FP32, or with the Q/DQ operators of `deploykit.backends.executorch.passes`.
        folder: where the engine goes.
        options: nothing in them concerns this runtime.

    Raises:
        ExportError: the network cannot be converted; where an operator is the reason, with its name and place.
        MissingDependency: executorch is not installed.
    """
    version = require_version(PACKAGE)
    with scratch_folder("executorch") as scratch:
        request = write_request(graph, scratch, ENGINE)
        _convert(request, graph)
        coverage = describe_coverage(Path(request.engine).read_bytes())
        shutil.copyfile(request.engine, folder / ENGINE)
    return Engine(
        file=ENGINE,
        runtime_version=version,
        tools={"torch": installed_version("torch") or "unknown"},
        compiler=coverage,
    )


def _convert(request: ConversionRequest, graph: TorchProgram) -> None:
    run_converter(
        "deploykit.backends.executorch.converter",
        TITLE,
        request,
        lambda reason: _refused(graph, reason),
        CONVERSION_SECONDS,
    )


def _refused(graph: TorchProgram, reason: str) -> ExportError:
    """Return the error of a program that is not converted, with the operator where the converter names it."""
    for pattern in _UNKNOWN_OPERATORS:
        unknown = pattern.search(reason)
        if unknown is not None:
            return lacks_operator(TITLE, f"aten.{unknown['operator']}", graph)
    return ExportError(
        f"executorch does not convert the network: {' '.join(reason.split())[:400]}. "
        "Export for another runtime, or write the part that it names in other operators."
    )
