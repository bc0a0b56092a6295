"""deploykit's torch_compile engines beside torch.compile itself, in its modes, on one machine.

FP32, batch 1, random weights, logits. A backbone's engine and the same module under torch.compile take turns
in one process, a fresh one for each backbone, and the figures are medians over the rounds. The rivals are
torch.compile as it comes, with frozen weights, and with frozen weights and max-autotune (which has nothing to
tune on a CPU without them). A start is what a process needs from the bundle, or from the module, to its first
result. With ``--int8`` the INT8 engine is timed too, calibrated on noise: its speed is that of any images.

With ``--results FILE`` a line is appended for each backbone, and what the file holds is not measured again.
Engines are kept in ``--bundles FOLDER``, so that compiling and timing can be done apart:

    python benchmarks/torch_compile.py --bundles FOLDER --build-only
    python benchmarks/torch_compile.py --bundles FOLDER --results FILE
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _timing import Call, alternate

from deploykit.arrays import FloatArray
from deploykit.backbones.base import BackboneOptions, BaseBackbone
from deploykit.backbones.registry import build_backbone
from deploykit.bundle import is_bundle, read_manifest
from deploykit.calibration.images import calibration_set
from deploykit.export.job import ExportJob
from deploykit.export.pipeline import export
from deploykit.loading import load_bundle
from deploykit.options import ExportOptions
from deploykit.spec import Fp32, Int8

MODELS = (
    "resnet50",
    "efficientnet_b0",
    "mobilenetv3_large_100",
    "regnety_008",
    "vit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "vit_small_r26_s32_224",
)
RIVALS: dict[str, dict[str, Any]] = {
    "default": {},
    "freezing": {"freezing": True},
    "max-autotune": {
        "freezing": True,
        "max_autotune": True,
        "autotune_num_choices_displayed": 0,
        "max_autotune_report_choices_stats": False,
    },
}
CALIBRATION_IMAGES = 8


@dataclass(frozen=True, kw_only=True)
class Row:
    """One backbone: milliseconds a call, seconds from nothing to a first result, and the mode of our engine."""

    model: str
    rounds: int
    mode: str
    milliseconds: dict[str, float]
    start_seconds: dict[str, float]

    @property
    def ratio(self) -> float:
        """Our FP32 engine's time over the fastest rival's."""
        return self.milliseconds["ours"] / min(self.milliseconds[rival] for rival in RIVALS)

    @property
    def faster_start(self) -> float:
        """The shortest of the rivals' starts over ours."""
        return min(self.start_seconds[rival] for rival in RIVALS) / self.start_seconds["ours"]


def backbone_of(name: str) -> BaseBackbone:
    """The same random weights each time."""
    torch.manual_seed(0)
    return build_backbone(name, BackboneOptions()).eval()


def noise(backbone: BaseBackbone, count: int) -> FloatArray:
    """Normalised images, ``(count, C, H, W)``."""
    return np.random.default_rng(0).normal(size=(count, *backbone.input_spec.shape[1:])).astype(np.float32)


def built(name: str, folder: Path, *, int8: bool) -> Path:
    """The bundle of a backbone, made where it is not there yet."""
    bundle = folder / f"{name}-{'int8' if int8 else 'fp32'}"
    if not is_bundle(bundle):
        backbone = backbone_of(name)
        # Random weights have no accuracy to keep: no budget.
        precision = Int8(min_sqnr_db=-100) if int8 else Fp32()
        images = calibration_set(noise(backbone, CALIBRATION_IMAGES), backbone.input_spec) if int8 else None
        options = ExportOptions(runtime="torch_compile", precision=precision, probe_levels=False)
        export(ExportJob(backbone=backbone, options=options, images=images), bundle)
    return bundle


def compiled(backbone: BaseBackbone, settings: dict[str, Any], images: FloatArray) -> Call:
    """A backbone under torch.compile, compiled for these images, as a call."""
    module = torch.compile(backbone, options=settings or None)

    def call(images: FloatArray) -> list[FloatArray]:
        with torch.no_grad():
            return [module(torch.from_numpy(images)).numpy()]

    # As options= alone, freezing does nothing: it must be on where the parameters are taken in. Without
    # options= the code of another module of this class, compiled with other settings, would be used.
    with torch._inductor.config.patch(settings):
        call(images)
    return call


def opened(bundle: Path, images: FloatArray) -> Call:
    """A bundle's engine, called once."""
    model = load_bundle(bundle)
    model(images)
    return model


def measured(name: str, folder: Path, rounds: int, *, int8: bool) -> Row:
    """Start each, wait for a line of input, and time all in turns."""
    images = noise(backbone_of(name), 1)
    bundles = {"ours": built(name, folder, int8=False)} | ({"int8": built(name, folder, int8=True)} if int8 else {})
    openers: dict[str, Callable[[], Call]] = {
        **{key: partial(opened, bundle, images) for key, bundle in bundles.items()},
        **{rival: partial(compiled, backbone_of(name), settings, images) for rival, settings in RIVALS.items()},
    }
    calls: dict[str, Call] = {}
    start_seconds: dict[str, float] = {}
    for key, opener in openers.items():
        before = time.perf_counter()
        calls[key] = opener()
        start_seconds[key] = round(time.perf_counter() - before, 2)
    print("compiled", flush=True)
    sys.stdin.readline()
    milliseconds = {key: round(taken, 2) for key, taken in alternate(calls, images, rounds).items()}
    mode = read_manifest(bundles["ours"]).compiler.get("mode", "")
    return Row(model=name, rounds=rounds, mode=mode, milliseconds=milliseconds, start_seconds=start_seconds)


def table(rows: list[Row]) -> str:
    """A line a backbone, then the geometric mean."""
    head = ("ours", "int8", *RIVALS)
    lines = [f"{'backbone':<30}" + "".join(f"{name:>14}" for name in head) + f"{'ours/best':>11}{'start':>8}  mode"]
    for row in rows:
        figures = (f"{row.milliseconds[name]:14.2f}" if name in row.milliseconds else f"{'-':>14}" for name in head)
        lines.append(f"{row.model:<30}{''.join(figures)}{row.ratio:11.3f}{row.faster_start:7.0f}x  {row.mode}")
    mean = statistics.geometric_mean(row.ratio for row in rows)
    lines.append(f"{'geometric mean':<30}{'':{14 * len(head)}}{mean:11.3f}")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, each backbone in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="backbones (default: the eight of the table)")
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds (default: %(default)s)")
    parser.add_argument("--int8", action="store_true", help="time the INT8 engines too")
    parser.add_argument("--bundles", type=Path, help="keep the engines here, and use those that are there")
    parser.add_argument("--build-only", action="store_true", help="make the engines and time nothing")
    parser.add_argument("--results", type=Path, help="JSON lines to append to, and to leave out what they hold")
    parser.add_argument("--at-once", type=int, default=1, help="backbones that compile at once; they are timed alone")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="deploykit-torch-compile-") as scratch:
        bundles = options.bundles or Path(scratch)
        if options.build_only:
            for name in options.models:
                for int8 in (False, True) if options.int8 else (False,):
                    print(built(name, bundles, int8=int8), flush=True)
            return
        if options.one:
            print(json.dumps(asdict(measured(options.models[0], bundles, options.rounds, int8=options.int8))))
            return
        print(table(_all_rows(options, bundles)))


def _all_rows(options: argparse.Namespace, bundles: Path) -> list[Row]:
    known = options.results.read_text().splitlines() if options.results and options.results.exists() else []
    rows = {row.model: row for row in (Row(**json.loads(line)) for line in known)}
    missing = [name for name in options.models if name not in rows]
    for start in range(0, len(missing), options.at_once):
        children = [_start(name, options, bundles) for name in missing[start : start + options.at_once]]
        for child in children:
            child.stdout.readline()  # it has compiled
        for child in children:
            line = child.communicate("\n")[0]
            if child.returncode:
                raise SystemExit(f"{' '.join(child.args)} failed")
            row = Row(**json.loads(line))
            rows[row.model] = row
            if options.results:
                with options.results.open("a") as file:
                    file.write(line)
    return [rows[name] for name in options.models]


def _start(name: str, options: argparse.Namespace, bundles: Path) -> subprocess.Popen[str]:
    """A process that compiles, says so, and measures once it is told to."""
    arguments = ["--one", "--rounds", str(options.rounds), "--bundles", str(bundles), "--models", name]
    command = [sys.executable, __file__, *arguments, *(["--int8"] if options.int8 else [])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


if __name__ == "__main__":
    main()
