"""Every family built by the real TensorRT-RTX, with no GPU: seconds and plan size, by precision, GPU and batch.

Nothing is run: a plan's numbers and speed need the GPU that it is for. A warning of the parser about a
type, or a quantize layer more or less than in the graph, ends the build with an error. Results are kept
in a CSV file a row at a time; a second run makes only what is missing.

    python benchmarks/tensorrt_builds.py --families vit,resnet --results builds.csv
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

import deploykit
from deploykit.backbones.base import BaseBackbone
from deploykit.backbones.registry import FAMILIES
from deploykit.backbones.weights import weights_digest
from deploykit.calibration.dialects.tensorrt import render
from deploykit.calibration.images import calibration_set
from deploykit.calibration.precision import PrecisionPlan, plan_precision
from deploykit.cli.demo import CALIBRATED, photograph_folder
from deploykit.errors import ExportError
from deploykit.export.graphs import output_specs, select
from deploykit.export.measure import parity_images
from deploykit.export.to_onnx import to_onnx
from deploykit.export.to_tensorrt import to_tensorrt
from deploykit.export.trace import output_names, trace
from deploykit.fusion.pipeline import fuse
from deploykit.graph import Graph
from deploykit.runtimes.tensorrt_api import flavour_version
from deploykit.spec import BatchRange, Fp16, Fp32, Int8, Precision

VARIANTS: dict[str, str] = {
    "resnet": "resnet50",
    "resnetv2": "resnetv2_50",
    "efficientnet": "efficientnet_b0",
    "regnet": "regnety_008",
    "mobilenet": "mobilenetv3_large_100",
    "vit": "vit_small_patch16_224",
    "hybrid": "vit_small_r26_s32_224",
    "mobilevit": "mobilevit_s",
    "coatnet": "coatnet_0_rw_224",
    "convnext": "convnext_tiny",
    "swin": "swin_tiny_patch4_window7_224",
}
"""The variant of each family that is built."""

PRECISIONS: dict[str, Precision] = {
    "fp32": Fp32(),
    "fp16": Fp16(),
    "int8": Int8(),
    "int8+fp16": Int8(float_dtype="fp16"),
}
CAPABILITIES = ("sm86", "sm89", "sm120")
BATCHES = {"static": 1, "dynamic": BatchRange(min=1, opt=4, max=8)}
FIELDS = ("family", "variant", "precision", "batch", "outputs", "capability", "seconds", "megabytes", "problem")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One graph, which is built for every compute capability that is missing."""

    family: str
    precision: str
    batch: str
    outputs: str

    def key(self, capability: str) -> tuple[str, ...]:
        """What names a row of the table."""
        return (self.family, VARIANTS[self.family], self.precision, self.batch, self.outputs, capability)


def main() -> None:
    """Build what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(VARIANTS), help="with commas between")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="with commas between")
    parser.add_argument("--capabilities", default=",".join(CAPABILITIES), help="with commas between")
    parser.add_argument("--outputs", default="logits", help="logits, features, or both with a comma between")
    parser.add_argument("--results", type=Path, default=Path("tensorrt_builds.csv"), help="the CSV file to continue")
    options = parser.parse_args()
    families, precisions, capabilities, outputs = (
        getattr(options, name).split(",") for name in ("families", "precisions", "capabilities", "outputs")
    )
    unknown = [name for name in families if name not in VARIANTS]
    if unknown or sorted(VARIANTS) != sorted(FAMILIES):
        sys.exit(f"unknown families {unknown}; expected some of {', '.join(FAMILIES)}, each with a variant here")
    rows = read_rows(options.results)
    for family in families:
        jobs = [
            Job(family=family, precision=p, batch=b, outputs=o) for p, b, o in product(precisions, BATCHES, outputs)
        ]
        for row in build_missing(family, jobs, capabilities, rows):
            rows[tuple(row[name] for name in FIELDS[:6])] = row
            append_row(options.results, row)
    print(table(rows))


def build_missing(
    family: str, jobs: list[Job], capabilities: list[str], rows: dict[tuple[str, ...], dict[str, str]]
) -> Iterator[dict[str, str]]:
    """Each row that is not among ``rows`` yet."""
    missing = {job: [name for name in capabilities if job.key(name) not in rows] for job in jobs}
    backbone = None
    for batch in BATCHES:
        wanted = [job for job in jobs if job.batch == batch and missing[job]]
        if not wanted:
            continue
        if backbone is None:
            torch.manual_seed(0)
            backbone = deploykit.create_backbone(VARIANTS[family])
        master = master_graph(backbone, batch)
        for job in wanted:
            whole = render(master, plan_of(backbone, master, PRECISIONS[job.precision]))
            names = [level.name for level in backbone.spec.levels] if job.outputs == "features" else ["logits"]
            graph = select(whole, names)
            for capability in missing[job]:
                yield dict(zip(FIELDS, (*job.key(capability), *built(graph, capability)), strict=True))


def built(graph: Graph, capability: str) -> tuple[str, str, str]:
    """Seconds, megabytes and the problem of one build, as text."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        try:
            engine = to_tensorrt(graph, Path(folder), target=capability)
        except ExportError as error:
            return f"{time.perf_counter() - start:.1f}", "", str(error).splitlines()[0]
        seconds = time.perf_counter() - start
        return f"{seconds:.1f}", f"{(Path(folder) / engine.file).stat().st_size / 1e6:.1f}", ""


def master_graph(backbone: BaseBackbone, batch: str) -> Graph:
    """The fused FP32 graph with every level and the logits."""
    spec = replace(backbone.input_spec, batch=BATCHES[batch])
    probe = parity_images(None, spec)
    fused = fuse(trace(backbone, spec), spec, probe)
    model = to_onnx(fused.program, spec, output_names(backbone))
    return Graph(input=spec, outputs=output_specs(model), model=model, program=fused.program)


def plan_of(backbone: BaseBackbone, master: Graph, precision: Precision) -> PrecisionPlan:
    """The plan of a precision; INT8 is calibrated on the demo's few photographs, which is enough to build."""
    photographs = [photograph_folder() / name for name in CALIBRATED]
    images = calibration_set(photographs, backbone.input_spec) if isinstance(precision, Int8) else None
    probe = parity_images(images, backbone.input_spec)
    return plan_precision(
        master.model, precision, calibration=images, probe=probe, weights_digest=weights_digest(backbone)
    )


def read_rows(file: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of an earlier run; a row of another variant than today's is left aside."""
    if not file.is_file():
        return {}
    with file.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if None not in row.values()]
    return {tuple(row[name] for name in FIELDS[:6]): row for row in rows}


def append_row(file: Path, row: dict[str, str]) -> None:
    """Write one row at once, so that a stopped run loses nothing that is built."""
    new = not file.is_file()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def table(rows: dict[tuple[str, ...], dict[str, str]]) -> str:
    """A line a graph: seconds for each GPU, and the largest plan."""
    lines = [
        f"TensorRT-RTX {flavour_version('tensorrt_rtx')}, built without a GPU and not run",
        f"{'variant':30} {'precision':10} {'batch':8} {'outputs':9}"
        + "".join(f"{c + ' s':>9}" for c in CAPABILITIES)
        + "      MB",
    ]
    graphs = dict.fromkeys(key[1:5] for key in rows)
    for graph in graphs:
        of_graph = {key[5]: row for key, row in rows.items() if key[1:5] == graph}
        cells = [_cell(of_graph.get(capability)) for capability in CAPABILITIES]
        sizes = [float(row["megabytes"]) for row in of_graph.values() if row["megabytes"]]
        variant, precision, batch, outputs = graph
        size = f"{max(sizes):8.1f}" if sizes else f"{'':8}"
        lines.append(f"{variant:30} {precision:10} {batch:8} {outputs:9}" + "".join(f"{c:>9}" for c in cells) + size)
    failed = [f"  {' '.join(key[1:])}: {row['problem']}" for key, row in rows.items() if row["problem"]]
    return "\n".join([*lines, f"{len(rows)} builds, {len(failed)} failed", *failed])


def _cell(row: dict[str, str] | None) -> str:
    if row is None:
        return "-"
    return "failed" if row["problem"] else row["seconds"]


if __name__ == "__main__":
    main()
