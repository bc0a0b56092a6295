"""LiteRT: int8 convolutions between int8 maps; linears with int8 weights, which round each row of what they read.

A convolution runs in integers where what it reads and what it writes are int8, so every tensor that a kernel of
integers writes is quantized, whoever reads it, with a DQ for each reader. A linear has integers in its weights alone:
LiteRT rounds each token by its own range, which is more accurate than one range for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch.fx import GraphModule, Node

from deploykit.arrays import FloatArray
from deploykit.backbones.attention import TRANSPOSED
from deploykit.calibration.dialect import Rendered, keep_float
from deploykit.calibration.float_fallback import keep_image_side
from deploykit.calibration.half import HalfPlan
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.precision_plan import PrecisionPlan
from deploykit.calibration.quantize_activations import UINT8, IntegerType
from deploykit.calibration.torch_integers import (
    CONVOLUTIONS,
    Activations,
    Integers,
    copy_of,
    planned_nodes,
    value_of,
    weighted_nodes,
    write_weight,
)
from deploykit.fusion.constants import operand
from deploykit.fusion.program import export_program
from deploykit.graph import TorchProgram


@dataclass(frozen=True, kw_only=True)
class LiteRTDialect:
    """Writes plans into torch programs."""

    activations: IntegerType = UINT8
    dynamic_operators: frozenset[str] = frozenset({"Gemm", "MatMul"})
    integer_outputs: bool = True

    def keep_float(self, model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
        """Take the convolutions of the image out of a plan: they read a map of three channels."""
        return keep_float(model, plan, (keep_image_side,))

    def render(self, graph: TorchProgram, plan: PrecisionPlan, probe: FloatArray) -> Rendered:
        """Write a plan (None: FP32) into a copy of the master program."""
        if plan is None:
            return Rendered(graph=graph)
        module = copy_of(graph.program)
        if isinstance(plan, QuantizationPlan):
            _write_integers(module, plan, tuple(output.name for output in graph.outputs))
        elif isinstance(plan, HalfPlan):
            _round_weights(module, plan)
        return Rendered(graph=replace(graph, program=export_program(module, graph.input)))


DIALECT = LiteRTDialect()


def _write_integers(module: GraphModule, plan: QuantizationPlan, outputs: tuple[str, ...]) -> None:
    """Write a plan into a module, in place."""
    activations = Activations(module, plan, Integers(dtype=torch.int8))
    sources = _tensors_of(module, outputs)
    planned = list(planned_nodes(module, plan))
    convolutions = {each.node for each in planned if each.node.target in CONVOLUTIONS}
    for each in planned:
        write_weight(module, each, plan)
    for node, readers in _quantized(sources, plan, convolutions):
        for reader in readers:
            activations.read(reader, node, sources[node])
    module.recompile()


def _round_weights(module: GraphModule, plan: HalfPlan) -> None:
    """Round weights to what float16 holds, in place, but for those that a plan keeps; the engine stores them so."""
    kept = {name.removesuffix(TRANSPOSED) for name in plan.float_weights}
    most = torch.finfo(torch.float16).max
    for node in weighted_nodes(module):
        weight = operand(node, 1)
        if str(weight.target) not in kept:
            value = value_of(module, weight)
            value.copy_(value.clamp(-most, most).half().float())


def _tensors_of(module: GraphModule, outputs: tuple[str, ...]) -> dict[Node, str]:
    """Map each node to the plan's name of what it gives: its own, but for the images and the outputs."""
    tensors = {node: str(node.target) if node.op == "placeholder" else node.name for node in module.graph.nodes}
    (given,) = module.graph.output_node().args
    return tensors | dict(zip(given, outputs, strict=True))  # type: ignore[arg-type]  # a tuple of nodes


def _quantized(
    sources: dict[Node, str], plan: QuantizationPlan, convolutions: set[Node]
) -> Iterator[tuple[Node, list[Node]]]:
    """Yield every node whose output becomes integers, and who reads it through them."""
    everyone = {*plan.placement.writes, *plan.placement.between}
    known = {*plan.placement.tensors, *plan.placement.same_range}
    for node, tensor in sources.items():
        if tensor not in known:
            continue
        readers = [user for user in node.users if tensor in everyone or user in convolutions]
        if readers:
            yield node, readers
