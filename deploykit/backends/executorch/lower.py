"""Torch program -> ``model.pte``, which has the names of its input and outputs in methods of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from deploykit.backends.backend import Engine, LowerOptions
from deploykit.backends.conversion import Converter, run_converter, write_request
from deploykit.backends.executorch.inspect import describe_coverage
from deploykit.backends.executorch.package import PACKAGE
from deploykit.graph import TorchProgram
from deploykit.optional import installed_version, require_version
from deploykit.places import scratch_folder

ENGINE = "model.pte"
CONVERSION = Converter(
    module="deploykit.backends.executorch.converter",
    title="ExecuTorch",
    library="executorch",
    unknown=(
        r"Operator torch\._ops\.(?P<operator>aten\.\w+)\.\w+ is not in Core ATen",
        r"no kernel of (?P<operator>aten::\w+)",
        r"Missing out variants: \{'(?P<operator>aten::\w+)",
    ),
)
"""It has the words of the exporter, of the converter and of the exporter's last stage."""


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
        run_converter(CONVERSION, request, graph)
        coverage = describe_coverage(Path(request.engine).read_bytes())
        shutil.copyfile(request.engine, folder / ENGINE)
    return Engine(
        file=ENGINE,
        runtime_version=version,
        tools={"torch": installed_version("torch") or "unknown"},
        compiler=coverage,
    )
