"""The two artefacts that flow from tracing to lowering: one network as an ONNX graph, or as a torch program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from deploykit.spec import InputSpec, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

TRANSPOSED = ".T"
"""Ends the name of a linear layer's weight in an ONNX graph, where it stands transposed, ``(in, out)``."""


@dataclass(frozen=True, kw_only=True)
class OnnxGraph:
    """An ONNX graph with named outputs, in the order in which an engine gives them."""

    input: InputSpec
    outputs: tuple[TensorSpec, ...]
    model: ir.Model


@dataclass(frozen=True, kw_only=True)
class TorchProgram:
    """A `torch.export` program with the same outputs, which it gives by position.

    ``half_except``: the runtime's converter casts its float operators to float16, but for those that read one of these
    weights; None: it computes them as they are.
    """

    input: InputSpec
    outputs: tuple[TensorSpec, ...]
    program: torch.export.ExportedProgram
    half_except: tuple[str, ...] | None = None


Graph: TypeAlias = OnnxGraph | TorchProgram


@dataclass(frozen=True, kw_only=True)
class Master:
    """A fused network in FP32, in both forms: plans are made from ``onnx``; a backend lowers its own form."""

    onnx: OnnxGraph
    torch: TorchProgram

    def form(self, source: str) -> Graph:
        """Return the form that a backend lowers; ``source`` is its `Backend.source`."""
        forms: Mapping[str, Graph] = {"onnx": self.onnx, "torch": self.torch}
        return forms[source]
