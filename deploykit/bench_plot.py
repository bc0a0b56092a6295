"""What a bench measured, as a drawing: latency with its percentiles, and throughput."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deploykit.bench import BenchResult
from deploykit.optional import require

P50, P90, P99 = "#0072b2", "#56b4e9", "#d55e00"
"""Of Okabe and Ito's colours, which people who do not tell red from green tell apart."""


def plot_bench(results: Sequence[BenchResult], path: Path) -> None:
    """Draw every case into a .png or .svg file: p50, p90 and p99 of single calls, and images a second of a stream.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    height = 1.4 + 0.4 * len(results)
    figure = require("matplotlib.figure").Figure(figsize=(9, height), layout="constrained")
    latency, rate = figure.subplots(1, 2, sharey=True)
    rows = range(len(results))
    for name, colour, marker in (("p50_ms", P50, "o"), ("p90_ms", P90, "s"), ("p99_ms", P99, "^")):
        times = [getattr(each, name) for each in results]
        latency.scatter(times, rows, color=colour, marker=marker, label=name.removesuffix("_ms"))
    latency.hlines(rows, [each.p50_ms for each in results], [each.p99_ms for each in results], color="0.7", zorder=0)
    latency.set(xlabel="milliseconds a call", yticks=rows, yticklabels=[_label(each) for each in results])
    latency.set_xlim(left=0)
    latency.invert_yaxis()
    latency.legend(frameon=False)
    rate.barh(rows, [each.images_per_s for each in results], color=P50)
    rate.set(xlabel=f"images a second, {results[0].in_flight} in flight")
    figure.savefig(path)


def _label(each: BenchResult) -> str:
    threads = "all threads" if each.threads is None else f"{each.threads} threads"
    return f"{each.bundle}\n{each.batch} x {each.image}, {threads}"
