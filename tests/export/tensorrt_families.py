"""Every family's graph as TensorRT gets it, in every precision: what the tests of the builds share."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import deploykit
from deploykit.backbones.weights import weights_digest
from deploykit.calibration.dialects.tensorrt import render
from deploykit.calibration.images import calibration_set
from deploykit.calibration.precision import plan_precision
from deploykit.export.graphs import output_specs, select
from deploykit.export.measure import torch_outputs
from deploykit.export.to_onnx import to_onnx
from deploykit.export.trace import Everything, output_names
from deploykit.fusion.pipeline import fuse
from deploykit.fusion.program import export_program
from deploykit.graph import Graph
from deploykit.runtimes.base import FloatArray
from deploykit.spec import Batch, BatchRange, Fp16, Fp32, Int8, Precision
from tests.backbones.realistic import randomize

SMALL: dict[str, tuple[str, int]] = {
    "resnet": ("resnet18", 64),
    "resnetv2": ("resnetv2_50", 64),
    "efficientnet": ("efficientnet_b0", 64),
    "regnet": ("regnety_002", 64),
    "mobilenet": ("mobilenetv3_small_100", 64),
    "vit": ("vit_tiny_patch16_224", 64),
    "hybrid": ("vit_small_r26_s32_224", 96),
    "mobilevit": ("mobilevit_s", 128),
    "coatnet": ("coatnet_0_rw_224", 128),
    "convnext": ("convnext_atto", 64),
    "swin": ("swin_tiny_patch4_window7_224", 224),
}
"""A small variant of each family, and an image size in pixels."""

PRECISIONS: dict[str, Precision] = {
    "fp32": Fp32(),
    "fp16": Fp16(),
    "int8": Int8(),
    "int8+fp16": Int8(float_dtype="fp16"),
}
IMAGES = 4


@dataclass(frozen=True, kw_only=True)
class Family:
    """A master graph with every level and the logits, its images, and what torch gives for them."""

    master: Graph
    images: FloatArray
    expected: dict[str, FloatArray]
    levels: tuple[str, ...]
    photographs: Path
    digest: str

    def graph(self, precision: str, *, features: bool) -> Graph:
        """The part of the master that gives the levels or the logits, in a precision."""
        chosen = PRECISIONS[precision]
        spec = replace(self.master.input, batch=1)
        calibration = calibration_set(self.photographs, spec) if isinstance(chosen, Int8) else None
        plan = plan_precision(
            self.master.model, chosen, calibration=calibration, probe=self.images, weights_digest=self.digest
        )
        return select(render(self.master, plan), self.levels if features else ("logits",))


@functools.cache
def family(name: str, photographs: Path, *, dynamic: bool) -> Family:
    variant, side = SMALL[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = randomize(deploykit.create_backbone(variant, image_size=side, num_classes=10)).eval()
    batch: Batch = BatchRange(min=1, opt=2, max=4) if dynamic else 1
    spec = replace(backbone.input_spec, batch=batch)
    images = np.ascontiguousarray(calibration_set(photographs, backbone.input_spec).sample(IMAGES))
    names = output_names(backbone)
    fused = fuse(export_program(Everything(backbone).requires_grad_(False), spec), spec, images)
    model = to_onnx(fused.program, spec, names)
    master = Graph(input=spec, outputs=output_specs(model), model=model, program=fused.program)
    return Family(
        master=master,
        images=images,
        expected=torch_outputs(backbone, images),
        levels=tuple(each for each in names if each != "logits"),
        photographs=photographs,
        digest=weights_digest(backbone),
    )
