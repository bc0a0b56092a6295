"""f(constants) -> constant: position bias tables, masks and grids are evaluated once, for the exported size."""

from __future__ import annotations

import operator
from typing import TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from deploykit.fusion.constants import add_constant, constant, operator_of, tidy
from deploykit.fusion.drop_identities import mutates

Value: TypeAlias = Tensor | tuple[Tensor, ...] | list[Tensor]
"""What a call gives."""

MAX_BYTES = 16 * 2**20
"""No constant above this is made, unless what it is made of is at least as large."""


def fold_constants(module: GraphModule) -> int:
    """Evaluate the nodes that depend on parameters and buffers alone, and keep what others read of them.

    Exact: the same operators run on the same numbers. Left alone: random operators, what writes in
    place, and a result above `MAX_BYTES` that a cheap operator makes of less (an expanded mask).

    Returns:
        How many nodes went.
    """
    if any(mutates(node) for node in module.graph.nodes):
        return 0
    values = _evaluate(module)
    kept = [node for node in values if node.op != "get_attr" and any(user not in values for user in node.users)]
    for node in kept:
        value = values[node]
        if isinstance(value, Tensor):
            node.replace_all_uses_with(add_constant(module, f"constants.{node.name}", value.clone()))
    return tidy(module)


def _evaluate(module: GraphModule) -> dict[Node, Value]:
    values: dict[Node, Value] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = constant(module, node)
            if value is not None:
                values[node] = value
        elif node.op == "call_function" and _is_pure(node) and all(read in values for read in node.all_input_nodes):
            result = _call(node, values)
            if _bytes(result) <= max(MAX_BYTES, sum(_bytes(values[read]) for read in node.all_input_nodes)):
                values[node] = result
    return values


def _call(node: Node, values: dict[Node, Value]) -> Value:
    arguments = map_arg(node.args, lambda read: values[read])
    settings = map_arg(node.kwargs, lambda read: values[read])
    with torch.no_grad():
        result: Value = operator_of(node)(*arguments, **settings)
    return result


def _is_pure(node: Node) -> bool:
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    empty = str(node.target).startswith(("aten.empty", "aten.new_empty"))
    updates_statistics = node.target == torch.ops.aten.batch_norm.default and node.args[5] and node.args[3] is not None
    return not empty and not updates_statistics


def _bytes(value: Value) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_bytes(part) for part in value) if isinstance(value, (list, tuple)) else 0
