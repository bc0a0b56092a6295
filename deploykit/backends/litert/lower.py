"""Torch program -> ``model.tflite``, whose signature names the images and every output."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import msgspec
import torch

from deploykit.backends.backend import Engine, LowerOptions
from deploykit.backends.litert.converter import REFUSED, UNPROVED, ConversionRequest
from deploykit.backends.litert.package import CONVERTER, PACKAGE
from deploykit.child_process import child_environment, run_module
from deploykit.errors import ExportError, MissingDependency
from deploykit.fusion.locate import describe_node
from deploykit.fusion.quiet import quiet_torch
from deploykit.graph import TorchProgram
from deploykit.optional import installed_version
from deploykit.places import scratch_folder

ENGINE = "model.tflite"
CONVERSION_SECONDS = 1800.0
"""A conversion that takes longer is stopped; a network of a thousand operators takes about a minute."""

_LOG_LINES = 8
_UNKNOWN_OPERATOR = re.compile(r"Lowering not found: (?P<operator>[\w.]+)")


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
    versions = {package.distribution: _installed(package.module) for package in (PACKAGE, CONVERTER)}
    with scratch_folder("litert") as scratch:
        request = _request(graph, scratch)
        with quiet_torch():
            torch.export.save(graph.program, request.program)
        _convert(request, graph, scratch)
        shutil.copyfile(request.engine, folder / ENGINE)
    return Engine(
        file=ENGINE,
        runtime_version=versions[PACKAGE.distribution],
        tools={
            CONVERTER.distribution: versions[CONVERTER.distribution],
            "torch": installed_version("torch") or "unknown",
        },
    )


def _installed(module: str) -> str:
    """Return the version of a package, without importing it.

    Raises:
        MissingDependency: it is not installed.
    """
    package = PACKAGE if module == PACKAGE.module else CONVERTER
    version = installed_version(module, package)
    if version is None:
        raise MissingDependency(
            f"{package.feature} needs the package {package.distribution!r}, which is not installed. "
            f"Install it: {package.command}",
            package=module,
            command=package.command,
        )
    return version


def _request(graph: TorchProgram, scratch: Path) -> ConversionRequest:
    spec = graph.input
    batch = spec.batch if isinstance(spec.batch, int) else 1
    return ConversionRequest(
        program=str(scratch / "program.pt2"),
        engine=str(scratch / ENGINE),
        reason=str(scratch / "reason"),
        input=spec.name,
        shape=(batch, *(int(size) for size in spec.shape[1:])),
        dtype=spec.dtype,
        outputs=tuple(output.name for output in graph.outputs),
        quantized=any("quantized_decomposed" in str(node.target) for node in graph.program.graph.nodes),
    )


def _convert(request: ConversionRequest, graph: TorchProgram, scratch: Path) -> None:
    file = scratch / "request.json"
    file.write_bytes(msgspec.json.encode(request))
    try:
        done = subprocess.run(
            run_module("deploykit.backends.litert.converter", str(file)),
            capture_output=True,
            text=True,
            errors="replace",
            env=child_environment(),
            timeout=CONVERSION_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"the conversion to LiteRT took more than {CONVERSION_SECONDS:g} s and was stopped. Try a smaller model."
        ) from error
    if done.returncode == 0:
        return
    if done.returncode in (REFUSED, UNPROVED):
        reason = Path(request.reason).read_text(encoding="utf-8")
        raise _refused(graph, reason) if done.returncode == REFUSED else ExportError(reason)
    tail = "".join(f"\n  {line}" for line in done.stderr.splitlines()[-_LOG_LINES:])
    cause = f"crashed (signal {-done.returncode})" if done.returncode < 0 else "failed"
    hint = " Out of memory is the usual cause: free some, or try a smaller model." if done.returncode == -9 else ""
    raise ExportError(f"the conversion to LiteRT {cause}.{hint} The end of its log:{tail}")


def _refused(graph: TorchProgram, reason: str) -> ExportError:
    """Return the error of a program that is not converted, with the operator where the converter names it."""
    unknown = _UNKNOWN_OPERATOR.search(reason)
    if unknown is None:
        return ExportError(
            f"litert-torch does not convert the network: {' '.join(reason.split())[:400]}. "
            "Export for another runtime, or write the part that it names in other operators."
        )
    operator = unknown["operator"]
    calls = [node for node in graph.program.graph.nodes if str(node.target) == operator]
    return ExportError(
        f"LiteRT has no {operator}, which the network calls"
        f"{f' ({describe_node(calls[0])})' if calls else ''}. Write that part in other operators, or export for "
        "another runtime."
    )
