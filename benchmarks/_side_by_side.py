"""Two graphs of a network side by side in ONNX Runtime and OpenVINO: what benchmarks of FP32 graphs share.

The engine is the one that deploykit exports for a runtime: FP32, one image, logits. Weights are random,
their norms and layer scales drawn from ranges that training gives. Graphs are exported once, into a
folder that may be kept; results go to a JSON-lines file, so that a table can be made in pieces.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from _from_tests import realistic
from _planned import DIALECTS
from _timing import RUNTIMES, turns
from torch import nn

from deploykit.arrays import FloatArray
from deploykit.backbones.attention import onnx_translations
from deploykit.backbones.base import BackboneOptions, BaseBackbone
from deploykit.backbones.registry import build_backbone
from deploykit.backends.backend import LowerOptions, resolve
from deploykit.backends.table import load_backend
from deploykit.export.graphs import output_specs, select
from deploykit.export.to_onnx import OPSET, to_onnx
from deploykit.export.trace import output_names, trace
from deploykit.fusion.pipeline import fuse
from deploykit.graph import OnnxGraph
from deploykit.parity.metrics import sqnr_db
from deploykit.spec import InputSpec

ENGINES = {"onnxruntime": "model.onnx", "openvino": "model.xml"}
BASELINE, CONTROL, OURS = "baseline", "control", "ours"
MIN_DB = 80.0
"""What an engine keeps of its baseline's logits: both have the same weights."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A benchmark: its networks, and the graph that deploykit's engine stands beside, by the name of its column."""

    description: str
    networks: tuple[str, ...]
    column: str
    baseline: Callable[[str, BaseBackbone], onnx.ModelProto]


def stock_graph(module: nn.Module, side: int, outputs: Sequence[str] | None = None) -> onnx.ModelProto:
    """What torch.onnx.export makes of a module for one image, with its own optimizer; ``outputs`` are their names.

    GroupNorm alone has deploykit's form: on the plain one of the hybrids OpenVINO 2026.4.1 crashes.
    """
    norm = torch.ops.aten.group_norm.default
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(
            module,
            (torch.randn(1, 3, side, side),),
            dynamo=True,
            input_names=["images"],
            output_names=outputs,
            opset_version=OPSET,
            optimize=True,
            verbose=False,
            custom_translation_table={norm: onnx_translations()[norm]},
        )
    assert program is not None
    return program.model_proto


def export(comparison: Comparison, name: str, folder: Path) -> None:
    """Write what is absent in ``folder`` of the graphs of a network; all comparisons have the same engines."""
    baseline = folder / f"{comparison.column}.onnx"
    missing = [runtime for runtime in RUNTIMES if not (folder / runtime).exists()]
    if baseline.exists() and not missing:
        return
    torch.manual_seed(0)
    backbone = realistic(build_backbone(name, BackboneOptions())).eval()
    folder.mkdir(parents=True, exist_ok=True)
    if not baseline.exists():
        _publish(lambda path: onnx.save(comparison.baseline(name, backbone), path), baseline)
    graph = _fused(backbone) if missing else None
    for runtime in missing:
        _publish(partial(_lower, graph, runtime), folder / runtime)


def _fused(backbone: BaseBackbone) -> OnnxGraph:
    """The master graph of a backbone's logits, for one image."""
    spec = replace(backbone.input_spec, batch=1)
    program = fuse(trace(backbone, spec), spec, _images(spec)).program
    model = to_onnx(program, spec, output_names(backbone))
    return select(OnnxGraph(input=spec, outputs=output_specs(model), model=model), ("logits",))


def _lower(graph: OnnxGraph, runtime: str, folder: Path) -> None:
    """The engine that deploykit exports to a runtime."""
    folder.mkdir()
    rendered = DIALECTS[runtime].render(graph, None, _images(graph.input)).graph
    resolve(str(load_backend(runtime).lower))(rendered, folder, LowerOptions())


def _images(spec: InputSpec) -> FloatArray:
    return np.random.default_rng(0).normal(size=spec.shape).astype(np.float32)


def _publish(write: Callable[[Path], object], path: Path) -> None:
    """Let a file or folder appear only when it is whole, so that an export that was stopped goes on."""
    staging = path.with_name(f"{path.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    write(staging)
    staging.rename(path)


def measure(comparison: Comparison, name: str, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """A row a runtime: medians, and the medians of what each round's times are to the baseline's."""
    baseline, rows = folder / f"{comparison.column}.onnx", []
    shape = [side.dim_value for side in onnx.load(baseline).graph.input[0].type.tensor_type.shape.dim]
    images = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    for runtime, open_graph in RUNTIMES.items():
        files = {BASELINE: baseline, OURS: folder / runtime / ENGINES[runtime], CONTROL: baseline}
        calls = {column: open_graph(path) for column, path in files.items()}
        kept = sqnr_db(calls[BASELINE](images)[-1], calls[OURS](images)[-1])
        if kept < MIN_DB:
            raise SystemExit(f"{name} in {runtime}: the two graphs agree to {kept:.1f} dB, below {MIN_DB:.0f}.")
        times = turns(calls, images, rounds)
        row: dict[str, Any] = {"network": name, "runtime": runtime, "rounds": rounds, "db": kept}
        for column, values in times.items():
            row[f"{column} ms"] = statistics.median(values)
            pairs = zip(values, times[BASELINE], strict=True)
            row[f"{column} ratio"] = statistics.median(one / other for one, other in pairs)
        rows.append(row)
    return rows


def report(comparison: Comparison, rows: list[dict[str, Any]]) -> None:
    """A line a network and runtime, then the geometric means."""
    heads = (f"{comparison.column} ms", "ours ms", "ours ratio", "control")
    print(f"{'network':<30} {'runtime':<12}" + "".join(f"{head:>14}" for head in heads))
    for row in rows:
        figures = (
            f"{row['baseline ms']:14.2f}{row['ours ms']:14.2f}{row['ours ratio']:14.3f}{row['control ratio']:14.3f}"
        )
        print(f"{row['network']:<30} {row['runtime']:<12}{figures}")
    for runtime in RUNTIMES:
        chosen = [row for row in rows if row["runtime"] == runtime]
        if chosen:
            means = (statistics.geometric_mean(row[f"{column} ratio"] for row in chosen) for column in (OURS, CONTROL))
            print(f"{'geometric mean':<30} {runtime:<12}{'':28}" + "".join(f"{mean:14.3f}" for mean in means))


def main(comparison: Comparison) -> None:
    """Measure the networks that are asked for and print all of them that the results file holds."""
    parser = argparse.ArgumentParser(
        description=comparison.description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=comparison.networks, help="backbones (default: the table's)")
    parser.add_argument("--rounds", type=int, default=50, help="timed rounds (default: %(default)s)")
    parser.add_argument("--results", type=Path, help="a JSON-lines file to add to: networks in it are not measured")
    parser.add_argument("--graphs", type=Path, help="a folder to keep exported graphs in (default: a temporary one)")
    parser.add_argument("--export-only", action="store_true", help="export into --graphs and time nothing")
    options = parser.parse_args()
    if options.export_only and not options.graphs:
        parser.error("--export-only needs --graphs FOLDER")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows: list[dict[str, Any]] = []
    if options.results and options.results.exists():
        rows = [json.loads(line) for line in options.results.read_text().splitlines()]
    measured = {row["network"] for row in rows}
    with tempfile.TemporaryDirectory() as scratch:
        for name in [name for name in options.networks if name not in measured]:
            print(f"{'exporting' if options.export_only else 'measuring'} {name}", flush=True)
            folder = (options.graphs or Path(scratch)) / name
            export(comparison, name, folder)
            if options.export_only:
                continue
            found = measure(comparison, name, folder, options.rounds)
            rows += found
            if options.results:
                with options.results.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in found)
    report(comparison, [row for row in rows if row["network"] in options.networks])
