"""ONNX file -> TensorRT plan, in a process of its own with a time limit; needs neither torch nor onnx.

Used by export on a build machine, and by the runtime where a portable bundle is opened for the first time.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeAlias

import msgspec

from deploykit.child_process import child_environment, run_module
from deploykit.errors import ExportError

BUILD_SECONDS = 1800.0
"""A build that takes longer is stopped. TensorRT-RTX takes seconds, full TensorRT on a small device many minutes."""

SETTINGS_FILE = "tensorrt-build.json"
"""Where a portable bundle carries its `BuildSettings`."""

PROGRESS_MARK = "@"
NOT_WRITTEN = 3
"""The builder's exit status where a file could not be written; the reason is the last line of its log."""

_LOG_LINES = 12
_KEPT_LINES = 400
_CHANGED_TYPE = re.compile(
    r"defaulting to \w+ instead|will use \w+ instead|cast(ing)? down|does not natively support|a type was changed",
    re.IGNORECASE,
)
_NO_FP32_PRODUCT = "FP32 GEMM is not supported"  # TensorRT-RTX's own words for Turing

BuildProgress: TypeAlias = Callable[[str, int, int], None]
"""Hears of a phase of the build, the steps done and the steps in all."""


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """All that decides a plan beside the ONNX file; a portable bundle carries it.

    Args:
        flavour: the package that builds, one of `deploykit.backends.tensorrt.api.FLAVOURS`.
        input: the name of the graph's input.
        capability: ``sm86``; None: the GPU of the machine that builds.
        profile: the min, opt and max shape of the input; None when every shape is fixed.
        quantize_layers: how many quantize and dequantize layers the graph has, by type.
        tf32: whether FP32 products may be rounded to TF32's 10 bits of mantissa.
        hardware_compatibility: ``none``, ``same_compute_capability`` or ``ampere_plus``.
        version_compatible: the plan opens in newer versions of the same package.
    """

    flavour: str
    input: str
    capability: str | None = None
    profile: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None
    quantize_layers: dict[str, int] = field(default_factory=dict)
    tf32: bool = False
    hardware_compatibility: str = "none"
    version_compatible: bool = False


def requirements(settings: BuildSettings) -> dict[str, str]:
    """Return what a plan is tied to or was made with, for the manifest's ``requires``."""
    found = {"flavour": settings.flavour, "tf32": "on" if settings.tf32 else "off"}
    if settings.capability is not None:
        found["compute_capability"] = settings.capability
    if settings.hardware_compatibility != "none":
        found["hardware_compatibility"] = settings.hardware_compatibility
    if settings.version_compatible:
        found["version_compatible"] = "on"
    return found


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What the builder's process reads: files by their paths, and the settings. ``plan`` empty: only parse."""

    model: str
    plan: str
    settings: BuildSettings
    timing_cache: str = ""


def build_plan(
    model: Path,
    plan: Path,
    settings: BuildSettings,
    *,
    time_limit: float = BUILD_SECONDS,
    progress: BuildProgress | None = None,
    timing_cache: Path | None = None,
) -> None:
    """Build the ONNX file ``model`` into the file ``plan``, which appears whole or not at all.

    Args:
        model: an ONNX file; its external weights lie beside it.
        plan: the file to write.
        settings: what to build.
        time_limit: in seconds.
        progress: hears of TensorRT's own phases and steps.
        timing_cache: a file that keeps measured kernels between builds, where the package has such caches.

    Raises:
        ExportError: a build that failed, crashed or took too long, with the end of its log; or
            one in which TensorRT changed a type.
    """
    with tempfile.TemporaryDirectory(prefix=".tensorrt-", dir=plan.parent) as scratch:
        work = Path(scratch)
        request = BuildRequest(
            model=str(model.absolute()),
            plan=str(work.absolute() / "plan"),
            settings=settings,
            timing_cache=str(timing_cache.absolute()) if timing_cache is not None else "",
        )
        (work / "request.json").write_bytes(msgspec.json.encode(request))
        status, log = _run_builder(work / "request.json", time_limit, progress)
        _check(status, log, settings, built=(work / "plan").is_file(), time_limit=time_limit)
        (work / "plan").replace(plan)


def parse_model(model: Path, settings: BuildSettings, *, time_limit: float = BUILD_SECONDS) -> None:
    """Let TensorRT's parser read an ONNX file, without a build.

    Raises:
        ExportError: it refuses the file, or would change a type; with the end of its log.
    """
    with tempfile.TemporaryDirectory(prefix=".tensorrt-", dir=model.parent) as scratch:
        request = Path(scratch) / "request.json"
        request.write_bytes(msgspec.json.encode(BuildRequest(model=str(model.absolute()), plan="", settings=settings)))
        status, log = _run_builder(request, time_limit, None)
        _check(status, log, settings, built=True, time_limit=time_limit)


def _run_builder(request: Path, time_limit: float, progress: BuildProgress | None) -> tuple[int | None, list[str]]:
    """Return the builder's exit status (None: it was stopped) and the end of its log."""
    process = subprocess.Popen(
        run_module("deploykit.backends.tensorrt.builder", str(request)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=child_environment(),
        start_new_session=True,
    )
    log: deque[str] = deque(maxlen=_KEPT_LINES)
    assert process.stdout is not None  # noqa: S101  (PIPE was asked for; narrows the type)
    assert process.stderr is not None  # noqa: S101
    readers = [
        threading.Thread(target=_listen, args=(process.stdout, progress, log), daemon=True),
        threading.Thread(target=log.extend, args=(process.stderr,), daemon=True),
    ]
    for reader in readers:
        reader.start()
    deadline = time.monotonic() + time_limit
    try:
        status: int | None = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        status = None
    finally:
        _end(process)
        for reader in readers:
            reader.join()
        process.stdout.close()
        process.stderr.close()
    return status, [line.strip() for line in log if line.strip()]


def _end(process: subprocess.Popen[str]) -> None:
    """Kill the builder and all that it started; harmless after its end."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _listen(stream: IO[str], progress: BuildProgress | None, log: deque[str]) -> None:
    for line in stream:
        if not line.startswith(PROGRESS_MARK):
            log.append(line)
            continue
        if progress is None:
            continue
        with suppress(msgspec.MsgspecError, KeyError):
            step = msgspec.json.decode(line[len(PROGRESS_MARK) :])
            progress(step["phase"], step["step"], step["steps"])


def _check(status: int | None, log: list[str], settings: BuildSettings, *, built: bool, time_limit: float) -> None:
    tail = "".join(f"\n  {line}" for line in log[-_LOG_LINES:])
    if status is None:
        raise ExportError(
            f"the TensorRT build took more than {time_limit:g} s and was stopped. Try a smaller model or batch range."
            f"{tail}"
        )
    changed = [line for line in log if _CHANGED_TYPE.search(line)]
    if changed:
        raise ExportError(
            f"TensorRT would change a type in the graph, and with it the numbers: {changed[0]} "
            "Quantize with the tensorrt dialect, or keep INT64 and FP64 out of the graph."
        )
    if status == 0 and built:
        return
    everyone = settings.hardware_compatibility == "ampere_plus"
    what = settings.capability or ("every GPU since Ampere" if everyone else "the GPU here")
    if status == NOT_WRITTEN:
        raise ExportError(
            f"the TensorRT build for {what} could not write its file: {log[-1]}. Free some space there, or choose "
            "another folder, and build again."
        )
    if status < 0:
        hint = " Out of memory is the usual cause: free some, or try a smaller batch range." if status == -9 else ""
        raise ExportError(f"the TensorRT build for {what} crashed (signal {-status}).{hint}{tail}")
    if any(_NO_FP32_PRODUCT in line for line in log):
        raise ExportError(
            f"TensorRT-RTX has no FP32 matrix product for {what} (Turing), and this graph has one. "
            f"Export with precision='fp16', or Int8(float_dtype='fp16').{tail}"
        )
    raise ExportError(
        f"the TensorRT build for {what} failed. The end of its log names the node; "
        f"export for another runtime to see whether the graph itself runs.{tail}"
    )
