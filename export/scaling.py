"""The passes that move factors between channels before a plan is made: our equalization, or NNCF's SmoothQuant."""

from __future__ import annotations

import onnx_ir as ir
from torch.fx import GraphModule

from deploykit.backbones.base import BaseBackbone
from deploykit.calibration.equalization import equalization_passes
from deploykit.calibration.images import CalibrationSet
from deploykit.calibration.nncf_smoothquant import smoothing_passes
from deploykit.export.to_onnx import to_onnx
from deploykit.export.trace import output_names
from deploykit.fusion.pipeline import FusionPass
from deploykit.fusion.program import export_program
from deploykit.spec import InputSpec, Precision


def scaling_passes(
    backbone: BaseBackbone, precision: Precision, images: CalibrationSet | None, spec: InputSpec
) -> tuple[FusionPass, ...]:
    """Return what a precision asks for; nothing but for INT8.

    Args:
        backbone: whose fused program the passes are for.
        precision: with its recipe's settings.
        images: what to calibrate with.
        spec: the input that the program was traced for.
    """

    def to_graph(module: GraphModule) -> ir.Model:
        return to_onnx(export_program(module, spec), spec, output_names(backbone))

    return (*equalization_passes(precision, images, spec), *smoothing_passes(precision, images, to_graph))
