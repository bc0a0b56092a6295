"""Gated maps in torch, with gates rounded as integer kernels round them: in steps of 1/255 from 0 to 1.

``silu(x) -> x * round(sigmoid(x))``, ``hardswish(x) -> x * round(hardsigmoid(x))``, and a product with either gate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Node

from deploykit.calibration.added_modules import AddedModules
from deploykit.fusion.constants import operand

_ATEN = torch.ops.aten
_WHOLE = {_ATEN.silu.default: _ATEN.sigmoid.default, _ATEN.hardswish.default: _ATEN.hardsigmoid.default}
_GATES = frozenset(_WHOLE.values())
_STEP = 1 / 255


class FakeQuantizeGate(nn.Module):
    """Round what lies between 0 and 1; the gradient is straight-through."""

    def forward(self, gate: Tensor) -> Tensor:
        """Return the values rounded, in their own shape."""
        with torch.no_grad():
            rounded = (gate / _STEP).round_().mul_(_STEP)
        return gate + (rounded - gate).detach()


def round_gate(product: Node, added: AddedModules) -> Node:
    """Let a gated map read its gate rounded; return the node that gives it now."""
    graph = product.graph
    if product.target not in _WHOLE:
        for gate in {node for node in product.all_input_nodes if node.target in _GATES}:
            with graph.inserting_before(product):
                product.replace_input_with(gate, added.call(FakeQuantizeGate(), gate))
        return product
    source = operand(product, 0)
    with graph.inserting_before(product):
        gate = graph.call_function(_WHOLE[product.target], (source,))
        split = graph.call_function(_ATEN.mul.Tensor, (source, added.call(FakeQuantizeGate(), gate)))
    split.meta = dict(product.meta)
    product.replace_all_uses_with(split)
    graph.erase_node(product)
    return split
