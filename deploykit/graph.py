"""The artefact that flows from tracing to lowering: one network, as a torch program and as ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploykit.spec import InputSpec, TensorSpec

if TYPE_CHECKING:
    import onnx
    import torch


@dataclass(frozen=True, kw_only=True)
class Graph:
    """One network with named outputs, in the order in which an engine gives them.

    The master graph has both forms in FP32. A dialect fills the one that its runtime takes:
    ``model`` for ONNX runtimes, ``program`` for inductor.
    """

    input: InputSpec
    outputs: tuple[TensorSpec, ...]
    model: onnx.ModelProto | None = None
    program: torch.export.ExportedProgram | None = None
