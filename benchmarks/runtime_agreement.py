"""One quantization plan in two runtimes: how far they are apart, and which part of it is whose.

Three errors are kept apart, each as the SQNR in dB of the logits (and of the last feature map) over crops of
photographs that nothing was calibrated on:

- conversion: one FP32 graph in ONNX Runtime and in OpenVINO;
- quantization: INT8 against FP32 in one runtime, by that runtime's own rendering of the plan;
- runtime: one Q/DQ graph in both runtimes, for each of the two renderings.

``plan`` is what a user sees who ships one plan to both: each runtime's own rendering against the other's.
``floor`` is ONNX Runtime's INT8 engine against itself, when the images change by a normal deviation of 1e-4, under
a hundredth of a pixel's step. Where a value stands near the middle of two steps, anything that differs in the last
bits flips it, the flip is as large as the rounding noise, and the layers behind it flip more: no two programs that
add in different orders agree better than this.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from _planned import DIALECTS, NETWORKS, Network
from _timing import RUNTIMES, outputs_of

from deploykit.parity.metrics import sqnr_db
from deploykit.spec import Int8

COLUMNS = ("conversion", "quantization ort", "quantization ov", "runtime ort", "runtime ov", "plan", "floor")
SHAKE = 1e-4
"""The deviation of the noise on normalised images that the floor is measured with."""


def graphs_of(network: Network, settings: Int8) -> dict[str, onnx.ModelProto]:
    """The FP32 graph of a network and the plan's rendering for each runtime, all from one calibration."""
    master = network.fused(settings)
    plan = network.plan(master, settings)
    return {"fp32": master.model} | {
        runtime: dialect.render(master, plan, network.calibrated).graph.model for runtime, dialect in DIALECTS.items()
    }


def measure(name: str, count: int, settings: Int8) -> dict[str, Any]:
    """Every column of a network: ``[last features, logits]`` in dB."""
    network = Network.named(name, count, count)
    evaluated, graphs = network.evaluated, graphs_of(network, settings)
    found = {
        (graph, runtime): outputs_of(open_graph(model), evaluated)
        for graph, model in graphs.items()
        for runtime, open_graph in RUNTIMES.items()
    }
    ort, ov = "onnxruntime", "openvino"
    noise = SHAKE * np.random.default_rng(0).standard_normal(evaluated.shape, np.float32)
    found["shaken", ort] = outputs_of(RUNTIMES[ort](graphs[ort]), evaluated + noise)

    def apart(one: tuple[str, str], other: tuple[str, str]) -> list[float]:
        return [float(sqnr_db(found[one][place], found[other][place])) for place in (-2, -1)]

    return {
        "network": name,
        "conversion": apart(("fp32", ort), ("fp32", ov)),
        "quantization ort": apart(("fp32", ort), (ort, ort)),
        "quantization ov": apart(("fp32", ov), (ov, ov)),
        "runtime ort": apart((ort, ort), (ort, ov)),
        "runtime ov": apart((ov, ort), (ov, ov)),
        "plan": apart((ort, ort), (ov, ov)),
        "floor": apart((ort, ort), ("shaken", ort)),
    }


def main() -> None:
    """Measure the networks that are asked for and print a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="backbones (default: the eight of the table)")
    parser.add_argument("--images", type=int, default=8, help="calibration and evaluation crops (default: 8)")
    parser.add_argument("--results", type=Path, help="a JSON-lines file to add to: networks in it are not measured")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    kept = options.results.read_text().splitlines() if options.results and options.results.exists() else []
    rows = {row["network"]: row for row in map(json.loads, kept)}
    print("SQNR in dB, last features / logits\n" + f"{'network':<29}" + "".join(f"{column:>18}" for column in COLUMNS))
    for name in options.networks:
        if name not in rows:
            rows[name] = measure(name, options.images, Int8())
            if options.results:
                with options.results.open("a") as file:
                    file.write(json.dumps(rows[name]) + "\n")
        cells = (" / ".join(f"{value:.1f}" for value in rows[name][column]) for column in COLUMNS)
        print(f"{name:<29}" + "".join(f"{cell:>18}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
