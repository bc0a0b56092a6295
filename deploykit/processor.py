"""Which processor this is, which of its instructions make INT8 fast, and where INT8 products saturate.

x86 processors without VNNI or AMX multiply uint8 by int8 with ``vpmaddubsw``, which adds two products in
16 bits: 255 * (127 + 127) does not fit. 255 * 128 does, so weights are exact there when no two of one sign add
up to more, which ``Int8(reduce_range=True)`` sees to.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

INT8_X86: dict[str, str] = {
    "avx2": "AVX2",
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_int8": "AMX-INT8",
}
INT8_ARM: dict[str, str] = {"asimddp": "dotprod", "i8mm": "i8mm"}
"""The kernel's name of each instruction set to the name that people use."""

PROCESSOR_TARGETS: dict[str, bool] = {
    "x86-avx2": True,
    "x86-avx512": True,
    "x86-vnni": False,
    "arm64": False,
}
"""Processors that an INT8 engine can be made for, and whether products of 8-bit weights saturate there."""

_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
_EXACT_X86 = frozenset({"AVX512-VNNI", "AVX-VNNI", "AMX-INT8"})


@dataclass(frozen=True, kw_only=True)
class Processor:
    """``cores`` are those that this process may use; ``int8`` and ``absent`` are instruction sets."""

    model: str
    cores: int
    int8: tuple[str, ...]
    absent: tuple[str, ...]

    @property
    def saturates(self) -> bool:
        """Whether it is known to be an x86 processor that adds INT8 products in 16 bits."""
        return set(self.absent) >= _EXACT_X86


def read_processor(cpuinfo: Path = CPUINFO) -> Processor:
    """Return the processor as Linux describes it; without that file, only what Python knows."""
    try:
        fields = _fields(cpuinfo.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        fields = {}
    known = INT8_ARM if "Features" in fields or platform.machine() in ("aarch64", "arm64") else INT8_X86
    flags = set((fields.get("Features") or fields.get("flags") or "").split())
    affinity = getattr(os, "sched_getaffinity", None)
    return Processor(
        model=fields.get("model name") or fields.get("Model") or platform.processor() or platform.machine(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        int8=tuple(name for flag, name in known.items() if flag in flags),
        absent=tuple(name for flag, name in known.items() if flag not in flags) if flags else (),
    )


@cache
def this_processor() -> Processor:
    """Return `read_processor` of this machine, read once."""
    return read_processor()


def machine_key(seen_on: Mapping[str, str], threads: int | None = None, cpuinfo: Path = CPUINFO) -> str:
    """Return a digest of all that decides the bits that an engine gives.

    Args:
        seen_on: the system, the processor, the device and the versions, from `Runtime.seen_on`.
        threads: how many threads compute: sums may be split by them; None: as many as there are cores.
        cpuinfo: where the processor's instructions are listed.
    """
    try:
        fields = _fields(cpuinfo.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        fields = {}
    flags = sorted((fields.get("Features") or fields.get("flags") or "").split())
    text = json.dumps([dict(seen_on), threads, flags, read_processor(cpuinfo).cores], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def this_machine() -> str:
    """Return this machine's instruction set as Linux names it: ``x86_64``, ``aarch64``."""
    name = platform.machine().lower()
    return _MACHINES.get(name, name)


def saturates(target: str | None) -> bool:
    """Return whether products of 8-bit weights saturate on one of `PROCESSOR_TARGETS`; None: on this machine."""
    return PROCESSOR_TARGETS[target] if target in PROCESSOR_TARGETS else this_processor().saturates


def _fields(text: str) -> dict[str, str]:
    """Return the first value of each ``name : value`` line."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, separator, value = line.partition(":")
        if separator:
            fields.setdefault(name.strip(), value.strip())
    return fields
