"""Resident memory of a process, and stages of its work by time and peak memory."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_mb() -> float:
    """The highest resident memory of this process since its start, or since `reset_peak`, in MB.

    On Linux from ``VmHWM``: getrusage's figure begins at that of the process which started this one.
    """
    if _STATUS.exists():
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def resident_mb() -> float:
    """The resident memory of this process now, in MB; its peak where the system does not say."""
    return _status("VmRSS") if _STATUS.exists() else peak_mb()


def _status(field_name: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field_name}:"))
    return int(line.split()[1]) * 1024 / 1e6


def reset_peak() -> None:
    """Let the peak begin anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Seconds of a stage, and the highest resident memory in it, in MB."""

    name: str
    seconds: float
    peak_mb: float


@dataclass(kw_only=True)
class Stages:
    """A clock that is told when the next stage begins; a name that comes again adds to its stage."""

    found: dict[str, Stage] = field(default_factory=dict)
    _name: str = ""
    _start: float = 0.0

    def begin(self, name: str) -> None:
        """End the stage before, if any, and begin another."""
        self.end()
        reset_peak()
        self._name, self._start = name, time.perf_counter()

    def end(self) -> None:
        """End the stage that is under way."""
        if not self._name:
            return
        before = self.found.get(self._name, Stage(name=self._name, seconds=0.0, peak_mb=0.0))
        self.found[self._name] = Stage(
            name=self._name,
            seconds=before.seconds + time.perf_counter() - self._start,
            peak_mb=max(before.peak_mb, peak_mb()),
        )
        self._name = ""

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is inside as one stage."""
        self.begin(name)
        yield
        self.end()


def in_a_process(script: str, arguments: Sequence[str], **environment: str) -> Any:
    """Run a script where nothing else has run; return what its last line of output says, as JSON.

    Raises:
        SystemExit: it failed; its own last lines of errors.
    """
    merged = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env=merged, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[1:])} failed:\n" + "\n".join(done.stderr.splitlines()[-5:]))
    return json.loads(done.stdout.splitlines()[-1])
