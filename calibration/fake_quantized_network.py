"""A fused network in torch that rounds where a quantization plan does, and the plan that it has learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from deploykit.arrays import FloatArray
from deploykit.calibration.added_modules import AddedModules
from deploykit.calibration.dialect import Dialect, OnnxDialect
from deploykit.calibration.fake_gates import round_gate
from deploykit.calibration.fake_quantize import (
    FakeQuantize,
    FakeQuantizeBias,
    FakeQuantizedWeight,
)
from deploykit.calibration.float_network import FloatNetwork, copy_of, values_by_name
from deploykit.calibration.integer_products import IntegerProducts, IntegerProductsEachCall
from deploykit.calibration.placement import IntegerWeight
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.quantize_activations import written_in_integers
from deploykit.calibration.rounded_weight import RoundedWeight
from deploykit.errors import CalibrationError
from deploykit.fusion.affine import LINEAR, PERMUTATIONS, RESHAPES
from deploykit.fusion.constants import replace as replace_node
from deploykit.fusion.fold_pad import is_zero_pad
from deploykit.graph import TRANSPOSED
from deploykit.onnx_values import floats_of

EVERY_RUNTIME: Dialect = OnnxDialect()
"""All that a plan has in integers, rounded where integer kernels read: what runtimes have in common."""

_WEIGHTED = (torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding, LINEAR)
_MOVES = (*PERMUTATIONS, *RESHAPES, torch.ops.aten.contiguous.default, torch.ops.aten.clone.default)


@dataclass(frozen=True, kw_only=True)
class IntegerLayer:
    """A node of the plan in torch; ``float_weight`` and ``float_bias`` are those of the master graph.

    ``weight_name`` and ``bias_name`` are the parameters of the float module that they stand for.
    """

    use: IntegerWeight
    weight_name: str
    bias_name: str | None
    float_weight: FloatArray
    float_bias: FloatArray | None
    weight: FakeQuantizedWeight
    bias: nn.Parameter | None


class FakeQuantizedNetwork(nn.Module):
    """Rounds what a plan rounds; the parameters are weights, biases, scales and zero points.

    ``layers`` are the nodes in integers by their name in the plan, ``quantizers`` the activations that are rounded.

    Args:
        network: in FP32; it stays as it is.
        plan: of its master graph.
        dialect: what a runtime keeps in float and rounds besides; `EVERY_RUNTIME` is what they have in common.

    Raises:
        CalibrationError: a part of the plan is not in the network.
    """

    def __init__(self, network: FloatNetwork, plan: QuantizationPlan, dialect: Dialect = EVERY_RUNTIME) -> None:
        super().__init__()
        self.start = plan
        self.module = copy_of(network.module)
        writer = _Writer(self.module, network, dialect.keep_float(network.model, plan), dialect)
        writer.write()
        self.layers, self.quantizers = writer.layers, writer.quantizers

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map ``(N, C, H, W)`` to the tuple of outputs."""
        outputs: tuple[Tensor, ...] = self.module(images)
        return outputs

    def learned_plan(self) -> QuantizationPlan:
        """Return the plan with what the parameters are now; what is not rounded here is as it was."""
        ranges = self.start.ranges | {name: quantizer.range() for name, quantizer in self.quantizers.items()}
        weights, shifts = dict(self.start.weights), dict(self.start.bias_shift)
        for name, layer in self.layers.items():
            integers, scales = layer.weight.quantized()
            if layer.use.axis == 1:
                integers = np.ascontiguousarray(integers.T)
            weights[name] = RoundedWeight.of(layer.float_weight, layer.use.axis, integers, scales)
            if layer.bias is not None:
                before = np.float32(0) if layer.float_bias is None else layer.float_bias
                shifts[name] = np.asarray(layer.bias.detach().numpy() - before, np.float32)
        return replace(self.start, ranges=ranges, weights=weights, bias_shift=shifts)


class _Writer:
    """One rewriting of a float module; ``plan`` is what its dialect writes in integers."""

    def __init__(self, module: GraphModule, network: FloatNetwork, plan: QuantizationPlan, dialect: Dialect) -> None:
        self.module, self.model, self.plan, self.dialect = module, network.model, plan, dialect
        self.layers: dict[str, IntegerLayer] = {}
        self.quantizers: dict[str, FakeQuantize] = {}
        self._rounding = dialect.kernel_rounding(network.model, plan)
        self._values = values_by_name(module, network)
        self._nodes: dict[str, Node] = {}
        self._shared: dict[str, FakeQuantizedWeight] = {}
        self._added = AddedModules(module)

    def write(self) -> None:
        operators = {str(node.name): node.op_type for node in self.model.graph}
        for name, node in self._weighted_nodes():
            self._nodes[name] = node
            self._write_layer(name, node)
        dynamic = {name for name in self._nodes if operators[name] in self.dialect.dynamic_operators}
        for tensor in self._rounding.gated:
            if (product := self._value(tensor)) is not None:
                self._values[tensor] = round_gate(product, self._added)
        self._round_activations({self._nodes[name] for name in self._nodes if name not in dynamic})
        for name, node in self._nodes.items():
            if self.dialect.integer_biases and name not in dynamic and operators[name] == "Conv":
                self._round_bias(name, node)
            self._sum_integers(node, self.layers[name].weight, each_call=name in dynamic)
        self.module.recompile()

    def _weighted_nodes(self) -> Iterator[tuple[str, Node]]:
        """Yield each integer node of the plan with its own in torch: those of one weight in their order."""
        found: dict[str, list[Node]] = {}
        for node in self.module.graph.nodes:
            if node.target in _WEIGHTED and isinstance(node.args[1], Node) and node.args[1].op == "get_attr":
                found.setdefault(str(node.args[1].target), []).append(node)
        readers = {name: iter(nodes) for name, nodes in found.items()}
        kept = set(self.plan.placement.float_nodes)
        for node in self.model.graph:
            name = str(node.name)
            use = self.plan.placement.weights.get(name)
            weight = node.inputs[1] if len(node.inputs) > 1 else None
            target = str(weight.name).removesuffix(TRANSPOSED) if weight is not None else ""
            if use is None and name not in kept:
                continue
            twin = next(readers.get(target, iter(())), None)
            if use is not None and twin is None:
                raise CalibrationError(
                    f"the node {name} of the plan, with the weight {target}, is not in the traced network. "
                    "Report it with the network."
                )
            if use is not None and twin is not None:
                yield name, twin

    def _write_layer(self, name: str, node: Node) -> None:
        use = self.plan.placement.weights[name]
        values = floats_of(self.model.graph.initializers[use.weight])
        if use.weight not in self._shared:
            integers, scales = self.plan.integers_of(name, values, use.axis)
            if use.axis == 1:
                integers = integers.T
            weight = torch.from_numpy(np.array(values.T if use.axis == 1 else values))
            self._shared[use.weight] = FakeQuantizedWeight(
                weight, integers, scales, reduce_range=self.plan.reduce_range
            )
        quantizer = self._shared[use.weight]
        with self.module.graph.inserting_before(node):
            rounded = self._added.call(quantizer)
        float_weight: Any = node.args[1]
        node.update_arg(1, rounded)
        self._drop(float_weight)
        bias = None if use.bias is None else floats_of(self.model.graph.initializers[use.bias])
        read = node.args[2] if len(node.args) > 2 else None
        bias_name = str(read.target) if isinstance(read, Node) and read.op == "get_attr" else None
        self.layers[name] = IntegerLayer(
            use=use,
            weight_name=str(float_weight.target),
            bias_name=bias_name,
            float_weight=values,
            float_bias=bias,
            weight=quantizer,
            bias=self._write_bias(name, node, bias),
        )

    def _write_bias(self, name: str, node: Node, bias: FloatArray | None) -> nn.Parameter | None:
        """Let a node add a parameter of its own; a product without a bias stays without."""
        use = self.plan.placement.weights[name]
        if bias is None and node.target == LINEAR:
            return None
        channels = floats_of(self.model.graph.initializers[use.weight]).shape[use.axis]
        start = np.zeros(channels, np.float32) if bias is None else bias
        shifted = np.asarray(start + self.plan.bias_shift.get(name, np.float32(0)), np.float32)
        parameter = nn.Parameter(torch.from_numpy(shifted))
        with self.module.graph.inserting_before(node):
            read = self._added.read(f"bias_{len(self.layers)}", parameter)
        float_bias = node.args[2] if len(node.args) > 2 else None
        node.args = (node.args[0], node.args[1], read, *node.args[3:])
        if isinstance(float_bias, Node):
            self._drop(float_bias)
        return parameter

    def _round_activations(self, readers: set[Node]) -> None:
        placement, outputs = self.plan.placement, self.dialect.integer_outputs
        for_everyone = set() if self._rounding.readers_only else written_in_integers(placement, between=outputs)
        sums = {(tensor, self._value(total)) for tensor, total in self._rounding.summands}
        sources = {placement.weights[name].input: node.args[0] for name, node in self._nodes.items()}
        chosen = (*placement.reads, *((*placement.writes, *placement.between) if outputs else ()))
        chosen = tuple(tensor for tensor in chosen if tensor not in self._rounding.left_out)
        done: set[Node] = set()
        found: dict[str, Any] = {  # before any is rounded, which puts calls between them
            tensor: self._values.get(tensor) or sources.get(tensor) or self._only_reader(tensor)
            for tensor in dict.fromkeys(chosen)
        }
        for tensor, value in found.items():
            if value is None:
                raise CalibrationError(
                    f"the tensor {tensor} of the plan is not in the traced network. Report it with the network."
                )
            users = [
                user
                for user in value.users
                if tensor in for_everyone or _is_read_by(user, readers) or (tensor, user) in sums
            ]
            if users and value not in done:
                done.add(value)
                self._round(value, tensor, users)

    def _round_bias(self, name: str, node: Node) -> None:
        activation = self._quantizer_before(node)
        if activation is not None:
            with self.module.graph.inserting_before(node):
                rounding = FakeQuantizeBias(
                    activation, self.layers[name].weight, self._rounding.bias_offsets.get(name, 0.0)
                )
                node.update_arg(2, self._added.call(rounding, node.args[2]))

    def _sum_integers(self, node: Node, weight: FakeQuantizedWeight, *, each_call: bool) -> None:
        """Replace a layer by one that sums integers; where it reads what nothing rounds, it stays."""
        call: Any = node.target
        activation, further = self._quantizer_before(node), node.args[3:]
        if each_call:
            products: nn.Module = IntegerProductsEachCall(call, weight, further)
        elif activation is not None:
            products = IntegerProducts(call, activation, weight, further)
        else:
            return
        with self.module.graph.inserting_before(node):
            replace_node(node, self._added.call(products, *node.args[:3]))

    def _quantizer_before(self, node: Node) -> FakeQuantize | None:
        """Return what rounds the map that a layer reads, through what moves its values or adds zeros."""
        source: Any = node.args[0]
        while source.target in _MOVES or is_zero_pad(source):
            source = source.args[0]
        module = self.module.get_submodule(str(source.target)) if source.op == "call_module" else None
        return module if isinstance(module, FakeQuantize) else None

    def _value(self, tensor: str) -> Node | None:
        """Return the call that gives a tensor; None: it has another name, and more than one call may be it."""
        return self._values.get(tensor) or self._only_reader(tensor)

    def _only_reader(self, tensor: str) -> Node | None:
        """Return the call that gives a tensor which the exporter named anew, where it alone reads a known value."""
        written = next((node.outputs[0] for node in self.model.graph if node.outputs[0].name == tensor), None)
        producer = None if written is None else written.producer()
        known = [] if producer is None else [self._values.get(str(value.name)) for value in producer.inputs if value]
        readers = [reader for value in known if value is not None for reader in value.users]
        if len(readers) != 1 or written is None or written.shape is None or "val" not in readers[0].meta:
            return None
        same = list(readers[0].meta["val"].shape)[1:] == [*written.shape][1:]
        return readers[0] if same else None

    def _round(self, value: Node, tensor: str, users: list[Node]) -> None:
        measured = self.plan.placement.same_range.get(tensor, tensor)
        if measured not in self.quantizers:
            self.quantizers[measured] = FakeQuantize(
                self._rounding.ranges.get(tensor, self.plan.range_of(tensor)),
                self.dialect.activations,
                self.plan.statistics.get(measured),
                clip_only=tensor in self._rounding.clipped,
            )
        with self.module.graph.inserting_after(value):
            rounded = self._added.call(self.quantizers[measured], value)
        for user in users:
            user.replace_input_with(value, rounded)

    def _drop(self, read: Node) -> None:
        """Remove a constant that nothing reads any more."""
        if read.users:
            return
        self.module.graph.erase_node(read)
        target = str(read.target)
        if not any(other.target == target for other in self.module.graph.find_nodes(op="get_attr")):
            owner, _, name = target.rpartition(".")
            delattr(self.module.get_submodule(owner), name)


def _is_read_by(user: Node, layers: set[Node]) -> bool:
    """Return whether a node is one of these layers, or puts the zeros around a map that they alone read."""
    return user in layers or (is_zero_pad(user) and all(reader in layers for reader in user.users))
