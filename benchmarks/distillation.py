"""What the recipe ``distilled`` gains on real weights: SQNR in dB before and after it, in each runtime.

Calibrated on crops of twenty images of many kinds, which learning needs more than many crops of few, and evaluated on
crops of other photographs. MobileNetV2 gives its pooled features, EfficientNet-Lite0 its logits. On a processor whose
products of 8-bit weights saturate, graphs are run node by node as they are written. No figure but the seconds of
planning is a time.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from dataclasses import replace

import onnx_ir as ir
from _planned import DIALECTS, REAL, Network, node_by_node
from _timing import RUNTIMES, outputs_of

from deploykit.arrays import FloatArray
from deploykit.calibration.recipes import RECIPES
from deploykit.graph import Graph
from deploykit.parity.metrics import sqnr_db, top1_agreement
from deploykit.processor import saturates
from deploykit.spec import Int8

NETWORKS = REAL


def measure(name: str, runtimes: list[str], calibrated: int, evaluated: int, settings: Int8) -> None:
    """Print a row a runtime."""
    network = Network.named(name, calibrated, evaluated)
    graph: Graph = network.fused(settings)
    for runtime in runtimes:
        expected = network.expected[-1]
        row = f"{name:<24}{runtime:<13}"
        for tried in (replace(settings, rounding="nearest"), settings):
            started = time.perf_counter()
            plan = network.plan(graph, tried, runtime)
            seconds = time.perf_counter() - started
            rendered = DIALECTS[runtime].render(graph, plan, network.calibrated).graph.model
            found = computed(runtime, rendered, network.evaluated)[-1]
            agreed = f", {top1_agreement(expected, found):.1%}" if network.backbone.spec.num_classes else ""
            row += f"{sqnr_db(expected, found):>8.1f} dB{agreed} ({seconds:.0f} s)"
        print(row, flush=True)


def computed(runtime: str, model: ir.Model, images: FloatArray) -> list[FloatArray]:
    """Every output of a graph in its runtime, or as it is written where the processor saturates."""
    return node_by_node(model, images) if saturates(None) else outputs_of(RUNTIMES[runtime](model), images)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS, help="(default: both)")
    parser.add_argument("--runtimes", nargs="+", default=list(DIALECTS), choices=list(DIALECTS), help="(default: both)")
    parser.add_argument("--images", type=int, default=400, help="calibration crops (default: %(default)s)")
    parser.add_argument("--evaluated", type=int, default=48, help="evaluation crops (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=Int8().distill_steps, help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=Int8().distill_minutes, help="(default: %(default)s)")
    parser.add_argument("--every-runtime", action="store_true", help="tune for what runtimes have in common")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    bounds = Int8(
        distill_steps=options.steps, distill_minutes=options.minutes, distill_for_runtime=not options.every_runtime
    )
    for name in options.networks:
        settings = RECIPES["distilled"].applied_to(bounds)
        measure(name, options.runtimes, options.images, options.evaluated, settings)


if __name__ == "__main__":
    main()
