"""INT8 into ONNX Runtime and OpenVINO: ours beside FP32 and beside the stock quantizers, network by network.

Every route has the same weights and calibration crops; the figures come from crops of other photographs. Stock
are ONNX Runtime's quantize_static and quantize_dynamic (per channel), and NNCF on the ONNX graph and on OpenVINO's
form of it when that package is installed; they get what ``torch.onnx.export(backbone, optimize=True)`` writes, as
their users do. FP32 and ours are the graphs that an export lowers, passes of the runtime included.

Times are medians over rounds in which all routes of a runtime take turns, of the classifier alone as its users
get it; ``--outputs all`` times the graph that also gives every level, from which the decibels are. Every
route is opened with the settings of deploykit's adapters, which are the runtimes' defaults but for three: in
ONNX Runtime the threads stop spinning when a call ends, and the optimizer that rounds float weights is off; in
OpenVINO the hint is latency. With its defaults ONNX Runtime's threads would spin through the next route's turn.

EfficientNet-Lite0 and MobileNetV2, whose pooled features stand for logits, have their ImageNet weights; the others have
random weights whose norms and layer scales are drawn from ranges that training gives, so their top-1 agreement says
little. A network takes 2 to 5 minutes, the
stock quantizers most of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from _planned import DIALECTS, HEADLESS, NETWORKS, Network
from _side_by_side import stock_graph
from _stock import STOCK, by_nncf
from _timing import RUNTIMES, Call, alternate, outputs_of
from torch import nn

from deploykit.arrays import FloatArray
from deploykit.export.graphs import output_specs, select
from deploykit.export.trace import output_names
from deploykit.graph import OnnxGraph
from deploykit.parity.metrics import sqnr_db, top1_agreement
from deploykit.processor import saturates
from deploykit.spec import InputSpec, Int8

OURS = "deploykit"
ON_OPENVINO = "NNCF on OpenVINO"


@dataclass(frozen=True, kw_only=True)
class Route:
    """A network in one form: with every level and the logits, and the part of it that is timed."""

    whole: onnx.ModelProto | ir.Model | Path
    timed: onnx.ModelProto | ir.Model | Path


def nncf_on_openvino(model: onnx.ModelProto, images: FloatArray, folder: Path, *, logits: bool) -> Route:
    """The same of the graph as OpenVINO reads it, as OpenVINO's own files."""
    import openvino

    quantized = by_nncf(openvino.Core().read_model(model.SerializeToString()), model, images)
    route = Route(whole=folder / "whole.xml", timed=folder / ("logits.xml" if logits else "whole.xml"))
    openvino.save_model(quantized, route.whole, compress_to_fp16=False)
    if logits:
        for result in quantized.get_results()[:-1]:
            quantized.remove_result(result)
        openvino.save_model(quantized, route.timed, compress_to_fp16=False)
    return route


def measure(name: str, count: int, rounds: int, settings: Int8, outputs: str) -> list[dict[str, Any]]:
    """Every route of a network in every runtime, a row each; ``outputs``, logits or all, are what is timed."""
    network = Network.named(name, count, count)
    backbone, images = network.backbone, network.calibrated
    fp32_graph, ours_graph = (network.fused(chosen) for chosen in (None, settings))
    plan = network.plan(ours_graph, settings)
    logits, rows = outputs == "logits", []
    with tempfile.TemporaryDirectory() as scratch:
        plain = stock_graph(Everything(backbone), network.spec.height, output_names(backbone))
        stock = _stock_routes(plain, images, Path(scratch), logits=logits)
        for runtime, open_graph in RUNTIMES.items():
            fp32 = DIALECTS[runtime].render(fp32_graph, None, images).graph
            ours = DIALECTS[runtime].render(ours_graph, plan, images).graph
            routes = {"FP32": _route(fp32, logits=logits), **stock[runtime], OURS: _route(ours, logits=logits)}
            rows += _measured(open_graph, routes, images[:1], network.evaluated, rounds, network=name, runtime=runtime)
    return [{**row, "outputs": outputs} for row in rows]


def _route(graph: OnnxGraph, *, logits: bool) -> Route:
    return Route(whole=graph.model, timed=select(graph, (graph.outputs[-1].name,)).model if logits else graph.model)


def _measured(
    open_graph: Callable[[Any], Call],
    routes: dict[str, Route],
    image: FloatArray,
    evaluated: FloatArray,
    rounds: int,
    **labels: str,
) -> list[dict[str, Any]]:
    """A row for each route that the runtime takes and runs; they take turns."""
    calls = {}
    for route, forms in routes.items():
        try:
            calls[route] = (open_graph(forms.whole), open_graph(forms.timed))
            for call in calls[route]:
                call(image)
        except Exception as error:  # a stock graph that does not run is a finding
            if route in ("FP32", OURS):
                raise
            calls.pop(route, None)
            print(f"{route} does not run: {type(error).__name__}: {str(error).strip()[:120]}")
    found = {route: outputs_of(whole, evaluated) for route, (whole, _) in calls.items()}
    times = alternate({route: timed for route, (_, timed) in calls.items()}, image, rounds)
    reference = found["FP32"]
    return [
        {
            **labels,
            "route": route,
            "ms": times[route],
            "features_db": None if route == "FP32" else sqnr_db(reference[-2], values[-2]),
            "logits_db": None if route == "FP32" else sqnr_db(reference[-1], values[-1]),
            "top1": top1_agreement(reference[-1], values[-1]) if labels["network"] not in HEADLESS else None,
        }
        for route, values in found.items()
    ]


class Everything(nn.Module):
    """Every level and the logits of a backbone."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``(N, C, H, W)`` to the maps and the logits, in the order of ``output_names``."""
        return tuple(self.backbone.forward_everything(images).values())


def _stock_routes(
    model: onnx.ModelProto, images: FloatArray, folder: Path, *, logits: bool
) -> dict[str, dict[str, Route]]:
    """The routes of each runtime; both read what the quantizers of ONNX graphs give."""
    whole = ir.from_proto(model)
    plain = OnnxGraph(input=InputSpec(), outputs=output_specs(whole), model=whole)
    shared: dict[str, Route] = {}
    own: dict[str, Route] = {}
    for route, quantize in STOCK.items():
        with _reported(route):
            shared[route] = _route(replace(plain, model=ir.from_proto(quantize(model, images))), logits=logits)
    with _reported(ON_OPENVINO):
        own[ON_OPENVINO] = nncf_on_openvino(model, images, folder, logits=logits)
    return {"onnxruntime": shared, "openvino": {**shared, **own}}


@contextlib.contextmanager
def _reported(route: str) -> Iterator[None]:
    """Go on where a stock quantizer fails, which is a finding, or is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed, so the row {route!r} is absent: pip install {error.name}")
    except Exception as error:
        print(f"{route} fails: {type(error).__name__}: {str(error)[:120]}")


def report(rows: list[dict[str, Any]]) -> None:
    """One table a network and runtime, then what they come to."""
    for name, runtime in dict.fromkeys((row["network"], row["runtime"]) for row in rows):
        chosen = _routes(rows, name, runtime)
        fp32 = chosen["FP32"]["ms"]
        print(f"\n{name} in {runtime}")
        print(f"{'route':<18} {'ms':>8} {'FP32/route':>11} {'features dB':>12} {'logits dB':>10} {'top-1':>7}")
        for route, row in chosen.items():
            noise = f"{_decibels(row['features_db']):>12} {_decibels(row['logits_db']):>10}"
            print(f"{route:<18} {row['ms']:8.2f} {fp32 / row['ms']:11.2f} {noise} {_share(row['top1']):>7}")


def summarize(rows: list[dict[str, Any]]) -> None:
    """A row a network and runtime: our speed beside FP32 and the fastest stock route, our noise beside the best."""
    ratios: dict[str, list[tuple[float, float]]] = {runtime: [] for runtime in RUNTIMES}
    print("\nstock: the fastest stock route; its dB: the best logits of those at least 5% faster than FP32")
    heads = ("FP32 ms", "ours ms", "FP32/ours", "ours/stock", "stock dB", "ours dB")
    print(f"{'network':<29}{'runtime':<12}" + "".join(f"{head:>11}" for head in heads))
    for name, runtime in dict.fromkeys((row["network"], row["runtime"]) for row in rows):
        chosen = _routes(rows, name, runtime)
        fp32, ours = chosen["FP32"]["ms"], chosen[OURS]["ms"]
        stock = [row for route, row in chosen.items() if route not in ("FP32", OURS)]
        fastest = min(row["ms"] for row in stock)
        quietest = max((row["logits_db"] for row in stock if row["ms"] < 0.95 * fp32), default=None)
        ratios[runtime].append((fp32 / ours, ours / fastest))
        figures = f"{fp32:11.2f}{ours:11.2f}{fp32 / ours:11.2f}{ours / fastest:11.2f}"
        print(f"{name:<29}{runtime:<12}{figures}{_decibels(quietest):>11}{_decibels(chosen[OURS]['logits_db']):>11}")
    for runtime, pairs in ratios.items():
        if pairs:
            speed, against = (statistics.geometric_mean(column) for column in zip(*pairs, strict=True))
            print(f"{'geometric mean':<29}{runtime:<12}{'':22}{speed:11.2f}{against:11.2f}")


def _routes(rows: list[dict[str, Any]], name: str, runtime: str) -> dict[str, dict[str, Any]]:
    return {row["route"]: row for row in rows if (row["network"], row["runtime"]) == (name, runtime)}


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def main() -> None:
    """Measure the networks that are asked for and print all that the results file holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="backbones (default: the eight of the table)")
    parser.add_argument("--rounds", type=int, default=50, help="timed rounds (default: %(default)s)")
    parser.add_argument("--images", type=int, default=48, help="calibration and evaluation crops (default: 48)")
    parser.add_argument("--outputs", choices=("logits", "all"), default="logits", help="of the timed graph")
    parser.add_argument("--results", type=Path, help="a JSON-lines file to add to: networks in it are not measured")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows: list[dict[str, Any]] = []
    if options.results and options.results.exists():
        rows = [json.loads(line) for line in options.results.read_text().splitlines()]
        rows = [row for row in rows if row["outputs"] == options.outputs]
    measured = {row["network"] for row in rows}
    for name in options.networks:
        if name in measured:
            continue
        print(f"measuring {name}", flush=True)
        found = measure(name, options.images, options.rounds, Int8(reduce_range=saturates(None)), options.outputs)
        rows += found
        if options.results:
            with options.results.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
    chosen = [row for row in rows if row["network"] in options.networks]
    report(chosen)
    summarize(chosen)


if __name__ == "__main__":
    main()
