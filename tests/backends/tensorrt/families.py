"""Every family's graph as an export gives it to TensorRT, in every precision: what tests and a benchmark share."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import openvino
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_conv import Conv as ReferenceConv

import deploykit
from deploykit.arrays import FloatArray
from deploykit.backbones.weights import weights_digest
from deploykit.backends.tensorrt.passes import DIALECT
from deploykit.calibration.images import calibration_set
from deploykit.calibration.plan import QuantizationPlan
from deploykit.calibration.precision import plan_precision
from deploykit.calibration.precision_plan import PrecisionPlan
from deploykit.export.graphs import select
from deploykit.export.job import ExportJob, checked
from deploykit.export.measure import torch_outputs
from deploykit.export.pipeline import Prepared, prepare
from deploykit.graph import Graph, OnnxGraph
from deploykit.onnx_session import graph_batch, onnx_session
from deploykit.options import ExportOptions
from deploykit.progress import quiet
from deploykit.spec import BatchRange, Fp16, Fp32, Int8, Precision
from tests.backbones.realistic import randomize
from tests.small_transformers import SHORT_CONVNEXT, SHORT_VIT

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

SHORT = {"vit": (SHORT_VIT, 64), "convnext": (SHORT_CONVNEXT, 64)}
"""The same operators in fewer blocks, for the quick tests; registered by tests/conftest.py."""

PRECISIONS: dict[str, Precision] = {
    "fp32": Fp32(),
    "fp16": Fp16(),
    "int8": Int8(),
    "int8+fp16": Int8(float_dtype="fp16"),
}
DYNAMIC = BatchRange(min=1, opt=2, max=4)
IMAGES = 8

AS_WRITTEN = {"LP_TRANSFORMS_MODE": "NO", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""OpenVINO's own INT8 kernels skip roundings that the graph has: on ResNet-18 they lie 1.5 dB above it. Without them,
it rounds what a matrix product with 8-bit weights reads in groups of its own: on a small ViT that costs 0.8 dB.
"""

OWN_KERNELS = (
    ("hybrid", "int8"),
    ("hybrid", "int8+fp16"),
    ("coatnet", "int8+fp16"),
    ("convnext", "int8+fp16"),
    ("vit", "int8+fp16"),
)
"""What OpenVINO 2026.4 does not run as it is written, and does with its kernels: it crashes, mixes f32 and f16, or
computes a classifier with weights restored in FP16 wrong (8 dB where ONNX Runtime and its kernels keep 30).
"""


class Family:
    """A small variant with realistic random weights and ten classes, prepared for TensorRT as an export does it."""

    def __init__(self, name: str, photographs: Path, *, dynamic: bool, short: bool = False) -> None:
        self.name = name
        variant, side = SHORT[name] if short else SMALL[name]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            backbone = randomize(deploykit.create_backbone(variant, image_size=side, num_classes=10)).eval()
        images = calibration_set(photographs, backbone.input_spec)
        options = ExportOptions(runtime="tensorrt", batch=DYNAMIC if dynamic else 1)
        self._job = checked(ExportJob(backbone=backbone, options=options, images=images))
        self.levels = tuple(level.name for level in backbone.spec.levels)
        self._rendered: dict[str, OnnxGraph] = {}

    @functools.cached_property
    def images(self) -> FloatArray:
        """What the graphs are compared on, ``(N, C, H, W)``: some images as they are, and mirrored along each side."""
        assert self._job.images is not None
        images = self._job.images.sample(IMAGES)
        return np.concatenate([images, images[..., ::-1], images[..., ::-1, :], images[..., ::-1, ::-1]])

    @functools.cached_property
    def expected(self) -> dict[str, FloatArray]:
        """What torch gives for the images: every level and the logits."""
        return torch_outputs(self._job.backbone, self.images)

    @functools.cached_property
    def _in_float(self) -> Prepared:
        return prepare(self._job, quiet)

    @functools.cached_property
    def _in_integers(self) -> Prepared:
        return prepare(checked(self._job.with_precision(Int8())), quiet)

    def whole(self, precision: str) -> OnnxGraph:
        """The graph that TensorRT is given in a precision, with every level and the logits."""
        if precision not in self._rendered:
            network = self._in_integers if precision.startswith("int8") else self._in_float
            plan = self._plan(network, PRECISIONS[precision])
            self._rendered[precision] = DIALECT.render(network.master.onnx, plan, network.probe).graph
        return self._rendered[precision]

    def graph(self, precision: str, *, features: bool) -> Graph:
        """The part that gives the levels, or the logits."""
        return select(self.whole(precision), self.levels if features else ("logits",))

    def _plan(self, network: Prepared, precision: Precision) -> PrecisionPlan:
        """One calibration serves both kinds of INT8: what stays in float is no part of it."""
        if isinstance(network.plan, QuantizationPlan) and isinstance(precision, Int8):
            return replace(network.plan, float_dtype=precision.float_dtype)
        model, digest = network.master.onnx.model, weights_digest(self._job.backbone)
        return plan_precision(model, precision, calibration=None, probe=network.probe, weights_digest=digest)


@functools.cache
def family(name: str, photographs: Path, *, dynamic: bool, short: bool = False) -> Family:
    """The one instance of a family in this process."""
    return Family(name, photographs, dynamic=dynamic, short=short)


def in_onnxruntime(model: onnx.ModelProto, images: FloatArray) -> list[FloatArray]:
    """Every output of a graph, node by node, as it is written."""
    whole = ir.from_proto(model)
    session = onnx_session(whole, optimize=False)
    name, size = model.graph.input[0].name, graph_batch(whole)
    runs = [session.run(None, {name: images[start : start + size]}) for start in range(0, len(images), size)]
    return [np.concatenate(parts) for parts in zip(*runs, strict=True)]


class MatMul(OpRun):
    """The product of ONNX's own implementation, accumulated in FP32 as GPUs and runtimes do."""

    op_domain = ""

    def _run(self, a, b):
        return (np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(a.dtype),)


class Conv(ReferenceConv):
    """The convolution of ONNX's own implementation, accumulated in FP32."""

    op_domain = ""

    def _run(self, *operands, **attributes):
        (found,) = super()._run(*(operand.astype(np.float32) for operand in operands), **attributes)
        return (found.astype(operands[0].dtype),)


def in_reference(model: onnx.ModelProto, images: FloatArray) -> list[FloatArray]:
    """Every output of a graph of fixed batch 1, by ONNX's own implementation in NumPy: no kernel of a processor."""
    evaluator = ReferenceEvaluator(model, new_ops=[MatMul, Conv])
    runs = [evaluator.run(None, {model.graph.input[0].name: image[None]}) for image in images]
    return [np.concatenate(parts) for parts in zip(*runs, strict=True)]


def in_openvino(model: onnx.ModelProto, images: FloatArray, *, as_written: bool) -> list[FloatArray]:
    """Every output of a graph in OpenVINO; ``as_written``: without its low-precision passes."""
    graph = openvino.Core().read_model(model.SerializeToString())
    settings = {"INFERENCE_PRECISION_HINT": "f32", **(AS_WRITTEN if as_written else {})}
    compiled = openvino.Core().compile_model(graph, "CPU", settings)
    ports = [next(port for port in compiled.outputs if each.name in port.names) for each in model.graph.output]
    size = graph_batch(ir.from_proto(model))
    runs = [compiled([images[start : start + size]]) for start in range(0, len(images), size)]
    return [np.concatenate([np.array(run[port]) for run in runs]) for port in ports]
