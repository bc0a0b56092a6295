"""A small variant of every family, built by the real TensorRT-RTX with no GPU: seconds, plan size, and a proxy.

No plan is run: its numbers and its speed need the GPU that it is for. A warning of the parser about a type,
or a quantize layer more or less than in the graph, ends a build with an error. The proxy is the very graph
that TensorRT is given, run as it is written in ONNX Runtime and in OpenVINO: the SQNR in dB against
torch of the worst of all levels and the logits. Weights are random, and realistic. sm75 (Turing), which has
no FP32 matrix product, is tried for the logits with a fixed batch alone.

Results are kept in a CSV file a row at a time, and a second run makes only what is missing. One family
takes about 2 minutes on one core.

    python benchmarks/tensorrt_builds.py --families vit,resnet --results builds.csv
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import _from_tests  # noqa: F401  (finds the tests)

from deploykit.arrays import FloatArray
from deploykit.backbones.registry import FAMILIES
from deploykit.backends.backend import LowerOptions
from deploykit.backends.tensorrt.api import flavour_version
from deploykit.backends.tensorrt.legalize import prepare
from deploykit.backends.tensorrt.lower import lower
from deploykit.cli.demo import CALIBRATED, photograph_folder
from deploykit.errors import ExportError
from deploykit.graph import OnnxGraph
from deploykit.parity.metrics import sqnr_db
from tests.backends.tensorrt import families

CAPABILITIES = ("sm86", "sm89", "sm120")
TURING = "sm75"
BATCHES = ("static", "dynamic")
OUTPUTS = ("logits", "features")
KEY = ("family", "precision", "batch", "outputs", "capability")
FIELDS = (*KEY, "seconds", "megabytes", "onnxruntime_db", "openvino_db", "problem")

Rows = dict[tuple[str, ...], dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One graph, and the compute capabilities that it is built for."""

    family: str
    precision: str
    batch: str
    outputs: str

    def capabilities(self, *, rotate: bool) -> tuple[str, ...]:
        """All but Turing, or one of them by turns; and Turing for one graph a precision."""
        turn = (
            2 * BATCHES.index(self.batch)
            + OUTPUTS.index(self.outputs)
            + list(families.PRECISIONS).index(self.precision)
        )
        chosen = (CAPABILITIES[turn % len(CAPABILITIES)],) if rotate else CAPABILITIES
        return (*chosen, TURING) if (self.batch, self.outputs) == (BATCHES[0], OUTPUTS[0]) else chosen

    def key(self, capability: str) -> tuple[str, ...]:
        """What names a row of the results."""
        return (self.family, self.precision, self.batch, self.outputs, capability)


def main() -> None:
    """Build what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(families.SMALL), help="with commas between")
    parser.add_argument("--precisions", default=",".join(families.PRECISIONS), help="with commas between")
    parser.add_argument("--rotate", action="store_true", help="build each graph for one GPU in turn, not for all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many; run again to go on")
    parser.add_argument("--results", type=Path, default=Path("tensorrt_builds.csv"), help="the CSV file to continue")
    options = parser.parse_args()
    wanted, precisions = options.families.split(","), options.precisions.split(",")
    unknown = [name for name in wanted if name not in families.SMALL]
    if unknown or sorted(families.SMALL) != sorted(FAMILIES):
        sys.exit(f"unknown families {unknown}; expected some of {', '.join(FAMILIES)}, each with a small variant")
    deadline = time.monotonic() + 60 * options.minutes
    rows = read_rows(options.results)
    for family in wanted:
        jobs = [
            Job(family=family, precision=p, batch=b, outputs=o) for b, p, o in product(BATCHES, precisions, OUTPUTS)
        ]
        for row in build_missing(jobs, rows, rotate=options.rotate):
            rows[tuple(row[name] for name in KEY)] = row
            append_row(options.results, row)
            if time.monotonic() > deadline:
                sys.exit(f"stopped after {options.minutes:g} minutes with {len(rows)} builds; run again to go on")
    print(table(rows))


def build_missing(jobs: list[Job], rows: Rows, *, rotate: bool) -> Iterator[dict[str, str]]:
    """Each row that is not among ``rows`` yet; a graph is traced, calibrated and run once for all its builds."""
    photographs = [photograph_folder() / name for name in CALIBRATED]
    proxies: dict[tuple[str, str], tuple[str, str]] = {}
    loaded: dict[str, families.Family] = {}
    for job in jobs:
        missing = [name for name in job.capabilities(rotate=rotate) if job.key(name) not in rows]
        if not missing:
            continue
        if job.batch not in loaded:
            loaded[job.batch] = families.Family(job.family, photographs, dynamic=job.batch == "dynamic")
        case = loaded[job.batch]
        graph = case.graph(job.precision, features=job.outputs == "features")
        if (job.batch, job.precision) not in proxies:
            proxies[job.batch, job.precision] = proxy(case, job.precision)
        for name in missing:
            seconds, megabytes, problem = built(graph, name)
            values = (*job.key(name), seconds, megabytes, *proxies[job.batch, job.precision], problem)
            yield dict(zip(FIELDS, values, strict=True))


def built(graph: OnnxGraph, capability: str) -> tuple[str, str, str]:
    """Seconds, megabytes and the problem of one build, as text."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        try:
            engine = lower(graph, Path(folder), LowerOptions(target=capability))
        except ExportError as error:
            return f"{time.perf_counter() - start:.1f}", "", str(error).splitlines()[0]
        seconds = time.perf_counter() - start
        return f"{seconds:.1f}", f"{(Path(folder) / engine.file).stat().st_size / 1e6:.1f}", ""


def proxy(case: families.Family, precision: str) -> tuple[str, str]:
    """The worst output's SQNR in dB, in ONNX Runtime and in OpenVINO, as text."""
    model = prepare(case.whole(precision).model)
    expected = [case.expected[value.name] for value in model.graph.output]

    def worst(run: Callable[[], list[FloatArray]]) -> str:
        return f"{min(sqnr_db(*pair) for pair in zip(expected, run(), strict=True)):.1f}"

    as_written = (case.name, precision) not in families.OWN_KERNELS
    return (
        worst(lambda: families.in_onnxruntime(model, case.images)),
        worst(lambda: families.in_openvino(model, case.images, as_written=as_written)),
    )


def read_rows(file: Path) -> Rows:
    """The rows of an earlier run; a line that was cut off by its end is left aside."""
    if not file.is_file():
        return {}
    with file.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if None not in row.values()]
    return {tuple(row[name] for name in KEY): row for row in rows}


def append_row(file: Path, row: dict[str, str]) -> None:
    """Write one row at once, so that a stopped run loses nothing that is built."""
    new = not file.is_file()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def table(rows: Rows) -> str:
    """A line a family and precision, over fixed and dynamic batch, logits and features; then every failure."""
    lines = [
        f"TensorRT-RTX {flavour_version('tensorrt_rtx')}, built without a GPU and not run; median seconds, largest MB",
        f"{'variant':30} {'px':>4} {'precision':10}"
        + "".join(f"{name + ' s':>9}" for name in (*CAPABILITIES, TURING))
        + f"{'MB':>8}{'builds':>8}   proxy dB, onnxruntime / openvino",
    ]
    for family, precision in dict.fromkeys(key[:2] for key in rows):
        of_it = [row for key, row in rows.items() if key[:2] == (family, precision)]
        cells = [_cell([row for row in of_it if row["capability"] == name]) for name in (*CAPABILITIES, TURING)]
        size = max((float(row["megabytes"]) for row in of_it if row["megabytes"]), default=0.0)
        good = sum(not row["problem"] for row in of_it)
        pair = " / ".join(f"{min(float(row[name]) for row in of_it):.1f}" for name in FIELDS[7:9])
        variant, side = families.SMALL[family]
        start = f"{variant:30} {side:4} {precision:10}" + "".join(f"{cell:>9}" for cell in cells)
        lines.append(f"{start}{size:8.1f}{good:8}   {pair}")
    problems = {(key[-1], row["problem"]): 0 for key, row in rows.items() if row["problem"]}
    for key, row in rows.items():
        if row["problem"]:
            problems[key[-1], row["problem"]] += 1
    lines.append(f"{len(rows)} builds tried, {sum(problems.values())} refused")
    return "\n".join([*lines, *(f"{count} x {name}: {problem}" for (name, problem), count in problems.items())])


def _cell(rows: list[dict[str, str]]) -> str:
    seconds = [float(row["seconds"]) for row in rows if not row["problem"]]
    if len(seconds) < len(rows):
        return "refused"
    return f"{statistics.median(seconds):.1f}" if seconds else "-"


if __name__ == "__main__":
    main()
