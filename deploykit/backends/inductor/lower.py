"""Torch program -> AOTInductor package: machine code for this processor, weights frozen in."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.backends.backend import Engine, LowerOptions
from deploykit.backends.inductor.adapter import load_package, machine_tie
from deploykit.backends.inductor.modes import DEFAULT_MODE, ModeChoice, fastest, keep_mode, mode_address, recall_mode
from deploykit.backends.inductor.targets import FASTEST_MODE, INDUCTOR_MODES
from deploykit.errors import ExportError
from deploykit.graph import TorchProgram
from deploykit.optional import installed_version, require
from deploykit.places import scratch_folder
from deploykit.spec import InputSpec

if TYPE_CHECKING:
    from torch.export import ExportedProgram

logger = logging.getLogger(__name__)

_MARCH = {"AVX512": "x86-64-v4", "AVX2": "x86-64-v3"}
_COMMON = {
    "freezing": True,
    "autotune_num_choices_displayed": 0,
    "max_autotune_report_choices_stats": False,
    # Precompiled headers pay where the next compilation finds them: 150 MB each, which would stay on the disk.
    "cpp_cache_precompile_headers": False,
    "aot_inductor.precompile_headers": False,
}


def lower(graph: TorchProgram, folder: Path, options: LowerOptions) -> Engine:
    """Compile the program to ``model.pt2``, for this machine; 10 to 60 s of work a mode.

    Args:
        folder: where the package goes; nothing is left there when the compilation fails.
        graph: the program, in any precision.
        options: its target is one of `INDUCTOR_MODES`; or `FASTEST_MODE`: all of them are compiled and timed in turns,
            once for a network, and the choice is remembered. None: the remembered one, or else `DEFAULT_MODE`.

    Raises:
        ExportError: there is no C++ compiler, or the compilation failed.
    """
    require("torch")
    target = options.target
    _check_compiler()
    with scratch_folder("inductor") as staging:
        if target in (None, FASTEST_MODE):
            package, choice = _chosen_package(graph, staging, measure=target == FASTEST_MODE)
        else:
            choice = ModeChoice(mode=str(target), milliseconds={})
            package = _compile(graph.program, staging, choice.mode)
        shutil.copyfile(package, folder / "model.pt2")
    torch_version = installed_version("torch") or "unknown"
    return Engine(
        file="model.pt2",
        runtime_version=torch_version,
        requires=machine_tie(),
        tools={"torch": torch_version},
        compiler=choice.as_text(),
    )


def _chosen_package(graph: TorchProgram, staging: Path, *, measure: bool) -> tuple[Path, ModeChoice]:
    """Return the package of the remembered mode; else of the fastest, which is then remembered, or of the default."""
    program = graph.program
    remembered = mode_address(program)
    choice = recall_mode(remembered)
    if choice is None and measure:
        packages = _compile_each(program, staging)
        choice = fastest({mode: _call(package, graph.input) for mode, package in packages.items()})
        keep_mode(remembered, choice)
        return packages[choice.mode], choice
    choice = choice or ModeChoice(mode=DEFAULT_MODE, milliseconds={})
    return _compile(program, staging, choice.mode), choice


def _compile_each(program: ExportedProgram, staging: Path) -> dict[str, Path]:
    """Return the package of every mode that compiles; a log line names one that does not.

    Raises:
        ExportError: none of them compiles.
    """
    packages: dict[str, Path] = {}
    failures: list[ExportError] = []
    for mode in INDUCTOR_MODES:
        try:
            packages[mode] = _compile(program, staging, mode)
        except ExportError as error:
            logger.warning("The mode %r is left out: %s", mode, error)
            failures.append(error)
    if not packages:
        raise failures[0]
    return packages


def _call(package: Path, spec: InputSpec) -> Callable[[], object]:
    """Return a call of a package on zeros, of the batch that it is tuned for."""
    torch = require("torch")
    loader = load_package(package)
    images = [torch.zeros(spec.shape_at(spec.best_batch), dtype=getattr(torch, spec.dtype))]
    return lambda: loader.run(images)


def _compile(program: ExportedProgram, staging: Path, mode: str) -> Path:
    """Return the package of a program in one mode.

    Raises:
        ExportError: the compilation failed.
    """
    torch = require("torch")
    package = staging / mode / "model.pt2"  # the file's name is also a name inside it
    package.parent.mkdir()
    try:
        # Without a folder of its own inductor leaves every engine in one that everybody can name before it is made.
        with _quiet(), torch._inductor.utils.fresh_cache(dir=str(package.parent), delete=False), torch.no_grad():
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(package), inductor_configs=_settings(mode)
            )
    except Exception as error:
        # inductor raises what its many stages raise; none of it is a type of its own.
        raise ExportError(
            f"torch.compile's ahead-of-time compilation failed: {_first_lines(error)}. "
            "Export for another runtime, or look at the error above this one."
        ) from error
    return package


def _settings(mode: str) -> dict[str, object]:
    """Frozen weights, the mode's own, and no instruction beyond those that `machine_tie` names.

    Inductor's own default, ``-march=native``, would add whatever else this processor has.
    """
    march = _MARCH.get(machine_tie()["cpu_capability"].partition("+")[0])
    known = march is not None and platform.machine() == "x86_64"
    # A number of threads that only this process has would be written into the code; every processor's is not.
    restricted = require("torch").get_num_threads() != os.cpu_count()
    threads = {"cpp.dynamic_threads": True} if restricted else {}
    return {**_COMMON, **threads, **({"cpp.march": march} if known else {}), **INDUCTOR_MODES[mode]}


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
            warnings.simplefilter("ignore")  # INT8 and templates warn at copies that torch makes of its own constants
            yield
    finally:
        log.setLevel(level)


def _first_lines(error: Exception, count: int = 3) -> str:
    return " ".join(str(error).strip().splitlines()[:count])
