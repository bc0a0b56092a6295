"""A quantization plan from the quantizers that another tool put into a graph: its scales, zero points and integers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from deploykit.calibration.placement import IntegerWeight, Placement, place
from deploykit.calibration.plan import IMPORTED, QuantizationPlan, constants_digest
from deploykit.calibration.quantizer_nodes import UINT8_ZERO
from deploykit.calibration.ranges import ActivationRange
from deploykit.calibration.rounded_weight import RoundedWeight
from deploykit.calibration.strip_quantizers import KEEPS_RANGE, Stripped, TensorQuantizer, WeightQuantizer
from deploykit.errors import QuantizedModelError
from deploykit.onnx_values import array_of


@dataclass(frozen=True, kw_only=True)
class ImportedPlan:
    """The plan, and what of the tool's quantizers has no place in it, each with the reason.

    ``ignored`` are activations that the network computes in float, or whose second scale was left out: the network
    is then more exact than the tool's.
    """

    plan: QuantizationPlan
    ignored: tuple[str, ...]


def plan_of(stripped: Stripped, digest: str) -> ImportedPlan:
    """Make the plan of a stripped graph.

    Args:
        stripped: the float graph, with shapes, and its quantizers.
        digest: SHA-256 of the file that it came from, which is the plan's key.

    Raises:
        QuantizedModelError: no layer runs in integers, or weights have zero points or axes that no dialect has.
    """
    model = stripped.model
    placement, ranges = _placed(stripped)
    problems = [
        problem
        for node, use in placement.weights.items()
        if (problem := _weight_problem(node, use, stripped.weights[use.weight])) is not None
    ]
    if problems:
        raise QuantizedModelError("\n".join(problems))
    weights = {
        node: _rounded(
            use, stripped.weights[use.weight], np.asarray(array_of(model.graph.initializers[use.weight]), np.float32)
        )
        for node, use in placement.weights.items()
    }
    plan = QuantizationPlan(
        key=digest,
        weights_digest=digest,
        constants_digest=constants_digest(model),
        calibrator=IMPORTED,
        images=0,
        placement=placement,
        ranges=ranges,
        weights=weights,
    )
    unused = sorted(set(stripped.activations) - _covered(placement, stripped))
    return ImportedPlan(plan=plan, ignored=(*stripped.ignored, *(f"{name}: computed in float" for name in unused)))


def _placed(stripped: Stripped) -> tuple[Placement, dict[str, ActivationRange]]:
    """Find the layers that run in integers here and there, and the range of every tensor that has one."""
    model, quantizers = stripped.model, _Quantizers(stripped)
    kept: dict[str, str] = {}
    for node, use in place(model).weights.items():
        if use.weight not in stripped.weights:
            kept[node] = "its weight is in float in the imported model"
        elif quantizers.of(use.input) is None:
            kept[node] = "what it reads has no scale in the imported model"
    placement = place(model, kept)
    if not placement.weights:
        reasons = "; ".join(f"{node}: {why}" for node, why in [*placement.float_nodes.items()][:4])
        raise QuantizedModelError(
            "no convolution or matrix product of the graph has both its weight and what it reads in 8-bit integers"
            f"{f' ({reasons})' if reasons else ''}. Fix: quantize weights and activations, in the Q/DQ format."
        )
    own = {
        pooled: source
        for pooled, source in placement.same_range.items()
        if quantizers.of(pooled) in (None, quantizers.of(source))
    }
    placement = replace(placement, same_range=own)
    found = {name: quantizers.of(name) for name in placement.tensors}
    ranges = {name: quantizer_range(quantizer) for name, quantizer in found.items() if quantizer is not None}
    return placement.limited_to(ranges), ranges


class _Quantizers:
    """The quantizers of a stripped graph by tensor, also of those that hold the same values, moved or pooled."""

    def __init__(self, stripped: Stripped) -> None:
        self._known = stripped.activations
        graph = stripped.model.graph
        self._values = {str(value.name): value for value in graph.inputs}
        self._values |= {str(value.name): value for node in graph for value in node.outputs}

    def of(self, tensor: str) -> TensorQuantizer | None:
        """Return the quantizer of a tensor, or of one before or behind it with the same values; None: there is none."""
        value = self._values.get(tensor)
        if tensor in self._known or value is None:
            return self._known.get(tensor)
        return self._before(value) or self._behind(value)

    def _before(self, value: ir.Value) -> TensorQuantizer | None:
        producer = value.producer()
        while producer is not None and producer.op_type in KEEPS_RANGE:
            source = producer.inputs[0]
            if source is None or str(source.name) in self._known:
                return None if source is None else self._known[str(source.name)]
            producer = source.producer()
        return None

    def _behind(self, value: ir.Value) -> TensorQuantizer | None:
        readers = list(value.consumers())
        while len(readers) == 1 and readers[0].op_type in KEEPS_RANGE:
            output = readers[0].outputs[0]
            if str(output.name) in self._known:
                return self._known[str(output.name)]
            readers = list(output.consumers())
        return None


def quantizer_range(quantizer: TensorQuantizer) -> ActivationRange:
    """Return the range whose 8-bit integers are a quantizer's: as uint8 exactly, as symmetric int8 with its reach."""
    scale, zero_point = quantizer.scale, quantizer.zero_point
    low, high = -zero_point * scale, (255 - zero_point) * scale
    amax = 127 * scale if zero_point == UINT8_ZERO else max(-low, high)
    return ActivationRange(low=low, high=high, amax=amax)


def _weight_problem(node: str, use: IntegerWeight, weight: WeightQuantizer) -> str | None:
    """Say why a weight cannot be taken; None where it can."""
    if np.any(weight.zero_points != 0):
        return (
            f"{node}: its weight has zero points ({int(weight.zero_points.min())} to {int(weight.zero_points.max())}), "
            "and integer kernels take symmetric weights. Fix: quantize weights symmetrically."
        )
    if weight.scales.size > 1 and weight.axis != use.axis:
        return (
            f"{node}: its weight has one scale for each index of axis {weight.axis}; its output channels are axis "
            f"{use.axis}. Fix: quantize weights per output channel."
        )
    return None


def _rounded(use: IntegerWeight, weight: WeightQuantizer, values: npt.NDArray[np.float32]) -> RoundedWeight:
    channels = values.shape[use.axis]
    scales = np.broadcast_to(weight.scales, (channels,)).astype(np.float32)
    return RoundedWeight.of(values, use.axis, weight.integers, scales)


def _covered(placement: Placement, stripped: Stripped) -> set[str]:
    """Return the quantized tensors that the plan has, those included that only move the values of one."""
    chosen = {*placement.tensors, *placement.same_range}
    before = {
        use.output for use in placement.weights.values()
    }  # a pair before an activation, which the next one covers
    movers = [node for node in stripped.model.graph if node.op_type in KEEPS_RANGE and node.inputs[0] is not None]
    ends = [(str(node.inputs[0].name), str(node.outputs[0].name)) for node in movers]  # type: ignore[union-attr]
    for source, output in ends:
        chosen |= {output} if source in chosen else set()
    for source, output in reversed(ends):
        chosen |= {source} if output in chosen else set()
    return chosen | before
