"""(x @ Wq, x @ Wk, x @ Wv) -> split(x @ [Wq Wk Wv]): separate projections of one attention become one product."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from deploykit.fusion.affine import LINEAR, is_layer
from deploykit.fusion.constants import ATTENTION, add_call, add_constant, argument, constant, operand, tidy
from deploykit.fusion.shape_chains import origin, sources


def merge_linears(module: GraphModule) -> int:
    """Merge the linears over one input that give an attention's queries, keys and values (or two of them).

    Exact: each output is the same sum. Left alone: projections of different inputs
    (cross-attention's queries), and linears whose weight is shared.

    Returns:
        How many linears went.
    """
    merged = 0
    for attention in sources(module, ATTENTION):
        origins = dict.fromkeys(origin(read) for read in attention.args[:3] if isinstance(read, Node))
        groups: dict[Node, list[Node]] = {}
        for linear in origins:
            if linear.target == LINEAR and is_layer(module, linear) and isinstance(linear.args[0], Node):
                groups.setdefault(linear.args[0], []).append(linear)
        for group in groups.values():
            if len(group) > 1:
                _merge(module, group)
                merged += len(group) - 1
    if merged:
        tidy(module)
    return merged


def _merge(module: GraphModule, group: list[Node]) -> None:
    group = [node for node in module.graph.nodes if node in group]
    weights = [_constant(module, linear.args[1]) for linear in group]
    biases = [constant(module, argument(linear, 2, "bias", None)) for linear in group]
    name = str(operand(group[0], 1).target)
    owner = name.rpartition(".")[0] or name
    weight = add_constant(module, f"{owner}_merged.weight", torch.cat(weights))
    bias = None
    if any(value is not None for value in biases):
        filled = [
            torch.zeros(len(rows), dtype=rows.dtype) if value is None else value
            for rows, value in zip(weights, biases, strict=True)
        ]
        bias = add_constant(module, f"{owner}_merged.bias", torch.cat(filled))
    # Before the first of them: what reads any of them comes later.
    joint = add_call(group[0], LINEAR, group[0].args[0], weight, bias)
    parts = add_call(group[0], torch.ops.aten.split_with_sizes.default, joint, [len(rows) for rows in weights], -1)
    for index, linear in enumerate(group):
        part = add_call(linear, operator.getitem, parts, index)
        linear.replace_all_uses_with(part)
        module.graph.erase_node(linear)


def _constant(module: GraphModule, node: object) -> torch.Tensor:
    value = constant(module, node)
    assert value is not None  # noqa: S101  (checked by is_layer; narrows the type)
    return value
