"""One quantization plan in two runtimes: how far they are apart, and which part of it is whose.

Three errors are kept apart, each as the SQNR in dB of the logits (and of the last feature map) over crops of
photographs that nothing was calibrated on:

- conversion: one FP32 graph in ONNX Runtime and in OpenVINO;
- quantization: INT8 against FP32 in one runtime, by that runtime's own rendering of the plan;
- runtime: one Q/DQ graph in both runtimes, for each of the two renderings.

``plan`` is what a user sees who ships one plan to both: each runtime's own rendering against the other's. Where
the two put their roundings at different tensors, the noises of both quantizations add up in it.
``as written`` is a Q/DQ graph node by node, unoptimized, against what the runtime makes of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from _from_tests import realistic
from _timing import RUNTIMES, Call, outputs_of
from quantization import DIALECTS, NETWORKS, crops

from deploykit.backbones.base import BackboneOptions, BaseBackbone
from deploykit.backbones.registry import build_backbone
from deploykit.backbones.weights import weights_digest
from deploykit.calibration.equalization import equalization_passes
from deploykit.calibration.images import calibration_set
from deploykit.calibration.plan import onnx_session
from deploykit.calibration.precision import plan_precision
from deploykit.cli.demo import CALIBRATED, SHOWN
from deploykit.export.graphs import output_specs
from deploykit.export.to_onnx import to_onnx
from deploykit.export.trace import output_names, trace
from deploykit.fusion.pipeline import EXPORT_PASSES, fuse
from deploykit.graph import Graph
from deploykit.parity.metrics import sqnr_db
from deploykit.runtimes.base import FloatArray
from deploykit.spec import Int8

COLUMNS = ("conversion", "quantization ort", "quantization ov", "runtime ort", "runtime ov", "plan")


def backbone_of(name: str) -> BaseBackbone:
    """EfficientNet-Lite0 with its ImageNet weights, others with realistic random ones."""
    torch.manual_seed(0)
    pretrained = name == "tf_efficientnet_lite0"
    backbone = build_backbone(name, BackboneOptions(), pretrained=pretrained)
    return (backbone if pretrained else realistic(backbone)).eval()


def graphs_of(backbone: BaseBackbone, calibrated: FloatArray, settings: Int8) -> dict[str, onnx.ModelProto]:
    """The FP32 graph of a network and the plan's rendering for each runtime, all from one calibration."""
    spec = backbone.input_spec
    images = calibration_set(calibrated, spec)
    passes = (*EXPORT_PASSES, *equalization_passes(settings, images, spec))
    model = to_onnx(fuse(trace(backbone, spec), spec, calibrated, passes).program, spec, output_names(backbone))
    master = Graph(input=spec, outputs=output_specs(model), model=model)
    plan = plan_precision(
        model, settings, calibration=images, probe=calibrated[:1], weights_digest=weights_digest(backbone)
    )
    return {"fp32": model} | {runtime: dialect.render(master, plan).model for runtime, dialect in DIALECTS.items()}


def as_written(model: onnx.ModelProto) -> Call:
    """A graph as a call that runs each node as it stands."""
    session = onnx_session(model, optimize=False)
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def measure(name: str, count: int, settings: Int8) -> dict[str, Any]:
    """Every column of a network: ``[last features, logits]`` in dB."""
    backbone = backbone_of(name)
    spec = backbone.input_spec
    evaluated = crops((*SHOWN, "motorcycle_right.png"), count, 1, spec)
    graphs = graphs_of(backbone, crops(CALIBRATED, count, 0, spec), settings)
    found = {
        (graph, runtime): outputs_of(open_graph(model), evaluated)
        for graph, model in graphs.items()
        for runtime, open_graph in (*RUNTIMES.items(), ("as written", as_written))
    }

    def apart(one: tuple[str, str], other: tuple[str, str]) -> list[float]:
        return [float(sqnr_db(found[one][place], found[other][place])) for place in (-2, -1)]

    ort, ov = "onnxruntime", "openvino"
    return {
        "network": name,
        "conversion": apart(("fp32", ort), ("fp32", ov)),
        "quantization ort": apart(("fp32", ort), (ort, ort)),
        "quantization ov": apart(("fp32", ov), (ov, ov)),
        "runtime ort": apart((ort, ort), (ort, ov)),
        "runtime ov": apart((ov, ort), (ov, ov)),
        "plan": apart((ort, ort), (ov, ov)),
        "as written ort": apart((ort, "as written"), (ort, ort)),
        "as written ov": apart((ov, "as written"), (ov, ov)),
    }


def main() -> None:
    """Measure the networks that are asked for and print a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="backbones (default: the eight of the table)")
    parser.add_argument("--images", type=int, default=16, help="calibration and evaluation crops (default: 16)")
    parser.add_argument("--results", type=Path, help="a JSON-lines file to add to: networks in it are not measured")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    kept = options.results.read_text().splitlines() if options.results and options.results.exists() else []
    rows = {row["network"]: row for row in map(json.loads, kept)}
    columns = (*COLUMNS, "as written ort", "as written ov")
    print("SQNR in dB, last features / logits\n" + f"{'network':<29}" + "".join(f"{column:>18}" for column in columns))
    for name in options.networks:
        if name not in rows:
            rows[name] = measure(name, options.images, Int8())
            if options.results:
                with options.results.open("a") as file:
                    file.write(json.dumps(rows[name]) + "\n")
        cells = (" / ".join(f"{value:.1f}" for value in rows[name][column]) for column in columns)
        print(f"{name:<29}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
