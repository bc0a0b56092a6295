"""A plan's weights in a torch program, and the proof that a .pte file computes with them inside its delegate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.fx import GraphModule, Node

from deploykit.backends.executorch.delegate_graph import Layer, delegated_layers
from deploykit.calibration.torch_integers import value_of
from deploykit.errors import ExportError
from deploykit.fusion.constants import operand


@dataclass(frozen=True, kw_only=True)
class IntegerWeight:
    """The integers of one layer, ``(outputs, inputs)`` or ``(outputs, inputs, height, width)``, and their scales.

    ``dynamic``: the layer rounds each row of what it reads; otherwise it reads and writes int8 in fixed ranges.
    """

    name: str
    integers: NDArray[np.int8]
    scales: NDArray[Any]
    dynamic: bool

    def is_of(self, layer: Layer) -> bool:
        """Return whether a delegate's layer computes with these integers, in integers."""
        if not layer.integer_weight or not (layer.dynamic if self.dynamic else layer.static):
            return False
        return self.scales.astype(np.float32).tobytes() == layer.scales and layer.weight in self._stored()

    def _stored(self) -> set[bytes]:
        """Return the bytes of both orders in which the delegate has weights: plain, and depthwise."""
        if self.integers.ndim == 2:
            return {self.integers.tobytes()}
        return {self.integers.transpose(order).tobytes() for order in ((0, 2, 3, 1), (1, 2, 3, 0))}


def planned_weights(module: GraphModule) -> list[IntegerWeight]:
    """Return every weight of a program that is behind a DQ for each channel."""
    restore = torch.ops.quantized_decomposed.dequantize_per_channel.default
    return [_weight(module, node) for node in module.graph.nodes if node.target == restore]


def _weight(module: GraphModule, restored: Node) -> IntegerWeight:
    (layer,) = restored.users
    integers, scales = (value_of(module, operand(restored, position)).numpy() for position in range(2))
    return IntegerWeight(
        name=layer.name, integers=integers, scales=scales, dynamic=layer.target == torch.ops.aten.linear.default
    )


def check_integers(content: bytes, weights: list[IntegerWeight]) -> None:
    """Prove that the delegate of a .pte file computes every planned layer in integers, with the plan's integers.

    Raises:
        ExportError: it does not; the message names the layers.
    """
    layers = delegated_layers(content)
    missing = [weight.name for weight in weights if not any(weight.is_of(layer) for layer in layers)]
    if missing:
        raise ExportError(
            f"ExecuTorch's converter left {', '.join(missing)} outside the integers of its delegate, and the plan has "
            "integers there. Export in fp32, or for another runtime."
        )
