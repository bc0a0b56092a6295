"""f(x) = x -> x: dropout in eval mode, copies, views that change nothing, x * 1, x + 0, permutations that cancel.

First it brings the graph into one form: operators that work in place become their plain ones, views
become reshapes, and a reshape that spells out the batch infers it, which leaves no shape arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from deploykit.fusion.affine import LAYERS, PERMUTATIONS, permutation
from deploykit.fusion.constants import add_call, alike, argument, constant, replace, shape_of, tidy

_aten = torch.ops.aten
_DROPOUTS = (
    _aten.dropout.default,
    _aten.feature_dropout.default,
    _aten.alpha_dropout.default,
    _aten.feature_alpha_dropout.default,
)
_CONSTANT = _aten.lift_fresh_copy.default
"""``torch.tensor([...])`` in a forward: a copy of a buffer."""
_COPIES = (_aten.alias.default, _aten.clone.default, _aten.contiguous.default, _aten.detach.default, _CONSTANT)
_CASTS = (_aten.to.dtype, _aten.to.dtype_layout, _aten.to.device, _aten._to_copy.default, _aten.type_as.default)
_TRACED_FACTS = (_aten._assert_tensor_metadata.default,)
_VIEWS = (_aten.view.default, _aten._unsafe_view.default)
_NORMS = (_aten.batch_norm.default, _aten.layer_norm.default, _aten.group_norm.default)
_FRESH = (*LAYERS, *_NORMS, _aten.cat.default, _CONSTANT)
_SAME_WHEN_SHAPE_IS = (
    _aten.reshape.default,
    _aten.flatten.using_ints,
    _aten.unflatten.int,
    _aten.expand.default,
    _aten.narrow.default,
    _aten.repeat.default,
    _aten.slice.Tensor,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.squeeze.default,
)
_PADS = (_aten.pad.default, _aten.constant_pad_nd.default)
_NEUTRAL = {_aten.mul.Tensor: 1.0, _aten.div.Tensor: 1.0, _aten.add.Tensor: 0.0, _aten.sub.Tensor: 0.0}


def drop_identities(module: GraphModule) -> int:
    """Drop what does nothing in eval mode, and what no output reads.

    Left alone: dropout in training mode, an addition that widens a shape or changes a type, and
    every copy in a graph that still writes in place to something read elsewhere.

    Returns:
        How many nodes went, or were written more plainly.
    """
    rewrites: tuple[Callable[[GraphModule, Node], bool], ...] = (_compose_permutations, _compose_reshapes)
    count, changed = 0, True
    while changed:
        plain = _to_plain_form(module)
        copies = () if any(mutates(node) for node in module.graph.nodes) else _COPIES
        changed = plain > 0
        count += plain
        for node in list(module.graph.nodes):
            if node.target in _TRACED_FACTS:
                module.graph.erase_node(node)
            elif _is_identity(module, node, copies):
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
            elif not any(rewrite(module, node) for rewrite in rewrites):
                continue
            changed = True
            count += 1
    return count + tidy(module)


def mutates(node: Node) -> bool:
    """Return whether a call writes into one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def drop_in_place(graph: Graph) -> int:
    """Return ``add_(x, y)`` -> ``add(x, y)`` where nothing else can see the difference; returns how many."""
    count = 0
    for node in graph.nodes:
        plain = _out_of_place(node)
        if plain is not None:
            node.target = plain
            count += 1
    return count


def _to_plain_form(module: GraphModule) -> int:
    count = drop_in_place(module.graph)
    if any(mutates(node) for node in module.graph.nodes):
        return count
    for node in module.graph.nodes:
        if node.target in _VIEWS:
            node.target = _aten.reshape.default
        if node.target == _aten.reshape.default:
            count += _infer_batch(node)
    return count


def _out_of_place(node: Node) -> OpOverload | None:
    """The operator that does not overwrite the argument of ``node``, when nothing else can see the difference."""
    if not isinstance(node.target, OpOverload) or not mutates(node):
        return None
    written = node.args[0]
    name = node.target._schema.name.removeprefix("aten::")
    if not name.endswith("_") or not isinstance(written, Node) or len(written.users) != 1:
        return None
    if written.op != "call_function" or not _is_fresh(written):
        return None
    plain: OpOverload | None = getattr(getattr(_aten, name[:-1], None), node.target._overloadname, None)
    return plain


def _is_fresh(node: Node) -> bool:
    """Return whether a call surely gives memory of its own."""
    if not isinstance(node.target, torch._ops.OpOverload) or mutates(node):
        return False
    views = any(value.alias_info is not None for value in node.target._schema.arguments)
    return not views and (node.target in _FRESH or torch.Tag.pointwise in node.target.tags)


def _infer_batch(node: Node) -> bool:
    """Return ``reshape(x, [n * 4, 3])`` -> ``reshape(x, [-1, 3])``."""
    shape = shape_of(node)
    symbolic = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    if len(symbolic) != 1 or not any(isinstance(size, Node) for size in argument(node, 1, "shape", ())):
        return False
    if any(size == 0 for size in shape):
        return False
    node.args = (node.args[0], [size if isinstance(size, int) else -1 for size in shape])
    return True


def _is_identity(module: GraphModule, node: Node, copies: tuple[object, ...]) -> bool:
    source = node.args[0] if node.args else None
    if node.op != "call_function" or not isinstance(source, Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    if node.target in _DROPOUTS:
        return argument(node, 2, "train", True) is False or float(argument(node, 1, "p", 1)) == 0
    return node.target in copies or (alike(source, node) and _changes_nothing(module, node, copies))


def _changes_nothing(module: GraphModule, node: Node, copies: tuple[object, ...]) -> bool:
    """Return whether a call gives its first argument, when the two are known to have one shape and type."""
    if node.target in PERMUTATIONS:
        return permutation(node) == sorted(permutation(node))
    if node.target in _PADS:
        return not any(argument(node, 1, "pad", ()))
    if node.target in _NEUTRAL:
        return _is_all(module, node.args[1], _NEUTRAL[node.target])
    return node.target in _SAME_WHEN_SHAPE_IS or (bool(copies) and node.target in _CASTS)


def _is_all(module: GraphModule, value: object, number: float) -> bool:
    tensor = constant(module, value)
    if tensor is None:
        return isinstance(value, (int, float)) and value == number
    return bool((tensor == number).all())


def _compose_permutations(module: GraphModule, node: Node) -> bool:
    """Two permutations in a row become one, when nothing else reads between them or they cancel."""
    inner = node.args[0] if node.args else None
    if node.target not in PERMUTATIONS or not isinstance(inner, Node) or inner.target not in PERMUTATIONS:
        return False
    first, second = permutation(inner), permutation(node)
    order = [first[axis] for axis in second]
    if len(inner.users) != 1 and order != sorted(order):
        return False
    source = inner.args[0]
    assert isinstance(source, Node)  # noqa: S101  (what a permutation permutes)
    replace(node, source if order == sorted(order) else add_call(node, _aten.permute.default, source, order))
    return True


def _compose_reshapes(module: GraphModule, node: Node) -> bool:
    inner = node.args[0] if node.args else None
    if node.target != _aten.reshape.default or not isinstance(inner, Node) or len(inner.users) != 1:
        return False
    if inner.target not in (_aten.reshape.default, _aten.flatten.using_ints):
        return False
    node.args = (inner.args[0], node.args[1])
    module.graph.erase_node(inner)
    return True
