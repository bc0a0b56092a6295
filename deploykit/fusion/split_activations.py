"""f(Concat(Conv(x), Conv(y))) -> Concat(f(Conv(x)), f(Conv(y))): each convolution takes its activation along.

MixNet (Tan and Le, 2019) gives parts of a map to kernels of several sizes, and activates what they give together.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from deploykit.fusion.affine import CONVOLUTIONS
from deploykit.fusion.constants import add_call, alike, operand, operator_of, replace, tidy

_aten = torch.ops.aten
_CAT = _aten.cat.default
_ACTIVATIONS = frozenset(
    {
        _aten.relu.default,
        _aten.relu6.default,
        _aten.hardtanh.default,
        _aten.clamp.default,
        _aten.leaky_relu.default,
        _aten.silu.default,
        _aten.hardswish.default,
        _aten.gelu.default,
        _aten.sigmoid.default,
        _aten.hardsigmoid.default,
    }
)
"""Activations of one map, with numbers for settings."""


def split_activations(module: GraphModule) -> int:
    """Put an activation that alone reads joined convolutions behind each of them.

    Exact. Left alone: a concatenation that is read elsewhere, or that joins anything but convolutions which nothing
    else reads.

    Returns:
        How many activations were split.
    """
    split = 0
    for activation in [node for node in module.graph.nodes if node.target in _ACTIVATIONS]:
        join = operand(activation, 0)
        parts = _convolutions(join)
        if parts and len(join.users) == 1 and alike(join, activation):
            settings = activation.args[1:]
            made = [
                add_call(activation, operator_of(activation), part, *settings, **activation.kwargs) for part in parts
            ]
            replace(activation, add_call(activation, _CAT, made, *join.args[1:], **join.kwargs))
            split += 1
    if split:
        tidy(module)
    return split


def _convolutions(join: Node) -> list[Node]:
    """Return the convolutions that a concatenation alone reads; none where it joins anything else."""
    parts = join.args[0] if join.target == _CAT else ()
    if not isinstance(parts, (list, tuple)) or len(set(parts)) < len(parts):
        return []
    found = [part for part in parts if isinstance(part, Node) and part.target in CONVOLUTIONS and len(part.users) == 1]
    return found if len(found) == len(parts) else []
