"""Torch program -> ``model.mlpackage``, whose input and outputs have the names of the images and the levels."""

from __future__ import annotations

import shutil
from pathlib import Path

from deploykit.backends.backend import Engine, LowerOptions
from deploykit.backends.conversion import Converter, run_converter, write_request
from deploykit.backends.coreml.package import PACKAGE, PACKAGE_FOLDER
from deploykit.errors import ExportError
from deploykit.fusion.fold_dimensions import MOST_DIMENSIONS, beyond_five
from deploykit.fusion.locate import describe_node
from deploykit.graph import TorchProgram
from deploykit.optional import installed_version, require_version
from deploykit.places import scratch_folder

ENGINE = f"{PACKAGE_FOLDER}/Manifest.json"
CONVERSION = Converter(
    module="deploykit.backends.coreml.converter",
    title="Core ML",
    library="coremltools",
    unknown=(
        r"Unsupported fx node (?P<operator>\w+)",
        r"PyTorch convert function for op '(?P<operator>\w+)' not implemented",
    ),
)


def lower(graph: TorchProgram, folder: Path, options: LowerOptions) -> Engine:
    """Convert the program in a process of its own and write ``model.mlpackage``, whole or not at all; 10 to 60 s.

    A dynamic batch becomes a network of one image, which the adapter runs once for each.

    Args:
        graph: in any precision, as `deploykit.backends.coreml.passes` writes it.
        folder: where the package goes.
        options: nothing in them concerns this runtime.

    Raises:
        ExportError: the network cannot be converted; where an operator is the reason, with its name and place. Or the
            package does not have what the program has.
        MissingDependency: coremltools is not installed.
    """
    version = require_version(PACKAGE)
    _check_ranks(graph)
    with scratch_folder("coreml") as scratch:
        request = write_request(graph, scratch, PACKAGE_FOLDER)
        run_converter(CONVERSION, request, graph)
        shutil.copytree(request.engine, folder / PACKAGE_FOLDER)
    return Engine(
        file=ENGINE,
        runtime_version=version,
        requires={"systems": "iOS 17, iPadOS 17, macOS 14, or newer"},
        tools={"torch": installed_version("torch") or "unknown"},
    )


def _check_ranks(graph: TorchProgram) -> None:
    """Refuse a program with a tensor of more dimensions than the format has, where no rewrite avoids it.

    Raises:
        ExportError: it has one.
    """
    for node, rank in beyond_five(graph.program.graph):
        raise ExportError(
            f"{CONVERSION.title} has tensors of at most {MOST_DIMENSIONS} dimensions, and {node.target} "
            f"({describe_node(node)}) has one of {rank}. Write that part with fewer, or export for another runtime."
        )
