"""INT8 into ONNX Runtime and OpenVINO: ours beside FP32 and beside NNCF and ONNX Runtime's own quantizer.

EfficientNet-Lite0 with its ImageNet weights. Every route gets the same FP32 graph and the same
calibration crops; the figures come from crops of other photographs. Times are medians over rounds
in which all routes of a runtime take turns. NNCF is a row when the package is installed.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image

from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.registry import build_backbone
from deploykit.backbones.weights import weights_digest
from deploykit.calibration.dialects import onnxruntime as ort_dialect
from deploykit.calibration.dialects import openvino as openvino_dialect
from deploykit.calibration.images import calibration_set, preprocess
from deploykit.calibration.precision import plan_precision
from deploykit.cli.demo import CALIBRATED, SHOWN, photograph_folder
from deploykit.export.graphs import output_specs
from deploykit.export.to_onnx import to_onnx
from deploykit.export.trace import output_names, trace
from deploykit.graph import Graph
from deploykit.parity.metrics import sqnr_db, top1_agreement
from deploykit.runtimes.base import FloatArray
from deploykit.spec import InputSpec, Int8

Call = Callable[[FloatArray], list[FloatArray]]


def crops(names: Iterable[str], count: int, seed: int, spec: InputSpec) -> FloatArray:
    """Square crops of photographs, preprocessed: ``(count, 3, H, W)``."""
    generator, names, images = np.random.default_rng(seed), list(names), []
    for number in range(count):
        with Image.open(photograph_folder() / names[number % len(names)]) as photograph:
            side = int(min(photograph.size) * generator.uniform(0.5, 1.0))
            left, top = (int(generator.integers(0, length - side + 1)) for length in photograph.size)
            images.append(preprocess(photograph.crop((left, top, left + side, top + side)), spec))
    return np.stack(images)


def in_onnxruntime(model: onnx.ModelProto) -> Call:
    """A graph as a call in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})


def in_openvino(model: onnx.ModelProto) -> Call:
    """A graph as a call in OpenVINO, precision pinned to FP32 where the graph has no integers."""
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)
    return lambda images: [np.array(value) for value in compiled(images).values()]


def nncf_route(model: onnx.ModelProto, images: FloatArray) -> onnx.ModelProto:
    """NNCF's post-training quantization of the ONNX graph, mixed preset."""
    import nncf

    dataset = nncf.Dataset([image[None] for image in images], lambda image: {"images": image})
    return nncf.quantize(copy.deepcopy(model), dataset, preset=nncf.QuantizationPreset.MIXED, subset_size=len(images))


def ort_route(model: onnx.ModelProto, images: FloatArray) -> onnx.ModelProto:
    """ONNX Runtime's static quantization, per channel, Q/DQ."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> Any:
            image = next(self.left, None)
            return None if image is None else {"images": image[None]}

    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "fp32.onnx", Path(scratch) / "int8.onnx"
        onnx.save(model, source)
        quantize_static(
            source, target, Reader(), per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8
        )
        return onnx.load(target)


def main() -> None:
    """Print a table a runtime."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="timed rounds (default: %(default)s)")
    parser.add_argument(
        "--images", type=int, default=96, help="calibration and evaluation crops (default: %(default)s)"
    )
    options = parser.parse_args()
    backbone = build_backbone("efficientnet_lite0", BackboneOptions(), pretrained=True)
    spec = InputSpec(preprocessing=backbone.input_spec.preprocessing)
    model = to_onnx(trace(backbone, spec), spec, output_names(backbone))
    master = Graph(input=spec, outputs=output_specs(model), model=model)
    images = crops(CALIBRATED, options.images, 0, spec)
    evaluated = crops((*SHOWN, "motorcycle_right.png"), options.images, 1, spec)
    plan = plan_precision(
        model,
        Int8(),
        calibration=calibration_set(images, spec),
        probe=images[:1],
        weights_digest=weights_digest(backbone),
    )
    stock = {"ORT quantize_static": ort_route(model, images)}
    if importlib.util.find_spec("nncf"):
        stock["NNCF on ONNX"] = nncf_route(model, images)
    else:
        print("NNCF is not installed, so its row is absent: pip install nncf")
    ours = {"onnxruntime": ort_dialect.render(master, plan), "openvino": openvino_dialect.render(master, plan)}
    reference = outputs_of(in_onnxruntime(model), evaluated)
    for runtime, open_graph in {"onnxruntime": in_onnxruntime, "openvino": in_openvino}.items():
        graphs = {"FP32": model, **stock, "deploykit INT8": ours[runtime].model}
        report(
            runtime, {name: open_graph(graph) for name, graph in graphs.items()}, evaluated, reference, options.rounds
        )


def outputs_of(call: Call, images: FloatArray) -> list[FloatArray]:
    """Every output over all images."""
    return [np.concatenate(parts) for parts in zip(*(call(image[None]) for image in images), strict=True)]


def report(runtime: str, calls: dict[str, Call], images: FloatArray, reference: list[FloatArray], rounds: int) -> None:
    """Time the calls in turns and print their figures."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 10):
        for name, call in calls.items():
            start = time.perf_counter()
            call(images[:1])
            times[name].append(time.perf_counter() - start)
    print(
        f"\n{runtime}: EfficientNet-Lite0, batch 1, 224x224, median of {rounds} rounds, {len(images)} evaluation crops"
    )
    print(f"{'route':<22} {'ms':>8} {'FP32/route':>11} {'stage4 dB':>10} {'logits dB':>10} {'top-1':>7}")
    medians = {name: statistics.median(values[10:]) for name, values in times.items()}
    for name, call in calls.items():
        outputs = outputs_of(call, images)
        features, logits = (sqnr_db(reference[index], outputs[index]) for index in (-2, -1))
        agreement = top1_agreement(reference[-1], outputs[-1])
        print(
            f"{name:<22} {1000 * medians[name]:8.2f} {medians['FP32'] / medians[name]:11.2f} "
            f"{features:10.1f} {logits:10.1f} {agreement:7.1%}"
        )


if __name__ == "__main__":
    main()
