"""Torch program -> ``model.tflite``, whose signature names the images and every output."""

from __future__ import annotations

import shutil
from pathlib import Path

from deploykit.backends.backend import Engine, LowerOptions
from deploykit.backends.conversion import Converter, run_converter, write_request
from deploykit.backends.litert.package import CONVERTER, PACKAGE
from deploykit.graph import TorchProgram
from deploykit.optional import installed_version, require_version
from deploykit.places import scratch_folder

ENGINE = "model.tflite"
CONVERSION = Converter(
    module="deploykit.backends.litert.converter",
    title="LiteRT",
    library="litert-torch",
    unknown=(r"Lowering not found: (?P<operator>[\w.]+)",),
)


def lower(graph: TorchProgram, folder: Path, options: LowerOptions) -> Engine:
    """Convert the program in a process of its own and write ``model.tflite``, whole or not at all; 10 to 60 s.

    A dynamic batch becomes a network of one image, which the adapter runs once for each.

    Args:
        graph: in FP32, or with the Q/DQ operators of `deploykit.backends.litert.passes`.
        folder: where the engine goes.
        options: nothing in them concerns this runtime.

    Raises:
        ExportError: the network cannot be converted; where an operator is the reason, with its name and place.
        MissingDependency: no converter, or no runtime, whose version the engine is tied to.
    """
    versions = {package.distribution: require_version(package) for package in (PACKAGE, CONVERTER)}
    with scratch_folder("litert") as scratch:
        request = write_request(graph, scratch, ENGINE)
        run_converter(CONVERSION, request, graph)
        shutil.copyfile(request.engine, folder / ENGINE)
    return Engine(
        file=ENGINE,
        runtime_version=versions[PACKAGE.distribution],
        tools={
            CONVERTER.distribution: versions[CONVERTER.distribution],
            "torch": installed_version("torch") or "unknown",
        },
    )
