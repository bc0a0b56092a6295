"""What a .tflite file computes in float, read from the file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from deploykit.backends.litert.flatbuffer import WEIGHTED, Operator, TFLiteModel

_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")


def left_in_float(engine: Path) -> dict[str, int]:
    """Count conversions, and the operators of constant weights that run in float, by operator."""
    model = TFLiteModel(engine.read_bytes())
    found: Counter[str] = Counter()
    for operator in model.operators():
        if operator.name in _CONVERSIONS:
            found[operator.name] += 1
        elif operator.name in WEIGHTED:
            found[f"float {operator.name}"] += has_float_weight(model, operator)
    return {name: count for name, count in sorted(found.items()) if count}


def has_float_weight(model: TFLiteModel, operator: Operator) -> bool:
    """Return whether an operator reads a float weight: a constant, or one that is dequantized on every call."""
    index = operator.inputs[1]
    if model.is_integer(operator.graph, index):
        return False
    return _is_constant(model, operator.graph, index)


def _is_constant(model: TFLiteModel, graph: Any, index: int) -> bool:
    if model.constant(graph.tensors[index]) is not None:
        return True
    makers = [raw for raw in graph.operators if index in list(raw.outputs)]
    return bool(makers) and all(_is_constant(model, graph, int(source)) for source in makers[0].inputs if source >= 0)
