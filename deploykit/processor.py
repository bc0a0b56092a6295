"""Which processor this is, and which of its instructions make INT8 fast."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class Processor:
    """``cores`` are those that this process may use; ``int8`` and ``absent`` are instruction sets."""

    model: str
    cores: int
    int8: tuple[str, ...]
    absent: tuple[str, ...]


def read_processor(cpuinfo: Path = CPUINFO) -> Processor:
    """The processor as Linux describes it; without that file, only what Python knows."""
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


def _fields(text: str) -> dict[str, str]:
    """The first value of each ``name : value`` line."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, separator, value = line.partition(":")
        if separator:
            fields.setdefault(name.strip(), value.strip())
    return fields
