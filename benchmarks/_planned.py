"""What the benchmarks of INT8 share: networks, crops of photographs, fused graphs and their plans."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from _from_tests import realistic
from PIL import Image

from deploykit.arrays import FloatArray
from deploykit.backbones.base import BackboneOptions, BaseBackbone
from deploykit.backbones.registry import build_backbone
from deploykit.backbones.weights import weights_digest
from deploykit.backends.onnxruntime.passes import DIALECT as ONNXRUNTIME
from deploykit.backends.openvino.passes import DIALECT as OPENVINO
from deploykit.calibration.dialect import OnnxDialect
from deploykit.calibration.images import calibration_set
from deploykit.calibration.precision import Tuning, plan_precision
from deploykit.calibration.precision_plan import PrecisionPlan
from deploykit.calibration.recipes import with_recipe
from deploykit.cli.demo import CALIBRATED, SHOWN, photograph_folder
from deploykit.export.graphs import output_specs
from deploykit.export.job import ExportJob
from deploykit.export.scaling import scaling_passes
from deploykit.export.to_onnx import to_onnx
from deploykit.export.trace import output_names, trace
from deploykit.export.tuning import tuning
from deploykit.fusion.pipeline import export_passes, fuse
from deploykit.graph import Master, OnnxGraph, TorchProgram
from deploykit.images.preprocess import preprocess
from deploykit.onnx_session import onnx_session
from deploykit.options import ExportOptions
from deploykit.progress import quiet
from deploykit.spec import Fp32, InputSpec, Int8

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
REAL = ("tf_efficientnet_lite0", "mobilenetv2_100")
"""Networks whose trained weights a package carries; the others have random ones, drawn as training leaves them."""
HEADLESS = ("mobilenetv2_100",)
"""Networks whose weights come without a classifier: they give the pooled features."""
_OTHER_IMAGES = (
    *("brick", "camera", "cell", "clock_motion", "coins", "color"),
    *("grass", "gravel", "horse", "moon", "page", "text"),
)
DIALECTS: dict[str, OnnxDialect] = {"onnxruntime": ONNXRUNTIME, "openvino": OPENVINO}


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A backbone, its input one image at a time, and crops of it, ``(count, 3, H, W)``.

    ``calibrated`` is what plans are made with; ``evaluated`` are crops of other photographs.
    """

    backbone: BaseBackbone
    spec: InputSpec
    calibrated: FloatArray
    evaluated: FloatArray

    @classmethod
    def named(cls, name: str, calibrated: int, evaluated: int) -> Network:
        """One of `REAL` with its ImageNet weights, or another one with realistic random ones."""
        torch.manual_seed(0)
        pretrained = name in REAL
        classes = 0 if name in HEADLESS else 1000
        backbone = build_backbone(name, BackboneOptions(num_classes=classes), pretrained=pretrained)
        backbone = (backbone if pretrained else realistic(backbone)).eval()
        return cls.of(backbone, calibrated, evaluated)

    @classmethod
    def of(cls, backbone: BaseBackbone, calibrated: int, evaluated: int) -> Network:
        """Any backbone, as it is."""
        spec = replace(backbone.input_spec, batch=1)
        return cls(
            backbone=backbone,
            spec=spec,
            calibrated=crops_of(varied_photographs(), calibrated, 0, spec),
            evaluated=crops_of((*SHOWN, "motorcycle_right.png"), evaluated, 1, spec),
        )

    @cached_property
    def expected(self) -> list[FloatArray]:
        """What torch gives at FP32 for the evaluation crops: every level, then the logits or pooled features."""
        with torch.no_grad():
            found = [
                [output.numpy() for output in self.backbone.forward_everything(torch.from_numpy(image[None])).values()]
                for image in self.evaluated
            ]
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def fused(self, settings: Int8 | None) -> OnnxGraph:
        """The FP32 graph, equalized where settings for INT8 are given."""
        return self.master(settings).onnx

    def master(self, settings: Int8 | None) -> Master:
        """The same network as a graph and as a torch program."""
        program = self._program(settings)
        model = to_onnx(program, self.spec, output_names(self.backbone))
        outputs = output_specs(model)
        return Master(
            onnx=OnnxGraph(input=self.spec, outputs=outputs, model=model),
            torch=TorchProgram(input=self.spec, outputs=outputs, program=program),
        )

    def _program(self, settings: Int8 | None) -> torch.export.ExportedProgram:
        images = calibration_set(self.calibrated, self.spec)
        precision = self._settled(settings) if settings is not None else Fp32()
        scaling = scaling_passes(self.backbone, precision, images, self.spec)
        return fuse(trace(self.backbone, self.spec), self.spec, self.calibrated, export_passes(*scaling)).program

    def plan(self, graph: OnnxGraph, settings: Int8, runtime: str = "onnxruntime") -> PrecisionPlan:
        """The plan of a graph that `fused` gave for the same settings; ``distilled`` tunes it for the runtime."""
        return plan_precision(
            graph.model,
            self._settled(settings),
            calibration=calibration_set(self.calibrated, self.spec),
            probe=self.calibrated[:1],
            weights_digest=weights_digest(self.backbone),
            tune=self._tuning(graph, self._settled(settings), runtime),
        )

    def _tuning(self, graph: OnnxGraph, settings: Int8, runtime: str) -> Tuning | None:
        if settings.rounding != "distilled":
            return None
        images = calibration_set(self.calibrated, self.spec)
        options = ExportOptions(runtime=runtime, precision=settings)
        program = TorchProgram(input=graph.input, outputs=graph.outputs, program=self._program(settings))
        job = ExportJob(backbone=self.backbone, options=options, images=images)
        return tuning(job, Master(onnx=graph, torch=program), quiet)

    def _settled(self, settings: Int8) -> Int8:
        return with_recipe(settings, self.backbone.family)


def node_by_node(model: ir.Model, images: FloatArray) -> list[FloatArray]:
    """Every output of a graph over all images, each node as it is written: no processor's 8-bit products saturate."""
    session, name = onnx_session(model, optimize=False), str(model.graph.inputs[0].name)
    found = [session.run(None, {name: image[None]}) for image in images]
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def varied_photographs() -> tuple[Path, ...]:
    """Return twenty images of many kinds that installed packages carry, none of which is evaluated.

    A network that learns, or a range, needs variety more than many crops of few photographs.
    """
    skimage, sklearn, matplotlib = (Path(str(resources.files(name))) for name in ("skimage", "sklearn", "matplotlib"))
    return (
        *(photograph_folder() / name for name in CALIBRATED),
        *(skimage / "data" / f"{name}.png" for name in _OTHER_IMAGES),
        *(sklearn / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")),
        matplotlib / "mpl-data" / "sample_data" / "grace_hopper.jpg",
    )


def crops_of(names: Iterable[str | Path], count: int, seed: int, spec: InputSpec) -> FloatArray:
    """Square crops of photographs, preprocessed: ``(count, 3, H, W)``."""
    generator, names, images = np.random.default_rng(seed), list(names), []
    for number in range(count):
        with Image.open(photograph_folder() / names[number % len(names)]) as photograph:
            side = int(min(photograph.size) * generator.uniform(0.5, 1.0))
            left, top = (int(generator.integers(0, length - side + 1)) for length in photograph.size)
            images.append(preprocess(photograph.crop((left, top, left + side, top + side)), spec)[0])
    return np.stack(images)
