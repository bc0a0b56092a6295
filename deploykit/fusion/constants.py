"""Small edits of a flat `torch.export` graph module: constants behind ``get_attr`` nodes, new nodes, tidying.

A pass never writes into a tensor: it puts a new one in its place, so the module that was traced keeps its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import SymInt, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node, map_arg

Size: TypeAlias = int | SymInt
"""One side of a tensor; a symbol where it follows the batch."""

Target: TypeAlias = Callable[..., Any]
"""An operator, as a node calls it."""

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def constant(module: GraphModule, node: object) -> Tensor | None:
    """Return the tensor behind a ``get_attr`` node; None for anything else."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    value = getattr(module.get_submodule(owner), name, None)
    return value.detach() if isinstance(value, Tensor) else None


def used_once(module: GraphModule, node: object) -> bool:
    """Return whether a ``get_attr`` node is the only reading of its constant: nothing shares it."""
    if constant(module, node) is None:
        return False
    assert isinstance(node, Node)  # noqa: S101  (a constant is a node; narrows the type)
    readings = [other for other in module.graph.find_nodes(op="get_attr") if other.target == node.target]
    arguments = [value for reading in readings for user in reading.users for value in user.all_input_nodes]
    return sum(value in readings for value in arguments) == 1


def set_constant(module: GraphModule, node: Node, value: Tensor) -> None:
    """Put a new tensor behind a ``get_attr`` node, under the same name."""
    owner, _, name = str(node.target).rpartition(".")
    holder = module.get_submodule(owner)
    is_buffer = name in holder._buffers
    delattr(holder, name)
    _register(holder, name, value, is_buffer=is_buffer)
    node.meta["val"] = _abstract_constant(module, value)


def add_constant(module: GraphModule, name: str, value: Tensor) -> Node:
    """Register a tensor as ``name``, or as ``name_2``, ``name_3`` ... where that is taken, and read it.

    Args:
        module: whose graph gets the ``get_attr`` node, before all others.
        name: dotted; the submodule that it names is made where it is absent.
        value: the tensor.
    """
    owner, _, leaf = name.rpartition(".")
    holder: nn.Module = module
    for part in owner.split(".") if owner else ():
        if not hasattr(holder, part):
            holder.add_module(part, nn.Module())
        holder = getattr(holder, part)
    free, count = leaf, 1
    while hasattr(holder, free):
        count += 1
        free = f"{leaf}_{count}"
    _register(holder, free, value, is_buffer=not value.is_floating_point())
    first = next(iter(module.graph.nodes))
    with module.graph.inserting_before(first):
        node = module.graph.get_attr(f"{owner}.{free}" if owner else free)
    node.meta["val"] = _abstract_constant(module, value)
    return node


def add_call(before: Node, target: Target, *arguments: Any, **settings: Any) -> Node:
    """Return a call of an operator before a node, with its shape known to the passes that follow."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, arguments, settings)
    set_value(node)
    return node


def set_value(node: Node) -> None:
    """Work out the abstract result of a call from those of its arguments."""
    arguments = map_arg(node.args, lambda read: read.meta["val"])
    settings = map_arg(node.kwargs, lambda read: read.meta["val"])
    with _fake_mode(node.graph), torch.no_grad():
        node.meta["val"] = operator_of(node)(*arguments, **settings)


def operator_of(node: Node) -> Target:
    """Return the operator that a node calls."""
    assert callable(node.target)  # noqa: S101  (of a call_function node; narrows the type)
    return node.target


def shape_of(node: Node) -> tuple[Size, ...]:
    """Return the sizes of a node's tensor, ints or symbols; empty where it gives none."""
    return tuple(getattr(node.meta.get("val"), "shape", ()))


def sizes(node: Node) -> tuple[int, ...]:
    """Return the sizes of a node's tensor when the graph runs on the images that it was traced with."""
    return tuple(hint(size) for size in shape_of(node))


def hint(size: Size) -> int:
    """Return a symbolic size as it was when the graph was traced."""
    return size if isinstance(size, int) else int(size.node.hint)


def alike(one: Node, other: Node) -> bool:
    """Return whether two nodes have the same shape, whatever the batch is, and the same type."""
    first, second = shape_of(one), shape_of(other)
    types = {getattr(node.meta.get("val"), "dtype", None) for node in (one, other)}
    if len(types) != 1 or None in types:
        return False
    return len(first) == len(second) and all(same_size(left, right) for left, right in zip(first, second, strict=True))


def same_size(one: Size, other: Size) -> bool:
    """Return whether two sizes are equal whatever the batch is."""
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    return str(one) == str(other)


def scalar(module: GraphModule, value: object) -> float | None:
    """Return a number, or the one element of a constant tensor; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    tensor = constant(module, value)
    return float(tensor) if tensor is not None and tensor.numel() == 1 else None


def argument(node: Node, position: int, name: str, default: Any) -> Any:
    """Return an operator's argument, given by position or by name, or its default."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def replace(old: Node, new: Node) -> None:
    """Let everything that reads ``old`` read ``new``, and remove ``old``."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def tidy(module: GraphModule) -> int:
    """Remove nodes that nothing reads and constants that no node reads; returns how many calls went."""
    before = _calls(module)
    remove_unread(module.graph)
    used = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
    module.delete_all_unused_submodules()
    module.recompile()
    return before - _calls(module)


def remove_unread(graph: torch.fx.Graph) -> None:
    """Remove calls that nothing reads, attention too, which torch keeps because its dropout draws random numbers."""
    graph.eliminate_dead_code(lambda node: node.target != ATTENTION and node.is_impure())


def operand(node: Node, position: int) -> Node:
    """Return what a node reads at a position, where that has to be another node."""
    read = node.args[position]
    assert isinstance(read, Node)  # noqa: S101  (by the operator; narrows the type)
    return read


def readers(node: Node, targets: Sequence[object]) -> list[Node] | None:
    """Everything that reads a node, when all of it calls one of ``targets`` with the node as first argument only."""
    found = list(node.users)
    direct = all(user.target in targets and user.args[0] is node and _uses(user, node) == 1 for user in found)
    return found if found and direct else None


def _uses(user: Node, node: Node) -> int:
    count = 0

    def visit(read: Node) -> Node:
        nonlocal count
        count += read is node
        return read

    map_arg((user.args, user.kwargs), visit)
    return count


def _calls(module: GraphModule) -> int:
    return sum(node.op == "call_function" for node in module.graph.nodes)


def _register(holder: nn.Module, name: str, value: Tensor, *, is_buffer: bool) -> None:
    if is_buffer:
        holder.register_buffer(name, value.contiguous())
    else:
        holder.register_parameter(name, nn.Parameter(value.contiguous(), requires_grad=False))


def _abstract_constant(module: GraphModule, value: Tensor) -> Tensor:
    with _fake_mode(module.graph):
        return torch.empty(value.shape, dtype=value.dtype)


def _fake_mode(graph: torch.fx.Graph) -> FakeTensorMode:
    mode: FakeTensorMode = next(iter(graph.find_nodes(op="placeholder"))).meta["val"].fake_mode
    return mode
