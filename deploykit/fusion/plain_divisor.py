"""avg_pool2d(x, divisor=d) -> avg_pool2d(pad(x)) * (k / d): ONNX has no such divisor, and torch's exporter drops it."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from deploykit.fusion.constants import add_call, argument, operand, replace, shape_of, tidy

_aten = torch.ops.aten


def plain_divisor(module: GraphModule) -> int:
    """Write each pooling with a divisor of its own as one over whole windows of a padded map.

    Exact. Left alone: sides that are not static.

    Returns:
        How many poolings were rewritten.
    """
    pools = module.graph.find_nodes(op="call_function", target=_aten.avg_pool2d.default)
    count = sum(_rewrite(pool) for pool in list(pools))
    if count:
        tidy(module)
    return count


def _rewrite(pool: Node) -> bool:
    divisor = argument(pool, 6, "divisor_override", None)
    source = operand(pool, 0)
    sides, windows = shape_of(source)[-2:], shape_of(pool)[-2:]
    if divisor is None or not all(isinstance(side, int) for side in (*sides, *windows)):
        return False
    kernel = _pair(pool.args[1])
    stride = _pair(argument(pool, 2, "stride", None) or kernel)
    begins = _pair(argument(pool, 3, "padding", 0))
    ends = [
        (count - 1) * step + size - side - begin
        for count, step, size, side, begin in zip(windows, stride, kernel, sides, begins, strict=True)
    ]
    amounts = [begins[1], ends[1], begins[0], ends[0]]
    padded = add_call(pool, _aten.constant_pad_nd.default, source, amounts) if any(amounts) else source
    mean = add_call(pool, _aten.avg_pool2d.default, padded, kernel, stride)
    replace(pool, add_call(pool, _aten.mul.Tensor, mean, kernel[0] * kernel[1] / divisor))
    return True


def _pair(value: Any) -> list[int]:
    """Return one number for both axes, or one for each, as two."""
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    return numbers * 2 if len(numbers) == 1 else numbers
