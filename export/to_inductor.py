"""Graph -> AOTInductor package: machine code for this processor, weights frozen in."""

from __future__ import annotations

import logging
import platform
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploykit.errors import ExportError
from deploykit.export.lowering import Engine, Graph
from deploykit.optional import installed_version, require
from deploykit.runtimes.run_inductor import machine_tie

_MARCH = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}


def to_inductor(graph: Graph, folder: Path, *, target: str | None = None) -> Engine:
    """Compile the program to ``model.pt2``; 10 to 40 s of work. ``target`` decides nothing: it is this machine.

    Raises:
        ExportError: the graph has no program, there is no C++ compiler, or the compilation failed.
    """
    torch = require("torch")
    if graph.program is None:
        raise ExportError(
            "lowering to torch_compile needs a torch.export program and the graph has none. "
            "Give a Graph with program= filled."
        )
    _check_compiler()
    with tempfile.TemporaryDirectory(prefix="deploykit-inductor-") as staging, _quiet():
        package = Path(staging) / "model.pt2"
        try:
            with torch.no_grad():
                torch._inductor.aoti_compile_and_package(
                    graph.program, package_path=str(package), inductor_configs=_settings()
                )
        except Exception as error:
            # inductor raises what its many stages raise; none of it is a type of its own.
            raise ExportError(
                f"torch.compile's ahead-of-time compilation failed: {_first_lines(error)}. "
                "Export for onnxruntime or openvino, or look at the error above this one."
            ) from error
        (folder / "model.pt2").write_bytes(package.read_bytes())
    return Engine(
        file="model.pt2",
        runtime_version=installed_version("torch") or "unknown",
        requires=machine_tie(),
        tools={"torch": str(torch.__version__)},
    )


def _settings() -> dict[str, Any]:
    """Frozen weights, and no instruction beyond those that `machine_tie` names.

    Inductor's own default, ``-march=native``, would add whatever else this processor has.
    """
    march = _MARCH.get(machine_tie()["cpu_capability"].partition("+")[0])
    known = march is not None and platform.machine() == "x86_64"
    return {"freezing": True, **({"cpp.march": march} if known else {})}


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        raise ExportError(
            "torch_compile needs a C++ compiler and none was found. Install one (Debian, Ubuntu: "
            "apt-get install g++), or name it in the environment variable CXX."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the warnings that torch raises at its own code away from the user."""
    log = logging.getLogger("torch._inductor")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=FutureWarning)
            warnings.simplefilter("ignore", category=DeprecationWarning)
            yield
    finally:
        log.setLevel(level)


def _first_lines(error: Exception, count: int = 3) -> str:
    return " ".join(str(error).strip().splitlines()[:count])
