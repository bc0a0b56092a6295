"""What an .mlpackage folder computes in float, read from its program."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from deploykit.backends.coreml.integer_weights import integer_layers
from deploykit.backends.coreml.mil_program import read_program

_CONVERSIONS = ("quantize", "dequantize")


def left_in_float(engine: Path) -> dict[str, int]:
    """Count conversions, and the operators of constant weights that have float ones or read floats, by operator.

    Args:
        engine: the package's ``Manifest.json``.
    """
    program = read_program(engine.parent)
    found = Counter(operation.kind for operation in program.operations if operation.kind in _CONVERSIONS)
    integer = {layer.name for layer in integer_layers(program)}
    found.update(f"float {operation.kind}" for operation, _ in program.weighted() if operation.output not in integer)
    return dict(sorted(found.items()))
