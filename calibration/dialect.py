"""How a backend writes a precision plan into its graph: ordered passes over one graph and one plan.

A pass is a function in a file of its own; a backend's ``passes.py`` puts them in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import onnx_ir as ir

from deploykit.arrays import FloatArray
from deploykit.calibration.cast_to_half import cast_to_half
from deploykit.calibration.half import HalfPlan
from deploykit.calibration.kernel_rounding import KernelRounding, RoundingRule, as_planned
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.precision_plan import PrecisionPlan
from deploykit.calibration.quantize_activations import UINT8, IntegerType
from deploykit.fusion.onnx_passes import OnnxPass, run_onnx_passes
from deploykit.fusion.pipeline import FusionRecord
from deploykit.graph import Graph, OnnxGraph

QuantizationPass: TypeAlias = Callable[[ir.Model, QuantizationPlan], QuantizationPlan]
"""Rewrites a graph in place for a plan; returns the plan that the next pass goes by."""

FloatChoice: TypeAlias = Callable[[ir.Model, QuantizationPlan], Mapping[str, str]]
"""Nodes of a plan that a backend keeps in float, each with the reason."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A graph in the precision of its plan, as a backend takes it, and what its exact passes did."""

    graph: Graph
    records: tuple[FusionRecord, ...] = ()


class Dialect(Protocol):
    """What planning, measuring and building ask of a backend's dialect."""

    @property
    def activations(self) -> IntegerType:
        """The type in which integer nodes read."""
        ...

    @property
    def dynamic_operators(self) -> frozenset[str]:
        """The operators that take their range from each call."""
        ...

    @property
    def integer_outputs(self) -> bool:
        """Whether what integer kernels write, and what stands between them, is rounded for float nodes too."""
        ...

    @property
    def integer_biases(self) -> bool:
        """Whether biases of convolutions are rounded to the steps of their products."""
        ...

    def keep_float(self, model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
        """Return the part of a plan that this dialect writes in integers, the rest with the reason why not."""
        ...

    def kernel_rounding(self, model: ir.Model, plan: QuantizationPlan) -> KernelRounding:
        """Return how kernels depart from the roundings of a plan that `keep_float` gave."""
        ...

    def render(self, graph: Any, plan: PrecisionPlan, probe: FloatArray) -> Rendered:
        """Write a plan (None: FP32) into a copy of a master graph; exact passes are compared on ``probe``."""
        ...


@dataclass(frozen=True, kw_only=True)
class OnnxDialect:
    """The dialect of a backend that lowers ONNX graphs.

    Args:
        int8: the passes that write a quantization plan, in order.
        activations: the type in which integer nodes read.
        dynamic_operators: those that take their range from each call.
        integer_outputs: what integer kernels write, and what stands between them, is rounded for float nodes too.
        integer_biases: biases of convolutions are rounded to the steps of their products.
        float_choices: what stays in float because this backend is faster so.
        rounding: tells how kernels depart from the roundings of a plan.
        legalize: passes over the master graph that write operators which the backend refuses or computes wrongly in
            an equal form, each proved on numbers; they run before any plan is written.
        optimize: passes over graphs without integers for the backend's own operators, each proved on numbers. In a
            graph with integers the last bit of a float decides which integer comes next, so none of them runs there.
    """

    int8: tuple[QuantizationPass, ...] = ()
    activations: IntegerType = UINT8
    dynamic_operators: frozenset[str] = frozenset()
    integer_outputs: bool = False
    integer_biases: bool = False
    float_choices: tuple[FloatChoice, ...] = ()
    rounding: RoundingRule = as_planned
    legalize: tuple[OnnxPass, ...] = ()
    optimize: tuple[OnnxPass, ...] = ()

    def keep_float(self, model: ir.Model, plan: QuantizationPlan) -> QuantizationPlan:
        """Return the part of a plan that is written in integers, the rest with the reason why not."""
        return keep_float(model, plan, self.float_choices)

    def kernel_rounding(self, model: ir.Model, plan: QuantizationPlan) -> KernelRounding:
        """Return how kernels depart from the roundings of a plan that `keep_float` gave."""
        return self.rounding(model, plan)

    def render(self, graph: OnnxGraph, plan: PrecisionPlan, probe: FloatArray) -> Rendered:
        """Write a plan into a copy of a master graph.

        BF16 leaves the graph in FP32: the adapter pins the precision in which it is computed.

        Raises:
            FusionError: a pass of ``legalize`` or ``optimize`` failed or changed the numbers.
        """
        batch = graph.input.batch if isinstance(graph.input.batch, int) else 2
        images = probe[np.arange(batch) % len(probe)]
        legal, records = run_onnx_passes(graph.model, images, self.legalize)
        if isinstance(plan, QuantizationPlan):
            # The plan is of the master graph: what legal forms add to it has no place in it.
            model = self._quantized(legal, self.keep_float(graph.model, plan))
            return Rendered(graph=_with_model(graph, model), records=records)
        model = cast_to_half(legal, plan) if isinstance(plan, HalfPlan) else legal
        model, optimized = run_onnx_passes(model, images, self.optimize)
        return Rendered(graph=_with_model(graph, model), records=(*records, *optimized))

    def _quantized(self, legal: ir.Model, plan: QuantizationPlan) -> ir.Model:
        model = legal.clone()
        for step in self.int8:
            plan = step(model, plan)
        return cast_to_half(model, HalfPlan(float_weights={})) if plan.float_dtype == "fp16" else model


def keep_float(model: ir.Model, plan: QuantizationPlan, choices: tuple[FloatChoice, ...]) -> QuantizationPlan:
    """Take the nodes that these choices name out of a plan; a plan that is another tool's stays as it is."""
    if plan.imported:
        return plan
    kept = {node: reason for choose in choices for node, reason in choose(model, plan).items()}
    return plan.without(model, kept) if kept else plan


def _with_model(graph: OnnxGraph, model: ir.Model) -> OnnxGraph:
    return OnnxGraph(input=graph.input, outputs=graph.outputs, model=model)
