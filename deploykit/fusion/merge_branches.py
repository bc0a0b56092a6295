"""Conv(w1)(x) + Conv(w2)(x) + s * x + t -> Conv(w1 + w2 + s * I, t)(x), the smaller kernels padded with zeros.

RepVGG (Ding et al., 2021), MobileOne (Vasu et al., 2023), FastViT and RepViT train such branches, each
with its BatchNorm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from deploykit.fusion.affine import CONVOLUTIONS, Affine, is_layer
from deploykit.fusion.branch_kernel import BranchKernel, identity_kernel, kernel_of, merged, write_kernel
from deploykit.fusion.constants import add_call, alike, argument, constant, operand, replace, shape_of, tidy
from deploykit.fusion.fold_batchnorm import fold_batchnorm, norm_affine
from deploykit.fusion.fold_scale import fold_scale, scale_affine

_aten = torch.ops.aten
_SIGNS: dict[object, float] = {_aten.add.Tensor: 1.0, _aten.sub.Tensor: -1.0}
_ITSELF = Affine(factor=torch.ones((), dtype=torch.double), shift=torch.zeros((), dtype=torch.double), axis=None)


@dataclass(frozen=True, kw_only=True)
class _Term:
    """``node * factor`` in a sum; ``affine`` is the map that the node makes of ``source``, None for a convolution."""

    node: Node
    factor: float
    source: Node
    affine: Affine | None


def merge_branches(module: GraphModule) -> int:
    """Merge summed convolutions of one input, and the input itself, into the one with the largest kernel.

    Exact in real arithmetic. A BatchNorm or a factor behind the sum then goes into the convolution, which may itself
    be a branch of the next sum. Left alone: a branch whose output is read elsewhere, shared weights, other strides,
    groups or dilations, and kernels whose union has more taps than both (1x5 and 5x1).

    Returns:
        How many branches went.
    """
    total = 0
    while went := sum(_merge_sum(module, root) for root in _roots(module)):
        total += went
        tidy(module)
        fold_batchnorm(module)
        fold_scale(module)
    return total


def _roots(module: GraphModule) -> list[Node]:
    """Return the sums that are not part of a larger one."""
    found = [node for node in module.graph.nodes if _is_sum(module, node)]
    return [node for node in found if not any(_is_part(module, node, user) for user in node.users)]


def _is_sum(module: GraphModule, node: Node) -> bool:
    if node.target not in _SIGNS or node.args[0] is node.args[1]:
        return False
    operands = [value for value in node.args[:2] if isinstance(value, Node) and constant(module, value) is None]
    return len(operands) == 2 and all(alike(value, node) for value in operands)


def _is_part(module: GraphModule, node: Node, user: Node) -> bool:
    return len(node.users) == 1 and _is_sum(module, user)


def _merge_sum(module: GraphModule, root: Node) -> int:
    """Merge the branches of one sum; returns how many went."""
    terms = list(_terms(module, root, 1.0))
    by_source: dict[Node, list[_Term]] = {}
    for term in terms:
        by_source.setdefault(term.source, []).append(term)
    kept, results = terms, []
    for branches in by_source.values():
        for group, kernel in _groups(module, branches, root):
            layer = group[0].node
            if len(group) > 1 and write_kernel(module, layer, kernel):
                kept = [term for term in kept if term not in group]
                results.append(layer)
    if results:
        replace(root, _sum(root, results, kept))
    return len(terms) - len(kept) - len(results)


def _terms(module: GraphModule, node: Node, factor: float) -> Iterator[_Term]:
    """Yield the terms of a sum, through the sums that it alone reads."""
    second = factor * _SIGNS[node.target] * float(argument(node, 2, "alpha", 1))
    for value, sign in ((operand(node, 0), factor), (operand(node, 1), second)):
        if _is_sum(module, value) and _is_part(module, value, node):
            yield from _terms(module, value, sign)
        else:
            yield _term(module, value, sign)


def _term(module: GraphModule, node: Node, factor: float) -> _Term:
    if len(node.users) == 1:
        if node.target in CONVOLUTIONS and is_layer(module, node):
            return _Term(node=node, factor=factor, source=operand(node, 0), affine=None)
        found = norm_affine(module, node), scale_affine(module, node)
        for source, affine in filter(None, found):
            if affine.axis in (None, 1):
                return _Term(node=node, factor=factor, source=source, affine=affine)
    return _Term(node=node, factor=factor, source=node, affine=_ITSELF)


def _groups(module: GraphModule, branches: list[_Term], root: Node) -> Iterator[tuple[list[_Term], BranchKernel]]:
    """Yield the branches that become one kernel, the one with most taps first."""
    kernels = [(term, kernel_of(module, term.node)) for term in branches if term.affine is None]
    convolutions = [(term, kernel.scaled(term.factor)) for term, kernel in kernels if kernel is not None]
    identities = [term for term in branches if term.affine is not None]
    read, written = shape_of(branches[0].source)[2:], shape_of(root)[2:]
    convolutions.sort(key=lambda pair: -pair[1].taps)
    while convolutions:
        (first, kernel), *rest = convolutions
        group, convolutions = [first], []
        for term, other in rest:
            joint = merged(kernel, other, read, written)
            if joint is None:
                convolutions.append((term, other))
            else:
                group, kernel = [*group, term], joint
        for term in list(identities):
            assert term.affine is not None  # noqa: S101  (chosen above; narrows the type)
            unit = identity_kernel(term.affine, kernel)
            joint = None if unit is None else merged(kernel, unit.scaled(term.factor), read, written)
            if joint is not None:
                identities.remove(term)
                group, kernel = [*group, term], joint
        yield group, kernel


def _sum(root: Node, merged_layers: list[Node], kept: list[_Term]) -> Node:
    """Add up the merged convolutions and the terms that stay, before ``root``."""
    total, *others = merged_layers
    for layer in others:
        total = add_call(root, _aten.add.Tensor, total, layer)
    for term in kept:
        target = _aten.add.Tensor if term.factor > 0 else _aten.sub.Tensor
        weight = abs(term.factor)
        total = add_call(root, target, total, term.node, **({} if weight == 1 else {"alpha": weight}))
    return total
