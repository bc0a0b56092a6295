"""Every recipe of INT8 on every network of the quantization benchmark.

The figures are the SQNR of the last feature map and of the logits against torch FP32, in dB, on crops of other
photographs than those calibrated with, of each runtime's own rendered graph, node by node as it is written. Nothing
here is a time of an engine, so that other work on the machine changes no figure but the seconds that planning takes,
and no processor's products of 8-bit weights do.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _planned import DIALECTS, NETWORKS, Network, node_by_node

from deploykit.calibration.recipes import RECIPES
from deploykit.graph import Graph
from deploykit.parity.metrics import sqnr_db, top1_agreement
from deploykit.spec import Int8


def measure(
    name: str, recipes: list[str], runtimes: list[str], *, calibrated: int, evaluated: int, given: Int8
) -> Iterator[Any]:
    """A row a recipe and runtime."""
    network = Network.named(name, calibrated, evaluated)
    graphs: dict[float | None, Graph] = {}
    for recipe in recipes:
        settings = RECIPES[recipe].applied_to(given)
        if settings.equalization not in graphs:
            graphs[settings.equalization] = network.fused(settings)
        graph = graphs[settings.equalization]
        started = time.perf_counter()
        plan = network.plan(graph, settings)
        seconds = time.perf_counter() - started
        for runtime in runtimes:
            rendered = DIALECTS[runtime].render(graph, plan, network.calibrated).graph.model
            found, reference = node_by_node(rendered, network.evaluated), network.expected
            yield {
                "network": name,
                "runtime": runtime,
                "recipe": recipe,
                "features_db": round(sqnr_db(reference[-2], found[-2]), 2),
                "logits_db": round(sqnr_db(reference[-1], found[-1]), 2),
                "top1": top1_agreement(reference[-1], found[-1]),
                "plan_s": round(seconds, 1),
            }


def report(rows: list[dict[str, Any]]) -> None:
    """A table: features / logits in dB, a row a network and runtime, a column a recipe."""
    recipes = [name for name in RECIPES if any(row["recipe"] == name for row in rows)]
    print(f"{'features / logits, dB':<30}{'runtime':<12}" + "".join(f"{name:>18}" for name in recipes))
    for network, runtime in dict.fromkeys((row["network"], row["runtime"]) for row in rows):
        chosen = {row["recipe"]: row for row in rows if (row["network"], row["runtime"]) == (network, runtime)}
        cells = []
        for name in recipes:
            row = chosen.get(name)
            figures = "-" if row is None else f"{row['features_db']:.1f} / {row['logits_db']:.1f}"
            cells.append(f"{figures:>18}")
        print(f"{network:<30}{runtime:<12}" + "".join(cells))


def main() -> None:
    """Measure what the results file does not hold and print all that it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="backbones (default: the eight)")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES), help="(default: all)")
    parser.add_argument("--runtimes", nargs="+", default=list(DIALECTS), choices=list(DIALECTS), help="(default: both)")
    parser.add_argument("--images", type=int, default=48, help="calibration crops (default: %(default)s)")
    parser.add_argument("--evaluated", type=int, default=48, help="evaluation crops (default: %(default)s)")
    parser.add_argument("--reduce-range", action="store_true", help="as for processors without VNNI")
    parser.add_argument("--results", type=Path, help="a JSON-lines file to add to: what is in it is not measured")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    given = Int8(reduce_range=options.reduce_range)
    shared: dict[str, Any] = {"calibrated": options.images, "evaluated": options.evaluated, "given": given}
    rows: list[dict[str, Any]] = []
    if options.results and options.results.exists():
        rows = [json.loads(line) for line in options.results.read_text().splitlines()]
    for name in options.networks:
        done = {row["recipe"] for row in rows if row["network"] == name}
        missing = [recipe for recipe in options.recipes if recipe not in done]
        for row in measure(name, missing, options.runtimes, **shared) if missing else ():
            print(json.dumps(row), flush=True)
            rows.append(row)
            if options.results:
                with options.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    report([row for row in rows if row["network"] in options.networks and row["recipe"] in options.recipes])


if __name__ == "__main__":
    main()
