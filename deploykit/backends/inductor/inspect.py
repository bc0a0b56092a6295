"""Which kernels an AOTInductor package calls, read from the source that it carries."""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from pathlib import Path

_CALL = re.compile(r"\baoti_torch_(?:cpu_)?_*(\w+?)(?:_tensor)?\(")
_INTEGER = re.compile(r"q(conv|conv2d|linear)_pointwise(_binary)?")
_FLOAT = {
    "float convolution": re.compile(r"(mkldnn__)?convolution(_pointwise(_binary_?)?)?"),
    "float linear": re.compile(r"linear_pointwise(_binary)?|(addmm|mm)_out"),
}


def kernels_called(package: Path) -> Counter[str]:
    """How often the package's code calls each of torch's kernels in one run: ``{"qconv_pointwise": 20, ...}``."""
    with zipfile.ZipFile(package) as archive:
        sources = [archive.read(name).decode() for name in archive.namelist() if name.endswith(".wrapper.cpp")]
    return Counter(match.group(1) for source in sources for match in _CALL.finditer(source))


def integer_kernels(package: Path) -> int:
    """Return how many convolutions and matrix products of constant weights run in integers."""
    return sum(count for kernel, count in kernels_called(package).items() if _INTEGER.fullmatch(kernel))


def left_in_float(package: Path) -> dict[str, int]:
    """Return how many of them run in float, by kind; kinds that there are none of are left out."""
    called = kernels_called(package)
    found = {
        kind: sum(count for kernel, count in called.items() if pattern.fullmatch(kernel))
        for kind, pattern in _FLOAT.items()
    }
    return {kind: count for kind, count in found.items() if count}
