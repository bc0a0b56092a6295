"""Every variant in one table: parameters, work, levels, published accuracy, and latency measured here.

Latency is that of one 1-image FP32 call with random weights, at the variant's image size, for logits.
Each variant is exported once through deploykit; its runtimes then take turns in one process, a fresh
one for each variant, and the median is kept. With ``--results FILE`` every figure is appended to a
JSON-lines file as soon as it is there, and what the file holds is not measured again, so the table can
be made in pieces:

    python benchmarks/variants.py --results FILE --variants 'resnet*' 'vit_tiny*'
    python benchmarks/variants.py --results FILE --variants '*' --max-gmacs 50
    python benchmarks/variants.py --results FILE --table-only --write docs/selection.md

Without ``--variants`` only the variants that the aliases stand for are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fnmatch
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deploykit.arrays import FloatArray
from deploykit.backbones.base import BackboneOptions, BaseBackbone
from deploykit.backbones.registry import ALIASES, backbone_names, build
from deploykit.backbones.weights import weights_digest
from deploykit.backends.backend import LowerOptions, resolve
from deploykit.backends.runtime import Runtime
from deploykit.backends.table import load_backend
from deploykit.bundle import Manifest
from deploykit.cli.export_check import shape_of
from deploykit.cli.macs import count_macs
from deploykit.errors import DeployKitError
from deploykit.export.graphs import output_specs, select
from deploykit.export.to_onnx import to_onnx
from deploykit.export.trace import output_names, trace
from deploykit.fusion.pipeline import fuse
from deploykit.graph import Master, OnnxGraph, TorchProgram
from deploykit.optional import installed_version
from deploykit.processor import read_processor
from deploykit.spec import FeatureLevel, Fp32, InputSpec
from deploykit.timing import PAUSE

RUNTIMES = ("torch", "torch_compile", "onnxruntime", "openvino")
ACCURACY_FILE = Path(__file__).parent / "imagenet_top1.csv"
WARM_UP = 3
BEGIN, END = "<!-- variants: begin -->", "<!-- variants: end -->"
HEADER = ("variant", "M params", "GMACs", "px", "levels, stride:channels", "top-1 % (weights)", *RUNTIMES)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a variant is before anything runs: ``gmacs`` of one image at ``image_size`` (height, width)."""

    parameters: int
    gmacs: float
    image_size: tuple[int, int]
    levels: tuple[FeatureLevel, ...]


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where figures come from; figures of two environments don't share a table."""

    processor: str
    cores: int
    torch_threads: int
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """The median of one variant in one runtime, in milliseconds."""

    variant: str
    runtime: str
    milliseconds: float
    rounds: int
    environment: Environment


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """ImageNet-1k top-1 in percent of the weights ``tag`` at ``image_size`` pixels, as published."""

    tag: str
    image_size: int
    top1: float


def here() -> Environment:
    """This machine and the packages that are timed."""
    processor = read_processor()
    versions = {name: installed_version(name) or "absent" for name in ("torch", "onnxruntime", "openvino")}
    return Environment(
        processor=processor.model, cores=processor.cores, torch_threads=torch.get_num_threads(), versions=versions
    )


def shape(name: str) -> Shape:
    """Count on torch's meta device, with all options at their defaults."""
    backbone = shape_of(name, BackboneOptions())
    size = backbone.spec.image_size
    return Shape(
        parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        gmacs=count_macs(backbone, (1, backbone.spec.in_channels, *size)) / 1e9,
        image_size=size,
        levels=tuple(backbone.all_levels),
    )


def published() -> dict[str, Accuracy]:
    """Variant to what `ACCURACY_FILE` says of its default weights."""
    with ACCURACY_FILE.open(encoding="utf-8") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {
            row["variant"]: Accuracy(tag=row["tag"], image_size=int(row["image_size"]), top1=float(row["top1"]))
            for row in rows
        }


@contextlib.contextmanager
def opened(name: str, runtimes: Iterable[str]) -> Iterator[dict[str, BaseBackbone | Runtime]]:
    """One variant with one set of random weights, in each of the runtimes; closed at the end."""
    torch.manual_seed(0)
    backbone = build(name, BackboneOptions())
    spec = replace(backbone.input_spec, batch=1)
    runtimes = tuple(runtimes)
    with tempfile.TemporaryDirectory(prefix="deploykit-variants-") as scratch, contextlib.ExitStack() as open_models:
        models: dict[str, BaseBackbone | Runtime] = {"torch": backbone} if "torch" in runtimes else {}
        engines = [runtime for runtime in runtimes if runtime != "torch"]
        if engines:
            graph = logits_graph(backbone, spec)
            for runtime in engines:
                folder = Path(scratch) / runtime
                folder.mkdir()
                models[runtime] = open_models.enter_context(lowered(backbone, graph, runtime, folder))
            # A large ViT's graph holds its weights twice more, and nothing reads it from here on.
            del graph
        del backbone
        gc.collect()
        yield models


def logits_graph(backbone: BaseBackbone, spec: InputSpec) -> Master:
    """The exported, fused FP32 graph of the logits, shared by all runtimes."""
    fused = fuse(trace(backbone, spec), spec, images_for(spec)).program
    model = to_onnx(fused, spec, output_names(backbone))
    outputs, names = output_specs(model), backbone.spec.output_names
    return Master(
        onnx=select(OnnxGraph(input=spec, outputs=outputs, model=model), names),
        torch=select(TorchProgram(input=spec, outputs=outputs, program=fused), names),
    )


def lowered(backbone: BaseBackbone, master: Master, runtime: str, folder: Path) -> Runtime:
    """A graph as the engine that an export makes of it, opened by deploykit's adapter."""
    backend = load_backend(runtime)
    graph = master.form(backend.source)
    graph = resolve(str(backend.dialect)).render(graph, None, images_for(graph.input)).graph
    engine = resolve(str(backend.lower))(graph, folder, LowerOptions())
    manifest = Manifest(
        backbone=backbone.spec,
        input=graph.input,
        outputs=graph.outputs,
        runtime=runtime,
        runtime_version=engine.runtime_version,
        precision=Fp32.name,
        precision_settings=asdict(Fp32()),
        engine=engine.file,
        requires=engine.requires,
        weights_digest=weights_digest(backbone),
    )
    return backend.load_adapter()(manifest, folder)


def images_for(spec: InputSpec) -> FloatArray:
    """One image of noise, normalised."""
    shape = (1, spec.channels, spec.height, spec.width)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def time_in_turns(models: Mapping[str, Any], images: FloatArray, rounds: int) -> dict[str, float]:
    """The median milliseconds of a call of each model, after `WARM_UP` rounds.

    A turn is a pause and two calls, of which the second is timed: threads of the runtime before wait
    actively for more work for a while, and take a core each.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + WARM_UP):
        for name, model in models.items():
            time.sleep(PAUSE)
            model(images)
            start = time.perf_counter()
            model(images)
            if number >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(name: str, runtimes: Iterable[str], rounds: int) -> list[Figure]:
    """A figure a runtime, from one run in alternating rounds."""
    environment = here()
    with opened(name, runtimes) as models:
        medians = time_in_turns(models, images_for(next(iter(models.values())).input_spec), rounds)
    return [
        Figure(variant=name, runtime=runtime, milliseconds=round(value, 3), rounds=rounds, environment=environment)
        for runtime, value in medians.items()
    ]


def measure_in_a_process(name: str, runtimes: Iterable[str], rounds: int) -> list[Figure]:
    """`measure` where nothing else has run: a runtime that crashes takes no other variant with it.

    Raises:
        DeployKitError: the process failed; its last line of errors, or the signal that ended it.
    """
    command = [sys.executable, __file__, "--measure", name, "--rounds", str(rounds), "--runtimes", *runtimes]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        ended = f"signal {-done.returncode}" if done.returncode < 0 else reason
        raise DeployKitError(f"{ended}. Leave a runtime out with --runtimes to measure the others.")
    return figures_of(line for line in done.stdout.splitlines() if line.startswith("{"))


def lines_of(figures: Iterable[Figure]) -> list[str]:
    """Each figure as one line of JSON."""
    return [json.dumps(asdict(figure)) + "\n" for figure in figures]


def figures_of(lines: Iterable[str]) -> list[Figure]:
    """What `lines_of` made, as figures."""
    entries = [json.loads(line) for line in lines]
    return [Figure(**{**entry, "environment": Environment(**entry["environment"])}) for entry in entries]


def read_results(path: Path | None) -> list[Figure]:
    """The figures of a JSON-lines file; none where there is no file."""
    if path is None or not path.exists():
        return []
    return figures_of(path.read_text(encoding="utf-8").splitlines())


def append_results(path: Path | None, figures: Iterable[Figure]) -> None:
    """Add lines to the file, at once."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(lines_of(figures))


def levels_cell(levels: Sequence[FeatureLevel]) -> str:
    """``4:64 8:128`` for a pyramid, ``12 blocks 16:384`` for a plain ViT."""
    if len({(level.stride, level.channels) for level in levels}) == 1:
        return f"{len(levels)} blocks {levels[0].stride}:{levels[0].channels}"
    return " ".join(f"{level.stride}:{level.channels}" for level in levels)


def table(shapes: Mapping[str, Shape], figures: Iterable[Figure]) -> str:
    """Markdown: a line on the machine, then a row a variant; ``-`` where nothing was measured or published."""
    figures = list(figures)
    times = {(figure.variant, figure.runtime): figure.milliseconds for figure in figures}
    accuracies = published()
    lines = [caption(figures), "", f"| {' | '.join(HEADER)} |", "|---|--:|--:|--:|---|---|" + "--:|" * len(RUNTIMES)]
    for name, found in shapes.items():
        accuracy = accuracies.get(name)
        measured = (times.get((name, runtime)) for runtime in RUNTIMES)
        cells = (
            name,
            f"{found.parameters / 1e6:.1f}",
            f"{found.gmacs:.3g}",
            "x".join(map(str, found.image_size)) if len(set(found.image_size)) > 1 else str(found.image_size[0]),
            levels_cell(found.levels),
            f"{accuracy.top1:.1f} ({accuracy.tag})" if accuracy else "-",
            *("-" if value is None else f"{value:.1f}" for value in measured),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def caption(figures: Sequence[Figure]) -> str:
    """Where the latencies come from."""
    if not figures:
        return "No latency has been measured."
    environment = figures[0].environment
    rounds = sorted({figure.rounds for figure in figures})
    counts = str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    return (
        f"Latency: ms, batch 1, FP32, median of {counts} alternating rounds. "
        f"{environment.processor}, {environment.cores} cores, {environment.torch_threads} torch threads; "
        f"{versions}."
    )


def write_between_markers(path: Path, text: str) -> None:
    """Replace what stands between the two markers of a file.

    Raises:
        SystemExit: a marker is missing.
    """
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{path} lacks {BEGIN} and {END}. Put both lines where the table belongs.")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def chosen(patterns: Sequence[str]) -> tuple[str, ...]:
    """The variants that match any of the patterns, in the registry's order.

    Raises:
        SystemExit: a pattern that matches nothing.
    """
    names = backbone_names()
    idle = [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
    if idle:
        raise SystemExit(f"no variant matches {', '.join(idle)}. `deploykit list` prints them.")
    return tuple(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    defaults = sorted(set(ALIASES.values()))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=defaults, metavar="PATTERN", help="to measure; '*' for all")
    parser.add_argument("--runtimes", nargs="+", default=RUNTIMES, choices=RUNTIMES)
    parser.add_argument(
        "--compile", nargs="*", default=defaults, metavar="PATTERN", help="variants measured in torch_compile too"
    )
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds (default: %(default)s)")
    parser.add_argument("--max-gmacs", type=float, default=float("inf"), help="leave larger variants out")
    parser.add_argument("--results", type=Path, metavar="FILE", help="JSON lines, read and appended to")
    parser.add_argument("--table-only", action="store_true", help="measure nothing, print what the results hold")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers of a page too")
    parser.add_argument("--measure", metavar="VARIANT", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure_missing(options: argparse.Namespace, figures: list[Figure], shapes: Mapping[str, Shape]) -> list[str]:
    """Measure what is asked for and not there yet; extends ``figures`` and returns what failed, with reasons."""
    environment = here()
    if any(figure.environment != environment for figure in figures):
        raise SystemExit(
            f"{options.results} holds figures of {figures[0].environment}, and this is {environment}. "
            "Give another --results file, or --table-only."
        )
    done = {(figure.variant, figure.runtime) for figure in figures}
    compiled, failures = chosen(options.compile) if options.compile else (), []
    for name in chosen(options.variants):
        if shapes[name].gmacs > options.max_gmacs:
            continue
        wanted = [runtime for runtime in options.runtimes if runtime != "torch_compile" or name in compiled]
        missing = [runtime for runtime in wanted if (name, runtime) not in done]
        if not missing:
            continue
        try:
            found = measure_in_a_process(name, missing, options.rounds)
        except DeployKitError as error:
            failures.append(f"{name}: {error}")
            continue
        append_results(options.results, found)
        figures += found
        medians = ", ".join(f"{figure.runtime} {figure.milliseconds:.2f}" for figure in found)
        print(f"{name}: {medians} ms", file=sys.stderr, flush=True)
    return failures


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write it where that is asked for."""
    options = parse(arguments)
    if options.measure is not None:
        sys.stdout.writelines(lines_of(measure(options.measure, options.runtimes, options.rounds)))
        return
    shapes = {name: shape(name) for name in backbone_names()}
    figures = read_results(options.results)
    failures = [] if options.table_only else measure_missing(options, figures, shapes)
    text = table(shapes, figures)
    print(text)
    if options.write is not None:
        write_between_markers(options.write, text)
    if failures:
        raise SystemExit("\n".join(["not measured:", *failures]))


if __name__ == "__main__":
    main()
