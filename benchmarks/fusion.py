"""What the fusion passes gain: one backbone's graph with and without them, in ONNX Runtime and OpenVINO.

FP32, batch 1, random weights, logits alone. The two graphs of a backbone take turns in one process, and
the figures are medians over the rounds. ONNX Runtime and OpenVINO run all of their own passes on both.
"""

from __future__ import annotations

import argparse
import statistics
import warnings

import numpy as np
import onnx
from _timing import RUNTIMES, alternate

from deploykit.backbones.base import BackboneOptions, BaseBackbone
from deploykit.backbones.registry import build_backbone
from deploykit.export.graphs import output_specs, select
from deploykit.export.to_onnx import to_onnx
from deploykit.export.trace import output_names, trace
from deploykit.fusion.onnx_passes import specialize
from deploykit.fusion.pipeline import fuse
from deploykit.graph import Graph
from deploykit.spec import BatchRange, InputSpec

MODELS = (
    "resnet50",
    "efficientnet_b0",
    "mobilenetv3_large_100",
    "regnety_008",
    "vit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "mobilevit_s",
)


def engine_graph(backbone: BaseBackbone, runtime: str, *, fused: bool) -> onnx.ModelProto:
    """The ONNX graph that deploykit exports to a runtime for a backbone's logits at FP32, batch of any size."""
    source = backbone.input_spec
    spec = InputSpec(batch=BatchRange(), height=source.height, width=source.width)
    images = np.random.default_rng(0).normal(size=(2, *spec.shape[1:])).astype(np.float32)
    program = trace(backbone, spec)
    if fused:
        program = fuse(program, spec, images).program
    model = to_onnx(program, spec, output_names(backbone))
    graph = select(Graph(input=spec, outputs=output_specs(model), model=model), ("logits",))
    if fused:
        graph = specialize(graph, runtime, images).graph
    assert graph.model is not None
    return graph.model


def main() -> None:
    """Print a row a backbone and runtime, then the geometric means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, help="backbones (default: the eight of the table)")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds (default: %(default)s)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    ratios: dict[str, list[float]] = {runtime: [] for runtime in RUNTIMES}
    print(f"{'backbone':<30} {'runtime':<12} {'unfused ms':>11} {'fused ms':>9} {'fused/unfused':>14}")
    for name in options.models:
        backbone = build_backbone(name, BackboneOptions()).eval()
        images = np.random.default_rng(1).normal(size=(1, *backbone.input_spec.shape[1:])).astype(np.float32)
        for runtime, open_graph in RUNTIMES.items():
            forms = {"unfused": False, "fused": True}
            calls = {form: open_graph(engine_graph(backbone, runtime, fused=fused)) for form, fused in forms.items()}
            found = alternate(calls, images, options.rounds)
            ratios[runtime].append(found["fused"] / found["unfused"])
            row = f"{found['unfused']:11.2f} {found['fused']:9.2f} {ratios[runtime][-1]:14.3f}"
            print(f"{name:<30} {runtime:<12} {row}", flush=True)
    for runtime, values in ratios.items():
        print(f"{'geometric mean':<30} {runtime:<12} {'':>11} {'':>9} {statistics.geometric_mean(values):14.3f}")


if __name__ == "__main__":
    main()
