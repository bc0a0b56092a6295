"""Where the time of a torch_compile engine goes: oneDNN's kernels by kind, and inductor's own loops between them.

FP32 and INT8 engines of the same network, batch 1, random weights, as `torch_compile.py` builds and keeps them. The
kernels' times are oneDNN's own (ONEDNN_VERBOSE=1), the median over the calls; a call's time is measured in another
process, without. What the kernels leave of it is inductor's loops (gates, softmax, norms, rounding) and the call.

The last line says what the call of one kernel costs: what each of many small 1x1 convolutions adds to a call.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from _timing import Call
from torch import Tensor, nn
from torch_compile import CALIBRATION_IMAGES, MODELS, built

import deploykit
from deploykit.arrays import FloatArray
from deploykit.loading import load_bundle
from deploykit.spec import Int8

CALLS, WARM_UP = 30, 5
KINDS = ("int8 conv", "int8 depthwise", "int8 product", "float conv", "float depthwise", "float product", "reorder")
CHAIN, MANY_CALLS = 64, 300
_STARTED, _ENDED = "call", "ended"


def run(bundle: Path) -> None:
    """Call an engine, with a line before each call and one with its milliseconds behind it."""
    engine = load_bundle(bundle)
    images = np.random.default_rng(0).normal(size=(1, *engine.input_spec.shape[1:])).astype(np.float32)
    for _ in range(WARM_UP + CALLS):
        print(_STARTED, flush=True)
        started = time.perf_counter()
        engine(images)
        print(_ENDED, 1e3 * (time.perf_counter() - started), flush=True)


def profile(bundle: Path) -> tuple[float, Counter[str]]:
    """Milliseconds of a call, and those of each kind of kernel in it."""
    calls = _calls(bundle, verbose=False)
    milliseconds = statistics.median(float(lines[-1].split()[1]) for lines in calls)
    seen = [_kinds(lines) for lines in _calls(bundle, verbose=True)]
    return milliseconds, Counter({kind: statistics.median(each[kind] for each in seen) for kind in KINDS})


def _calls(bundle: Path, *, verbose: bool) -> list[list[str]]:
    """The lines that a process writes during each call, the first few calls left out."""
    command = [sys.executable, __file__, "--one", str(bundle)]
    environment = os.environ | {"ONEDNN_VERBOSE": "1" if verbose else "0"}
    written = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [call.splitlines() for call in written.split(f"{_STARTED}\n")[1 + WARM_UP :]]


def _kinds(lines: list[str]) -> Counter[str]:
    """The milliseconds of each kind of kernel, of the lines of one call."""
    found: Counter[str] = Counter()
    for line in lines:
        fields = line.split(",")
        if len(fields) > 6 and fields[0] == "onednn_verbose" and "exec" in fields:
            found[_kind(line)] += float(fields[-1])
    return found


def _kind(line: str) -> str:
    """Which of `KINDS` a kernel is; a group a channel makes a convolution depthwise."""
    if ",reorder," in line:
        return "reorder"
    types = "int8" if re.search(r"wei:s8|wei_s8|wei:u8", line) else "float"
    if ",convolution," not in line:
        return f"{types} product"
    grouped = re.search(r"g(\d+)mb\d+_ic(\d+)oc", line)
    return f"{types} depthwise" if grouped and grouped[1] == grouped[2] else f"{types} conv"


class Chain(nn.Module):
    """Convolutions of 16 channels, a 32x32 one with a stride of 32 and then 1x1 ones, each with a ReLU."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 32, 32)
        self.others = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(length))

    def forward(self, images: Tensor) -> Tensor:
        """Map ``(N, 3, 224, 224)`` to ``(N, 16)``."""
        maps = torch.relu(self.first(images))
        for layer in self.others:
            maps = torch.relu(layer(maps))
        return maps.mean((2, 3))


def call_microseconds(*, int8: bool) -> float:
    """What each of `CHAIN` convolutions on 7x7 maps adds to a call."""
    images = np.random.default_rng(0).normal(size=(CALIBRATION_IMAGES, 3, 224, 224)).astype(np.float32)
    asked = {"precision": Int8(min_sqnr_db=-100), "calibration": images} if int8 else {"precision": "fp32"}
    taken = []
    for length in (0, CHAIN):
        torch.manual_seed(0)
        chain = Chain(length).eval()
        with deploykit.create_backbone(chain, runtime="torch_compile", image_size=224, **asked) as engine:
            taken.append(statistics.median(_seconds(engine, images[:1]) for _ in range(MANY_CALLS)))
    return 1e6 * (taken[1] - taken[0]) / CHAIN


def _seconds(engine: Call, images: FloatArray) -> float:
    started = time.perf_counter()
    engine(images)
    return time.perf_counter() - started


def main() -> None:
    """Print a row an engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="(default: the eight of torch_compile.py)")
    parser.add_argument("--bundles", type=Path, help="keep the engines here, and use those that are there")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if options.one:
        run(options.one)
        return
    with tempfile.TemporaryDirectory(prefix="deploykit-torch-compile-") as scratch:
        head = "".join(f"{kind:>16}" for kind in KINDS)
        print(f"milliseconds of one call, medians of {CALLS}\n{'network':<34}{'call':>8}{head}{'between':>10}")
        for name in options.models:
            for int8 in (False, True):
                whole, kinds = profile(built(name, options.bundles or Path(scratch), int8=int8))
                figures = "".join(f"{kinds[kind]:16.2f}" for kind in KINDS)
                title = f"{name} {'INT8' if int8 else 'FP32'}"
                print(f"{title:<34}{whole:8.2f}{figures}{whole - sum(kinds.values()):10.2f}", flush=True)
    fp32, int8 = (call_microseconds(int8=each) for each in (False, True))
    print(f"a kernel's call, microseconds: {fp32:.0f} in FP32, {int8:.0f} in INT8")


if __name__ == "__main__":
    main()
