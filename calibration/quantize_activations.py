"""x -> DequantizeLinear(QuantizeLinear(x)) with the plan's range, for all that read x or for integer kernels alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deploykit.arrays import FloatArray
from deploykit.calibration.placement import Placement
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.ranges import ActivationRange
from deploykit.onnx_values import add_constant


@dataclass(frozen=True, kw_only=True)
class IntegerType:
    """The integers of an activation: ``symmetric`` ones have the zero point 0."""

    dtype: type[np.uint8 | np.int8]
    symmetric: bool

    def parameters(self, measured: ActivationRange) -> tuple[FloatArray, npt.NDArray[np.uint8 | np.int8]]:
        """Return the scale and the zero point of a range, each of shape ``()``."""
        scale, zero_point = (measured.symmetric(), 0) if self.symmetric else measured.affine()
        return np.array(scale, np.float32), np.array(zero_point, self.dtype)


UINT8 = IntegerType(dtype=np.uint8, symmetric=False)
INT8 = IntegerType(dtype=np.int8, symmetric=True)


def quantize_activations(
    kind: IntegerType, *, writes: bool = False, between: bool = False
) -> Callable[[ir.Model, QuantizationPlan], QuantizationPlan]:
    """Make the pass for a backend; of an imported plan all is rounded that its tool rounded.

    Args:
        kind: the type of the integers.
        writes: also round what integer kernels write for float nodes to read.
        between: also round what stands between integer kernels: gated maps, pools and their sums.
    """

    def rewrite(model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
        placement = plan.placement
        shared = written_in_integers(placement, between=between or plan.imported)
        values = {value.name: value for value in model.graph.inputs}
        values |= {value.name: value for node in model.graph for value in node.outputs}
        behind = placement.writes if writes or plan.imported else ()
        chosen = (*placement.reads, *behind, *(placement.between if between or plan.imported else ()))
        for name in dict.fromkeys(chosen):
            if name in values:
                _quantize(model.graph, values[name], plan, kind, for_everyone=name in shared)
        return plan

    return rewrite


def written_in_integers(placement: Placement, *, between: bool) -> set[str]:
    """Name the tensors whose every reader reads them rounded."""
    return {*placement.writes, *(placement.between if between else ())}


def _quantize(
    graph: ir.Graph, value: ir.Value, plan: QuantizationPlan, kind: IntegerType, *, for_everyone: bool
) -> None:
    """Put a pair behind a tensor; where its writer is float, only integer kernels read the rounded one."""
    tensor = str(value.name)
    readers = [use for use in value.uses() if for_everyone or use.node.name in plan.placement.weights]
    if not readers and not value.is_graph_output():
        return
    scale, zero_point = kind.parameters(plan.range_of(tensor))
    constants = (
        add_constant(graph, f"{tensor}/scale", scale),
        add_constant(graph, f"{tensor}/zero_point", zero_point),
    )
    quantize = ir.node("QuantizeLinear", [value, *constants], name=f"{tensor}/quantize")
    quantize.outputs[0].name = f"{tensor}/integers"
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *constants], name=f"{tensor}/dequantize")
    restored = dequantize.outputs[0]
    restored.name = f"{tensor}/restored"
    graph.extend([quantize, dequantize])
    for reader in readers:
        reader.node.replace_input_with(reader.idx, restored)
    if for_everyone and value.is_graph_output():
        _take_over_output(graph, value, restored)


def _take_over_output(graph: ir.Graph, value: ir.Value, restored: ir.Value) -> None:
    """Let the restored integers be the graph's output, so that the kernel before can write integers."""
    name = value.name
    restored.shape, restored.type = value.shape, value.type
    graph.outputs[list(graph.outputs).index(value)] = restored
    value.name = f"{name}/float"
    restored.name = name
