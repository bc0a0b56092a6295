"""What the benchmarks of INT8 share: networks, crops of photographs, fused graphs and their plans."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from _from_tests import realistic
from PIL import Image

from deploykit.backbones.base import BackboneOptions, BaseBackbone
from deploykit.backbones.registry import build_backbone
from deploykit.backbones.weights import weights_digest
from deploykit.calibration.dialects import onnxruntime as ort_dialect
from deploykit.calibration.dialects import openvino as openvino_dialect
from deploykit.calibration.equalization import equalization_passes
from deploykit.calibration.images import calibration_set, preprocess
from deploykit.calibration.precision import PrecisionPlan, plan_precision
from deploykit.cli.demo import CALIBRATED, SHOWN, photograph_folder
from deploykit.export.graphs import output_specs
from deploykit.export.to_onnx import to_onnx
from deploykit.export.trace import output_names, trace
from deploykit.fusion.pipeline import EXPORT_PASSES, fuse
from deploykit.graph import Graph
from deploykit.runtimes.base import FloatArray
from deploykit.spec import InputSpec, Int8

NETWORKS = (
    "resnet50",
    "tf_efficientnet_lite0",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "regnety_008",
    "vit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
)
DIALECTS = {"onnxruntime": ort_dialect, "openvino": openvino_dialect}


def backbone_of(name: str) -> BaseBackbone:
    """EfficientNet-Lite0 with its ImageNet weights, others with realistic random ones."""
    torch.manual_seed(0)
    pretrained = name == "tf_efficientnet_lite0"
    backbone = build_backbone(name, BackboneOptions(), pretrained=pretrained)
    return (backbone if pretrained else realistic(backbone)).eval()


def one_image(backbone: BaseBackbone) -> InputSpec:
    """A backbone's input, one image at a time."""
    return replace(backbone.input_spec, batch=1)


def calibrated_crops(count: int, spec: InputSpec) -> FloatArray:
    """What plans are made with, ``(count, 3, H, W)``."""
    return _crops(CALIBRATED, count, 0, spec)


def evaluated_crops(count: int, spec: InputSpec) -> FloatArray:
    """Crops of other photographs, ``(count, 3, H, W)``."""
    return _crops((*SHOWN, "motorcycle_right.png"), count, 1, spec)


def _crops(names: Iterable[str], count: int, seed: int, spec: InputSpec) -> FloatArray:
    """Square crops of photographs, preprocessed: ``(count, 3, H, W)``."""
    generator, names, images = np.random.default_rng(seed), list(names), []
    for number in range(count):
        with Image.open(photograph_folder() / names[number % len(names)]) as photograph:
            side = int(min(photograph.size) * generator.uniform(0.5, 1.0))
            left, top = (int(generator.integers(0, length - side + 1)) for length in photograph.size)
            images.append(preprocess(photograph.crop((left, top, left + side, top + side)), spec))
    return np.stack(images)


def fused_graph(backbone: BaseBackbone, spec: InputSpec, images: FloatArray, settings: Int8 | None) -> Graph:
    """The FP32 graph, equalized where settings for INT8 are given."""
    passes = EXPORT_PASSES
    if settings is not None:
        passes = (*passes, *equalization_passes(settings, calibration_set(images, spec), spec))
    model = to_onnx(fuse(trace(backbone, spec), spec, images, passes).program, spec, output_names(backbone))
    return Graph(input=spec, outputs=output_specs(model), model=model)


def plan_of(graph: Graph, backbone: BaseBackbone, images: FloatArray, settings: Int8) -> PrecisionPlan:
    """The plan of a backbone's fused graph."""
    assert graph.model is not None
    return plan_precision(
        graph.model,
        settings,
        calibration=calibration_set(images, graph.input),
        probe=images[:1],
        weights_digest=weights_digest(backbone),
    )
