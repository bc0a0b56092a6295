"""Antialiased resize(x) -> A x B^T: a linear map of each axis, whose weights are constants for the exported size.

torch's ONNX exporter drops the scales of such a resize, and few runtimes have one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from deploykit.fusion.constants import add_call, add_constant, argument, operand, replace, shape_of, tidy

_aten = torch.ops.aten
_RESIZES = {
    _aten._upsample_bilinear2d_aa.default: _aten._upsample_bilinear2d_aa.default,
    _aten._upsample_bilinear2d_aa.vec: _aten._upsample_bilinear2d_aa.default,
    _aten._upsample_bicubic2d_aa.default: _aten._upsample_bicubic2d_aa.default,
    _aten._upsample_bicubic2d_aa.vec: _aten._upsample_bicubic2d_aa.default,
}


def resize_by_matrix(module: GraphModule) -> int:
    """Write each antialiased resize as two matrix products, rows first.

    Exact. The constant is the left operand of both, so that no quantizer takes it for the weight of a layer. Left
    alone: sides that are not static, and results one pixel wide, which torch 2.13 computes by the memory's layout.

    Returns:
        How many resizes were rewritten.
    """
    resizes = [node for target in _RESIZES for node in module.graph.find_nodes(op="call_function", target=target)]
    count = sum(_rewrite(module, node) for node in resizes)
    if count:
        tidy(module)
    return count


def _rewrite(module: GraphModule, resize: Node) -> bool:
    source = operand(resize, 0)
    sides = [side for side in (*shape_of(source)[2:], *shape_of(resize)[2:]) if isinstance(side, int)]
    if len(sides) != 4 or len(shape_of(source)) != 4:
        return False
    height, width, new_height, new_width = sides
    if new_width == 1 < new_height:
        return False
    vertical, horizontal = _scales(resize)
    rows = _weights(resize, height, new_height, vertical)
    columns = _weights(resize, width, new_width, horizontal)
    tall = add_call(resize, _aten.matmul.default, _constant(module, resize, "rows", rows), source)
    turned = add_call(resize, _aten.transpose.int, tall, 2, 3)
    wide = add_call(resize, _aten.matmul.default, _constant(module, resize, "columns", columns), turned)
    replace(resize, add_call(resize, _aten.transpose.int, wide, 2, 3))
    return True


def _constant(module: GraphModule, resize: Node, part: str, weights: Tensor) -> Node:
    return add_constant(module, f"constants.{resize.name}_{part}", weights.float())


def _scales(resize: Node) -> tuple[float | None, float | None]:
    """Return the factors that the resize was given for height and width; None: the quotient of the sizes."""
    if len(resize.target._schema.arguments) == 4:  # type: ignore[union-attr]  # .vec
        factors = argument(resize, 3, "scale_factors", None)
        return (None, None) if factors is None else tuple(factors)
    return argument(resize, 3, "scales_h", None), argument(resize, 4, "scales_w", None)


def _weights(resize: Node, side: int, new_side: int, scale: float | None) -> Tensor:
    """Return what the resize makes of unit impulses along one axis: ``(new_side, side)``, in double precision."""
    impulses = torch.eye(side, dtype=torch.float64)[None, None]
    operator = _RESIZES[resize.target]  # type: ignore[index]
    with torch.no_grad():
        weights: Tensor = operator(impulses, [new_side, side], argument(resize, 2, "align_corners", False), scale, None)
    return weights[0, 0]
