"""The oldest OpenVINO that reads an IR: by the opsets of its layers, not by who wrote it."""

from __future__ import annotations

import re

RELEASES: tuple[tuple[str, int], ...] = (
    ("2024.0", 13),
    ("2024.1", 14),
    ("2024.4", 15),
    ("2025.0", 16),
)
"""Each release with a newer opset than the one before: (release, number of the opset)
(docs.openvino.ai, "Available Operations Sets").
"""

IR_VERSION = b"11"

_LAYER = re.compile(rb'<layer\b[^>]*?\bversion="([^"]*)"')
_NET = re.compile(rb'<net\b[^>]*?\bversion="(\d+)"')


def least_version(engine: bytes, name: str) -> str | None:
    """Return the oldest release that reads an IR; None: it holds a layer of no opset that is known here."""
    del name
    net = _NET.search(engine)
    opsets = set(_LAYER.findall(engine))
    numbers = {int(opset[5:]) for opset in opsets if re.fullmatch(rb"opset\d+", opset)}
    if net is None or net[1] != IR_VERSION or len(numbers) < len(opsets) or not numbers:
        return None
    return next((release for release, newest in RELEASES if max(numbers) <= newest), None)
