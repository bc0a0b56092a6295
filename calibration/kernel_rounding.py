"""What a runtime's kernels make of a plan's roundings: which of them they leave out, and which they add."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx_ir as ir

from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.ranges import ActivationRange


@dataclass(frozen=True, kw_only=True)
class KernelRounding:
    """How kernels depart from a plan, by the names of its tensors.

    Args:
        clipped: tensors that are clipped to their range and not rounded.
        left_out: tensors that are neither.
        ranges: those that a dialect narrows.
        gated: products whose gate, between 0 and 1, is rounded to steps of 1/255.
        readers_only: what integer kernels write is rounded for the layers that read it, and for everyone else in float.
        summands: tensors that a sum reads rounded all the same, each with the name of what that sum gives.
        bias_offsets: what biases of nodes are rounded with, by node.
    """

    clipped: frozenset[str] = frozenset()
    left_out: frozenset[str] = frozenset()
    ranges: Mapping[str, ActivationRange] = field(default_factory=dict)
    gated: frozenset[str] = frozenset()
    readers_only: bool = False
    summands: frozenset[tuple[str, str]] = frozenset()
    bias_offsets: Mapping[str, float] = field(default_factory=dict)


RoundingRule: TypeAlias = Callable[[ir.Model, QuantizationPlan], KernelRounding]
"""Tells it for a master graph and the part of its plan that a dialect writes."""


def as_planned(model: ir.Model, plan: QuantizationPlan) -> KernelRounding:
    """Return that all is rounded as planned."""
    return KernelRounding()
