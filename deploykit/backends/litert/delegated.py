"""Operators in the form that LiteRT's XNNPACK delegate takes, so that a file is one call of it.

- ``HARD_SWISH(int8) -> QUANTIZE(HARD_SWISH(DEQUANTIZE(int8)))``, and the same for what else the delegate has for float
  alone. The converter writes int8 operators, whose kernels outside of the delegate compute one number at a time, and
  each of which cuts the network in two.
- ``TRANSPOSE(TRANSPOSE(x)) -> x``, where they cancel: the converter copies each level to channels first, and then the
  copy back for the layers behind it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from deploykit.backends.litert.flatbuffer import TFLiteModel

_FLOAT_ALONE = frozenset({"ABS", "EXP", "GELU", "HARD_SWISH", "NEG", "RELU", "RELU6", "RSQRT", "SQRT", "SQUARE"})
"""Operators of one input, as ``VisitUnaryNode`` of LiteRT's ``xnnpack_delegate.cc`` tells them."""


def fit_delegate(content: bytes) -> bytes:
    """Return a .tflite file with both rewrites."""
    model = TFLiteModel(content)
    found = [each for graph in model.raw.subgraphs for each in (_restore(model, graph), _drop_transposes(model, graph))]
    return model.pack() if any(found) else content


def _restore(model: TFLiteModel, graph: Any) -> int:
    """Let operators compute in float between a DQ and a Q; return how many."""
    operators: list[Any] = []
    restored = 0
    for raw in graph.operators:
        if model.name_of(raw) not in _FLOAT_ALONE or not model.is_integer(graph, int(raw.inputs[0])):
            operators.append(raw)
            continue
        (source,), (target,) = raw.inputs, raw.outputs
        ends = [
            model.add_tensor(graph, bytes(graph.tensors[index].name) + b"/float", graph.tensors[index], "FLOAT32")
            for index in (source, target)
        ]
        raw.inputs, raw.outputs = (np.array([end], np.int32) for end in ends)
        before, after = ("DEQUANTIZE", source, ends[0]), ("QUANTIZE", ends[1], target)
        operators += [model.conversion(*before), raw, model.conversion(*after)]
        restored += 1
    graph.operators = operators
    return restored


def _drop_transposes(model: TFLiteModel, graph: Any) -> int:
    """Let what reads a tensor that was transposed and transposed back read the tensor itself; return how many."""
    transposes = {int(raw.outputs[0]): raw for raw in graph.operators if model.name_of(raw) == "TRANSPOSE"}
    kept = {int(index) for index in graph.outputs}
    same: dict[int, int] = {}
    for index, raw in transposes.items():
        first = transposes.get(int(raw.inputs[0]))
        if first is not None and index not in kept and _cancel(model, graph, first, raw):
            source = int(first.inputs[0])
            same[index] = same.get(source, source)
    graph.operators = [raw for raw in graph.operators if int(raw.outputs[0]) not in same]
    for raw in graph.operators:
        raw.inputs = np.array([same.get(int(index), int(index)) for index in raw.inputs], np.int32)
    return len(same)


def _cancel(model: TFLiteModel, graph: Any, first: Any, second: Any) -> bool:
    """Return whether two constant permutations, one behind the other, change nothing."""
    orders = [model.constant(graph.tensors[int(raw.inputs[1])]) for raw in (first, second)]
    if orders[0] is None or orders[1] is None:
        return False
    one, other = (np.frombuffer(order.tobytes(), np.int32) for order in orders if order is not None)
    return bool(np.array_equal(one[other], np.arange(len(one))))
