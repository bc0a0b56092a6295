"""What networks call, in operators that the delegate has: one entry into it instead of several a block.

- LayerNorm -> two matrix products with a row of 1/C, for mean and variance, and products and sums of whole tensors.
- GroupNorm -> the same with means over each channel, which a product with a block diagonal joins to means of groups.
- attention -> two batched products around a softmax, behind the sum with a bias where it has one.
- split, chunk and select -> slices.
- hard-sigmoid -> a clamp between sums and products with floats; ExecuTorch's own lowering casts integers on each call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from deploykit.calibration.torch_integers import value_of
from deploykit.fusion.constants import operand

_ATEN = torch.ops.aten


def rewrite_operators(module: GraphModule) -> None:
    """Rewrite the operators above, in place; those with arguments that are not handled here stay."""
    for node in list(module.graph.nodes):
        rewrite = _REWRITES.get(node.target) if node.op == "call_function" else None
        if rewrite is not None:
            with module.graph.inserting_before(node):
                rewrite(module, node)
            if not node.users:  # which attention would survive: its dropout counts as an effect
                module.graph.erase_node(node)
    module.graph.eliminate_dead_code()


def _normalize(module: GraphModule, node: Node) -> None:
    """``(x - mean) * rsqrt(variance + eps) * weight + bias``, over the last dimension."""
    shape = node.args[1]
    if not isinstance(shape, (list, tuple)) or len(shape) != 1 or not isinstance(shape[0], int):
        return
    source, weight, bias, eps = operand(node, 0), *(_argument(node, index) for index in (2, 3)), _argument(node, 4)
    call = module.graph.call_function
    average = _constant(module, node, "average", torch.full((1, shape[0]), 1 / shape[0]))
    floor = _constant(module, node, "eps", torch.full((1,), eps if isinstance(eps, float) else 1e-5))
    mean = call(_ATEN.linear.default, (source, average))
    centred = call(_ATEN.sub.Tensor, (source, mean))
    square = call(_ATEN.mul.Tensor, (centred, centred))
    variance = call(_ATEN.linear.default, (square, average, floor))
    result = call(_ATEN.mul.Tensor, (centred, call(_ATEN.rsqrt.default, (variance,))))
    if isinstance(weight, Node):
        result = call(_ATEN.mul.Tensor, (result, weight))
    if isinstance(bias, Node):
        result = call(_ATEN.add.Tensor, (result, bias))
    _replace(node, result)


def _normalize_groups(module: GraphModule, node: Node) -> None:
    """The same over groups of channels of ``(N, C, H, W)`` and their places."""
    source, groups, shape = operand(node, 0), node.args[1], _shape(node)
    weight, bias, eps = (_argument(node, index) for index in (2, 3, 4))
    if shape is None or len(shape) != 4 or not isinstance(groups, int) or not isinstance(shape[1], int):
        return
    call, members = module.graph.call_function, shape[1] // groups
    joined = torch.kron(torch.eye(groups), torch.full((members, members), 1 / members))[..., None, None]
    average = _constant(module, node, "average", joined.contiguous())
    floor = _constant(module, node, "eps", torch.full((shape[1],), eps if isinstance(eps, float) else 1e-5))
    mean = call(_ATEN.conv2d.default, (call(_ATEN.mean.dim, (source, [2, 3], True)), average))
    centred = call(_ATEN.sub.Tensor, (source, mean))
    square = call(_ATEN.mul.Tensor, (centred, centred))
    variance = call(_ATEN.conv2d.default, (call(_ATEN.mean.dim, (square, [2, 3], True)), average, floor))
    result = call(_ATEN.mul.Tensor, (centred, call(_ATEN.rsqrt.default, (variance,))))
    for part, values, combine in (("weight", weight, _ATEN.mul.Tensor), ("bias", bias, _ATEN.add.Tensor)):
        if isinstance(values, Node):
            by_channel = value_of(module, values).reshape(-1, 1, 1).clone()
            result = call(combine, (result, _constant(module, node, part, by_channel)))
    _replace(node, result)


def _attend(module: GraphModule, node: Node) -> None:
    """``softmax(q @ k.T * scale + bias) @ v`` of ``(N, H, T, D)``, all heads in one batch."""
    queries, keys, values = (operand(node, position) for position in range(3))
    shape, bias = _shape(queries), _argument(node, 3) or node.kwargs.get("attn_mask")
    plain = len(node.args) <= 4 and not any(node.kwargs.get(name) for name in ("dropout_p", "is_causal", "enable_gqa"))
    if not plain or shape is None or len(shape) != 4 or not _is_bias(bias):
        return
    if shape[2] == 1 and (_shape(values) or ())[:3] == shape[:3]:
        # Of one token each gives its values; its scores (N, H, 1, 1) have two orders that look alike, as below.
        _replace(node, values)
        return
    call = module.graph.call_function
    scale = node.kwargs.get("scale")
    factor = float(shape[3]) ** -0.5 if scale is None else float(str(scale))
    flat = [call(_ATEN.flatten.using_ints, (each, 0, 1)) for each in (queries, keys, values)]
    scores = call(_ATEN.bmm.default, (flat[0], call(_ATEN.transpose.int, (flat[1], 1, 2))))
    if factor != 1:
        scores = call(_ATEN.mul.Tensor, (scores, _constant(module, node, "scale", torch.tensor([factor]))))
    if isinstance(bias, Node) and shape[1] == 1:
        # Four dimensions with one head have two orders that look alike, and the delegate computes in the other one.
        whole = bias if bias.meta["val"].dim() < len(shape) else call(_ATEN.flatten.using_ints, (bias, 0, 1))
        scores = call(_ATEN.add.Tensor, (scores, whole))
    elif isinstance(bias, Node):
        by_head = call(_ATEN.unflatten.int, (scores, 0, [-1, shape[1]]))
        scores = call(_ATEN.flatten.using_ints, (call(_ATEN.add.Tensor, (by_head, bias)), 0, 1))
    attention = call(_ATEN.softmax.int, (scores, -1))
    mixed = call(_ATEN.bmm.default, (attention, flat[2]))
    _replace(node, call(_ATEN.unflatten.int, (mixed, 0, [-1, shape[1]])))


def _is_bias(bias: object) -> bool:
    """Return whether what attention adds to its scores is nothing or numbers, and no mask of truth values."""
    value = bias.meta.get("val") if isinstance(bias, Node) else None
    return bias is None or (isinstance(value, Tensor) and value.is_floating_point())


def _slice_parts(module: GraphModule, node: Node) -> None:
    """Each part of a split as a slice."""
    source, dim, start = operand(node, 0), _argument(node, 2) or 0, 0
    parts = {user.args[1]: user for user in node.users if user.target == operator.getitem}
    values = node.meta.get("val")
    if not isinstance(dim, int) or not isinstance(values, (list, tuple)) or len(parts) != len(node.users):
        return
    for index, value in enumerate(values):
        size = int(value.shape[dim])
        if index in parts:
            part = module.graph.call_function(_ATEN.slice.Tensor, (source, dim, start, start + size))
            _replace(parts[index], part)
        start += size


def _slice_row(module: GraphModule, node: Node) -> None:
    """``x[:, i]`` as a slice whose dimension of one is merged into the one before it."""
    source, dim, index = operand(node, 0), _argument(node, 1), _argument(node, 2)
    if dim != 1 or not isinstance(index, int) or index < 0:
        return
    row = module.graph.call_function(_ATEN.slice.Tensor, (source, dim, index, index + 1))
    _replace(node, module.graph.call_function(_ATEN.flatten.using_ints, (row, 0, 1)))


def _gate(module: GraphModule, node: Node) -> None:
    """``clamp(x + 3, 0, 6) / 6``."""
    call = module.graph.call_function
    three, six = (
        _constant(module, node, name, torch.tensor([value])) for name, value in (("three", 3.0), ("six", 6.0))
    )
    raised = call(_ATEN.add.Tensor, (operand(node, 0), three))
    _replace(node, call(_ATEN.div.Tensor, (call(_ATEN.hardtanh.default, (raised, 0.0, 6.0)), six)))


_REWRITES: dict[object, Callable[[GraphModule, Node], None]] = {
    _ATEN.layer_norm.default: _normalize,
    _ATEN.group_norm.default: _normalize_groups,
    _ATEN.scaled_dot_product_attention.default: _attend,
    _ATEN.split.Tensor: _slice_parts,
    _ATEN.split_with_sizes.default: _slice_parts,
    _ATEN.chunk.default: _slice_parts,
    _ATEN.select.int: _slice_row,
    _ATEN.hardsigmoid.default: _gate,
}


def _replace(node: Node, result: Node) -> None:
    """Let every reader of a node read another, of the same shape."""
    result.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(result)


def _argument(node: Node, position: int) -> object:
    return node.args[position] if len(node.args) > position else None


def _shape(node: Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _constant(module: GraphModule, node: Node, part: str, value: Tensor) -> Node:
    name = f"{node.name}_{part}"
    module.register_buffer(name, value)
    return module.graph.get_attr(name)
