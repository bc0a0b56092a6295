"""What a plan's first bytes say, read without TensorRT: a damaged or foreign plan never reaches its parser.

TensorRT-RTX writes ``vtrt``, at byte 16 the plan's length in 8 bytes, and at byte 24 its version in
4 bytes (seen in 1.7). Full TensorRT's header differs, and its plans are left to TensorRT itself.
"""

from __future__ import annotations

import re
import struct

from deploykit.backends.tensorrt.api import RTX
from deploykit.errors import IncompatibleEngine

_RTX_MAGIC = b"vtrt"
_RTX_HEADER = struct.Struct("<4s12xQ4B")


def check_plan(plan: bytes, flavour: str, version: str) -> None:
    """Refuse what cannot be a whole plan of a flavour and version.

    Raises:
        IncompatibleEngine: truncated, not a plan, or another version's.
    """
    again = "Copy the bundle again, or export it again for this machine."
    if flavour != RTX:
        if plan.startswith(_RTX_MAGIC):
            raise IncompatibleEngine(f"the engine is a plan of TensorRT-RTX, and the manifest says {flavour}. {again}")
        return
    if len(plan) < _RTX_HEADER.size or not plan.startswith(_RTX_MAGIC):
        raise IncompatibleEngine(
            f"the engine is no plan of TensorRT-RTX: it has {len(plan)} bytes and begins with {plan[:4]!r}; "
            f"expected {_RTX_MAGIC!r}. {again}"
        )
    _, length, *numbers = _RTX_HEADER.unpack_from(plan)
    if length != len(plan):
        raise IncompatibleEngine(f"the plan has {len(plan)} bytes and its header says {length}. {again}")
    expected = [int(number) & 0xFF for number in re.findall(r"\d+", version)[:4]]
    if numbers != expected:
        found = ".".join(map(str, numbers))
        raise IncompatibleEngine(
            f"the plan was written by TensorRT-RTX {found}, and the manifest says {version}. {again}"
        )
