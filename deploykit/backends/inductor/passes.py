"""Inductor on x86: the plan's Q/DQ around each convolution and linear of the torch program.

Inductor lowers ``dequantize -> conv2d/linear -> (relu) -> quantize`` with uint8 activations and
int8 per-channel weights to oneDNN's integer kernels when it freezes the weights.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from deploykit.arrays import FloatArray
from deploykit.backbones.attention import TRANSPOSED
from deploykit.calibration.dialect import Rendered, keep_float
from deploykit.calibration.float_fallback import keep_pointlike
from deploykit.calibration.half import HalfPlan
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.precision_plan import PrecisionPlan
from deploykit.calibration.quantize_activations import UINT8, IntegerType
from deploykit.fusion.program import export_program
from deploykit.graph import TorchProgram

_WEIGHTED = (
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv2d.padding,
    torch.ops.aten.linear.default,
)


@dataclass(frozen=True, kw_only=True)
class InductorDialect:
    """Writes plans into torch programs."""

    activations: IntegerType = UINT8
    dynamic_operators: frozenset[str] = frozenset()

    def keep_float(self, model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
        """Take convolutions on 1x1 maps out of a plan: oneDNN gains nothing from their integers."""
        return keep_float(model, plan, (keep_pointlike(),))

    def render(self, graph: TorchProgram, plan: PrecisionPlan, probe: FloatArray) -> Rendered:
        """Write a plan (None: FP32) into a copy of the master program."""
        return Rendered(graph=_render(graph, plan))


DIALECT = InductorDialect()


def _render(master: TorchProgram, plan: PrecisionPlan) -> TorchProgram:
    if plan is None:
        return master
    module = _copy_of(master.program)
    if isinstance(plan, QuantizationPlan):
        _Renderer(module, plan).render()
        wrapped: nn.Module = module
    elif isinstance(plan, HalfPlan):
        _keep_in_float(module, plan, torch.float16)
        wrapped = _Cast(module, torch.float16)
    else:
        wrapped = _Cast(module.to(torch.bfloat16), torch.bfloat16)
    return replace(master, program=export_program(wrapped, master.input))


def _copy_of(program: torch.export.ExportedProgram) -> GraphModule:
    """Return the program's module with weights of its own: `module()` shares the program's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, where it copies a graph module
        return copy.deepcopy(program.module())


class _Cast(nn.Module):
    """A module of another dtype between float32 inputs and outputs."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = inner
        self.dtype = dtype

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return ``(N, C, H, W)`` float32 to the tuple of outputs in float32."""
        return tuple(output.float() for output in self.inner(images.to(self.dtype)))


def _keep_in_float(module: GraphModule, plan: HalfPlan, dtype: torch.dtype) -> None:
    """Convert a module but for the nodes of some weights, with casts around those."""
    kept_names = {name.removesuffix(TRANSPOSED) for name in plan.float_weights}
    kept = {node: node.args[1] for node in _weighted_nodes(module) if str(node.args[1].target) in kept_names}
    floats = {
        str(argument.target): _value(module, argument).clone()
        for node in kept
        for argument in node.args[1:3]
        if isinstance(argument, Node)
    }
    module.to(dtype)
    for target, value in floats.items():
        owner, _, name = target.rpartition(".")
        setattr(module.get_submodule(owner), name, nn.Parameter(value, requires_grad=False))
    for node in kept:
        with module.graph.inserting_before(node):
            source = module.graph.call_function(torch.ops.aten.to.dtype, (node.args[0], torch.float32))
        with module.graph.inserting_after(node):
            result = module.graph.call_function(torch.ops.aten.to.dtype, (node, dtype))
        node.replace_all_uses_with(result, delete_user_cb=lambda user, result=result: user is not result)
        node.update_arg(0, source)
    module.recompile()


class _Renderer:
    """One rendering: the module being rewritten and the activations that are integers so far."""

    def __init__(self, module: GraphModule, plan: QuantizationPlan) -> None:
        self.module = module
        self.plan = plan
        self._integers: dict[tuple[Node, str], Node] = {}

    def render(self) -> None:
        placed = reversed(self.plan.placement.weights.items())  # of nodes that share a weight the first counts
        by_weight = {use.weight.removesuffix(TRANSPOSED): (name, use) for name, use in placed}
        for node in _weighted_nodes(self.module):
            name, use = by_weight.get(str(node.args[1].target), ("", None))
            if use is not None and not use.pointlike:
                self._read_integers(node, 0, use.input)
                _quantize_weight(self.module, node, self.plan, name, transposed=use.axis == 1)
        for node in _residual_adds(self.module, self.plan):
            # The convolution that is the other operand adds the integers as it writes.
            shortcut = 0 if _is_fusible(node.args[1]) else 1
            self._read_integers(node, shortcut, node.args[shortcut].name)
        self.module.recompile()

    def _read_integers(self, node: Any, position: int, tensor: str) -> None:
        """Let a node read an argument through Q/DQ, in the range of a tensor of the plan.

        Each reader has a DQ of its own: inductor fuses none that several share.
        """
        source = node.args[position]
        scale, zero_point = self.plan.range_of(tensor).affine()
        settings = (scale, zero_point, 0, 255, torch.uint8)
        operators, graph = torch.ops.quantized_decomposed, self.module.graph
        if (source, tensor) not in self._integers:
            with graph.inserting_after(source):
                quantized = graph.call_function(operators.quantize_per_tensor.default, (source, *settings))
            self._integers[source, tensor] = quantized
        with graph.inserting_before(node):
            parts = (self._integers[source, tensor], *settings)
            restored = graph.call_function(operators.dequantize_per_tensor.default, parts)
        node.update_arg(position, restored)


def _residual_adds(module: GraphModule, plan: QuantizationPlan) -> list[Any]:
    """Sums of two maps of which the plan has integers, one of them a convolution's, which fuses the sum.

    Tensors have the same names in the program and in the ONNX graph that the plan is of.
    """
    read = set(plan.placement.reads)
    return [
        node
        for node in module.graph.nodes
        if node.target == torch.ops.aten.add.Tensor
        and len(node.args) == 2
        and not node.kwargs
        and all(isinstance(operand, Node) and operand.name in read for operand in node.args)
        and any(_is_fusible(operand) for operand in node.args)
    ]


def _is_fusible(node: Any) -> bool:
    return node.target in _WEIGHTED and len(node.users) == 1  # which is the sum


def _quantize_weight(
    module: GraphModule, node: Node, plan: QuantizationPlan, planned: str, *, transposed: bool
) -> None:
    """Write a weight as the plan's node has it, whose own is transposed where it is a MatMul."""
    weight_node: Any = node.args[1]
    target = str(weight_node.target)
    owner = target.rpartition(".")[0]
    holder = module.get_submodule(owner)
    values = _value(module, weight_node).numpy()
    integers, scales = plan.integers_of(planned, values.T if transposed else values, int(transposed))
    if transposed:
        integers = np.ascontiguousarray(integers.T)
    # Named by the node: two that share a weight would share its DQ, and inductor fuses none that is shared.
    names = {part: f"{node.name}_{part}" for part in ("integers", "scales", "zeros")}
    holder.register_buffer(names["integers"], torch.from_numpy(integers))
    holder.register_buffer(names["scales"], torch.from_numpy(scales))
    holder.register_buffer(names["zeros"], torch.zeros(len(scales), dtype=torch.int64))
    with module.graph.inserting_before(node):
        parts = [module.graph.get_attr(f"{owner}.{name}" if owner else name) for name in names.values()]
        restored = module.graph.call_function(
            torch.ops.quantized_decomposed.dequantize_per_channel.default, (*parts, 0, -127, 127, torch.int8)
        )
    node.update_arg(1, restored)
    shift = plan.bias_shift.get(planned)
    if shift is not None and np.any(shift):
        _shift_bias(module, node, owner, torch.from_numpy(np.asarray(shift, np.float32)))


def _shift_bias(module: GraphModule, node: Node, owner: str, shift: Tensor) -> None:
    bias_node: Any = node.args[2] if len(node.args) > 2 else None
    bias = shift if bias_node is None else _value(module, bias_node) + shift
    name = f"{node.name}_shifted_bias"
    module.get_submodule(owner).register_buffer(name, bias)
    with module.graph.inserting_before(node):
        shifted = module.graph.get_attr(f"{owner}.{name}" if owner else name)
    node.args = (node.args[0], node.args[1], shifted, *node.args[3:])


def _weighted_nodes(module: GraphModule) -> list[Any]:
    return [
        node
        for node in module.graph.nodes
        if node.target in _WEIGHTED and isinstance(node.args[1], Node) and node.args[1].op == "get_attr"
    ]


def _value(module: GraphModule, node: Node) -> Tensor:
    owner, _, name = str(node.target).rpartition(".")
    value: Tensor = getattr(module.get_submodule(owner), name)
    return value.detach()
