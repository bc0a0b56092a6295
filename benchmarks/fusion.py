"""What the fusion passes gain: one backbone's graph with and without them, in ONNX Runtime and OpenVINO.

FP32, batch 1, random weights, logits alone. The two graphs of a backbone take turns in one process, and
the figures are medians over the rounds. ONNX Runtime and OpenVINO run all of their own passes on both.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import onnx

from deploykit.backbones.base import BackboneOptions, BaseBackbone
from deploykit.backbones.registry import build_backbone
from deploykit.export.graphs import output_specs, select
from deploykit.export.to_onnx import to_onnx
from deploykit.export.trace import output_names, trace
from deploykit.fusion.onnx_passes import specialize
from deploykit.fusion.pipeline import fuse
from deploykit.graph import Graph
from deploykit.runtimes.base import FloatArray
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
WARM_UP = 4

Call = Callable[[FloatArray], object]


def in_onnxruntime(model: onnx.ModelProto) -> Call:
    """A graph as a call in ONNX Runtime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def in_openvino(model: onnx.ModelProto) -> Call:
    """A graph as a call in OpenVINO, on the CPU, precision pinned to FP32."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    core = openvino.Core()
    request = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings).create_infer_request()
    return lambda images: request.infer([images], share_inputs=True)


RUNTIMES: dict[str, Callable[[onnx.ModelProto], Call]] = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}


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


def alternate(calls: Mapping[str, Call], images: FloatArray, rounds: int) -> dict[str, float]:
    """Milliseconds a call, the median of ``rounds`` in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + WARM_UP):
        for name, call in calls.items():
            start = time.perf_counter()
            call(images)
            times[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values[WARM_UP:]) for name, values in times.items()}


def main() -> None:
    """Print a row a backbone and runtime, then the geometric means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, help="backbones (default: the eight of the table)")
    parser.add_argument("--rounds", type=int, default=100, help="timed rounds (default: %(default)s)")
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
