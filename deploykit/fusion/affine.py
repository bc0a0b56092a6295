"""The linear and convolution calls of a graph, and how a constant affine map a channel moves into their weights.

All sums and products are made in double: the product of two rounded factors loses a bit that FP32 parity sees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from deploykit.fusion.constants import (
    Size,
    add_constant,
    argument,
    constant,
    operand,
    operator_of,
    readers,
    set_constant,
    shape_of,
    used_once,
)

_aten = torch.ops.aten
LINEAR = _aten.linear.default
CONVOLUTIONS = (
    _aten.conv1d.default,
    _aten.conv1d.padding,
    _aten.conv2d.default,
    _aten.conv2d.padding,
    _aten.conv3d.default,
    _aten.conv3d.padding,
)
TRANSPOSED = (_aten.conv_transpose1d.default, _aten.conv_transpose2d.input, _aten.conv_transpose3d.input)
LAYERS = (LINEAR, *CONVOLUTIONS, *TRANSPOSED)
_CAT = _aten.cat.default
PERMUTATIONS = (
    _aten.permute.default,
    _aten.transpose.int,
    _aten.swapaxes.default,
    _aten.movedim.int,
    _aten.mT.default,
    _aten.numpy_T.default,
    _aten.t.default,
)
RESHAPES = (
    _aten.reshape.default,
    _aten.view.default,
    _aten.flatten.using_ints,
    _aten.unflatten.int,
    _aten.unsqueeze.default,
    _aten.squeeze.dim,
)
"""What leaves the elements in their order and changes the dimensions."""


@dataclass(frozen=True, kw_only=True)
class Affine:
    """``x * factor + shift`` along one axis of a map; both are ``(C,)`` or ``()``, in double.

    ``axis`` is None where both are single numbers, and else counts from the front.
    """

    factor: Tensor
    shift: Tensor
    axis: int | None

    @property
    def shifts(self) -> bool:
        """Whether any channel is shifted."""
        return bool((self.shift != 0).any())


def fold(module: GraphModule, node: Node, source: Node, affine: Affine) -> bool:
    """Move the affine map that ``node`` makes of ``source`` into the layer before it, else into those after it.

    Returns:
        Whether there was such a layer; the node is gone then.
    """
    if fold_back(module, source, affine):
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
        return True
    if fold_forward(module, node, affine):
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
        return True
    return False


def fold_back(module: GraphModule, source: Node, affine: Affine) -> bool:
    """Into the layers that give ``source``, directly or through permutations and joins that nothing else reads."""
    found = _layers_behind(module, source, affine)
    if found is None:
        return False
    scaled = [_scaled(module, layer, part) for layer, part in found]
    if not all(_finite(*values) for values in scaled):
        return False
    for (layer, _), (weight, bias) in zip(found, scaled, strict=True):
        _write(module, layer, weight, None if _bias(layer) is None and not (bias != 0).any() else bias)
    return True


def _layers_behind(module: GraphModule, source: Node, affine: Affine) -> list[tuple[Node, Affine]] | None:
    """Return the layers whose outputs ``source`` is made of, each with its part of the map; None where others are."""
    axis = affine.axis
    while len(source.users) == 1 and source.target in PERMUTATIONS:
        order = permutation(source)
        axis = None if axis is None else order[axis]
        source = operand(source, 0)
    affine = replace(affine, axis=axis)
    if len(source.users) != 1:
        return None
    if source.target == _CAT:
        parts = _parts(source, affine)
        found = [_layers_behind(module, part, its) for part, its in parts or ()]
        layers = [each for behind in found if behind is not None for each in behind]
        return layers if parts and None not in found else None
    fits = is_layer(module, source) and axis in (None, channel_axis(source))
    return [(source, affine)] if fits else None


def _parts(join: Node, affine: Affine) -> list[tuple[Node, Affine]] | None:
    """Return what a concatenation joins, each with its part of an affine map; None where one is read twice."""
    read = join.args[0]
    if not isinstance(read, (list, tuple)) or len(set(read)) != len(read):
        return None
    nodes = [node for node in read if isinstance(node, Node)]
    axis = int(argument(join, 1, "dim", 0)) % len(shape_of(join))
    if affine.axis != axis:
        return [(node, affine) for node in nodes]
    widths = [width for width in (shape_of(node)[axis] for node in nodes) if isinstance(width, int)]
    if len(widths) < len(nodes):
        return None
    factors, shifts = (torch.split(value.expand(sum(widths)), widths) for value in (affine.factor, affine.shift))
    return [
        (node, replace(affine, factor=factor, shift=shift))
        for node, factor, shift in zip(nodes, factors, shifts, strict=True)
    ]


def fold_forward(module: GraphModule, node: Node, affine: Affine) -> bool:
    """Into the layers that read ``node``, when nothing else reads it and they see no padding."""
    layers = readers(node, (LINEAR, *CONVOLUTIONS))
    if layers is None:
        return False
    for layer in layers:
        if not is_layer(module, layer) or affine.axis not in (None, channel_axis(layer)):
            return False
        if affine.shifts and is_padded(layer):
            return False
    folded = [_absorbed(module, layer, affine.factor, affine.shift) for layer in layers]
    if not all(_finite(*values) for values in folded):
        return False
    for layer, (weight, bias) in zip(layers, folded, strict=True):
        _write(module, layer, weight, bias if affine.shifts or _bias(layer) is not None else None)
    return True


def is_layer(module: GraphModule, node: Node) -> bool:
    """Return whether a node is a linear layer or a convolution of a batch with constants that nothing else reads."""
    if node.target not in LAYERS or not used_once(module, node.args[1]):
        return False
    weight = constant(module, node.args[1])
    bias = _bias(node)
    whole = bias is None or used_once(module, bias)
    if weight is None or not weight.is_floating_point() or not whole:
        return False
    rank = len(shape_of(node))
    return (weight.dim() == 2 and rank > 0) if node.target == LINEAR else rank == weight.dim()


def channel_axis(node: Node) -> int:
    """The axis of a layer's channels, counted from the front: the last of a linear's, the second of a convolution's."""
    return len(shape_of(node)) - 1 if node.target == LINEAR else 1


def is_padded(node: Node) -> bool:
    """Return whether a convolution sees zeros beyond the border."""
    if node.target == LINEAR:
        return False
    padding = argument(node, 4, "padding", 0)
    if padding == "same":
        return any(size != 1 for size in shape_of(operand(node, 1))[2:])
    if padding == "valid":
        return False
    return any(padding) if isinstance(padding, (list, tuple)) else bool(padding)


def scale_outputs(module: GraphModule, layer: Node, factor: Tensor, shift: Tensor) -> bool:
    """Return ``layer(x) * factor + shift`` in the layer's own weight and bias; False where a number would overflow.

    Args:
        module: the graph.
        layer: one of `is_layer`.
        factor: ``(C,)`` or ``()``.
        shift: ``(C,)`` or ``()``.
    """
    weight, bias = _scaled(module, layer, Affine(factor=factor, shift=shift, axis=None))
    if not _finite(weight, bias):
        return False
    _write(module, layer, weight, None if _bias(layer) is None and not (bias != 0).any() else bias)
    return True


def _scaled(module: GraphModule, layer: Node, affine: Affine) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias of ``layer(x) * factor + shift``."""
    weight, groups = _double(module, layer.args[1]), _groups(layer)
    if layer.target in TRANSPOSED:
        channels = weight.shape[1] * groups
        factors = affine.factor.expand(channels).reshape(groups, 1, -1, *[1] * (weight.dim() - 2))
        scaled = (_by_group(weight, groups) * factors).flatten(0, 1)
    else:
        channels = weight.shape[0]
        scaled = weight * affine.factor.expand(channels).reshape(-1, *[1] * (weight.dim() - 1))
    old = _bias(layer)
    bias = torch.zeros(channels, dtype=torch.double) if old is None else _double(module, old)
    return scaled, bias * affine.factor + affine.shift


def channel_vector(value: Tensor, rank: int, shape: tuple[Size, ...]) -> tuple[Tensor, int | None] | None:
    """Return a tensor that broadcasts to ``shape`` as one value a channel: ``(C,)`` and its axis, or ``()`` and None.

    None where it varies along more than one axis, or would itself widen the shape.
    """
    if value.dim() > rank:
        return None
    if value.numel() == 1:
        return value.reshape(()).double(), None
    padded = (*[1] * (rank - value.dim()), *value.shape)
    wide = [axis for axis, size in enumerate(padded) if size != 1]
    if len(wide) != 1 or shape[wide[0]] != padded[wide[0]]:
        return None
    return value.flatten().double(), wide[0]


def permutation(node: Node) -> list[int]:
    """Return the order of the input's axes in what a permuting call gives, counted from the front."""
    sides = range(2, 2 + len(shape_of(node)))
    moved = operator_of(node)(torch.empty(*sides, device="meta"), *node.args[1:], **node.kwargs)
    return [side - 2 for side in moved.shape]


def _by_group(weight: Tensor, groups: int) -> Tensor:
    return weight.reshape(groups, -1, *weight.shape[1:])


def _absorbed(module: GraphModule, layer: Node, factor: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    weight = _double(module, layer.args[1])
    groups = _groups(layer)
    grouped = _by_group(weight, groups)
    inputs = weight.shape[1] * groups
    spread = (groups, 1, -1, *[1] * (weight.dim() - 2))
    moved = (grouped * shift.expand(inputs).reshape(spread)).flatten(2).sum(-1).flatten()
    scaled = (grouped * factor.expand(inputs).reshape(spread)).flatten(0, 1)
    old = _bias(layer)
    return scaled, moved if old is None else _double(module, old) + moved


def _write(module: GraphModule, layer: Node, weight: Tensor, bias: Tensor | None) -> None:
    weight_node, bias_node = layer.args[1], _bias(layer)
    assert isinstance(weight_node, Node)  # noqa: S101  (checked by is_layer; narrows the type)
    stored = constant(module, weight_node)
    assert stored is not None  # noqa: S101  (checked by is_layer)
    set_constant(module, weight_node, weight.to(stored.dtype))
    if bias is None:
        return
    if bias_node is not None:
        set_constant(module, bias_node, bias.to(stored.dtype))
        return
    owner = str(weight_node.target).rpartition(".")[0]
    added = add_constant(module, f"{owner}.bias" if owner else "bias", bias.to(stored.dtype))
    layer.args = (*layer.args[:2], added, *layer.args[3:])
    layer.kwargs = {name: value for name, value in layer.kwargs.items() if name != "bias"}


def _bias(layer: Node) -> Node | None:
    bias: Node | None = argument(layer, 2, "bias", None)
    return bias


def _groups(layer: Node) -> int:
    return 1 if layer.target == LINEAR else int(argument(layer, 6, "groups", 1))


def _double(module: GraphModule, node: object) -> Tensor:
    value = constant(module, node)
    assert value is not None  # noqa: S101  (checked by is_layer; narrows the type)
    return value.double()


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor.float()).all()) for tensor in tensors)
