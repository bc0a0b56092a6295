"""What each way to train with less memory saves and costs: one table from one run.

For every backbone: plain training, gradient checkpointing, `memory_efficient`, and saved activations
in 16 and in 8 bits, at batch 8 and 224 pixels.

- memory: resident memory that one forward pass adds and the backward pass will need, and the peak of
  the whole step over what was there before; each measured in a process of its own, after a warm-up
  step, with an allocator that gives freed memory back.
- time: whole steps, the ways taking turns in one process; the ratio is that of the fastest steps, which
  other load on the machine disturbs least.

    python benchmarks/training_memory.py [--runs 3] [--batch 8] [backbone ...]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from torch import nn

from deploykit.backbones.activation_compression import compressed_activations
from deploykit.backbones.base import BackboneOptions
from deploykit.backbones.memory_efficient import memory_efficient
from deploykit.backbones.registry import build

BACKBONES = ("resnet50", "efficientnet_b0", "vit_small_patch16_224")
WAYS = ("plain", "checkpointing", "memory_efficient", "compressed 16", "compressed 8")
PIXELS = 224


def prepare(name: str, way: str) -> nn.Module:
    """The backbone in training mode, set up for one way."""
    torch.manual_seed(0)
    model = build(name, BackboneOptions()).train()
    if way == "checkpointing":
        model.set_grad_checkpointing()
    return memory_efficient(model) if way == "memory_efficient" else model


def forward(model: nn.Module, way: str, images: torch.Tensor) -> torch.Tensor:
    """The loss of one forward pass."""
    compressed = way.startswith("compressed")
    context = compressed_activations(bits=int(way.split()[1])) if compressed else contextlib.nullcontext()
    with context:
        return model(images).square().mean()


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Peak:
    """The highest resident memory while it is entered, sampled every 2 ms."""

    def __enter__(self):
        self.bytes, self._done = resident_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, resident_bytes())

    def __exit__(self, *error):
        self._done.set()
        self._thread.join()


def measure_memory(name: str, way: str, batch: int) -> dict[str, float]:
    """MB that are kept after the forward pass, and at the step's peak."""
    model, images = prepare(name, way), torch.randn(batch, 3, PIXELS, PIXELS)
    forward(model, way, images).backward()
    before = resident_bytes()
    with Peak() as peak:
        loss = forward(model, way, images)
        kept = resident_bytes() - before
        loss.backward()
    return {"kept": kept / 2**20, "peak": (peak.bytes - before) / 2**20}


def memory_in_a_process(name: str, way: str, batch: int) -> dict[str, float]:
    """`measure_memory` where nothing else has run."""
    command = [sys.executable, __file__, "--measure", name, way, "--batch", str(batch)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def measure_times(name: str, batch: int, runs: int) -> dict[str, list[float]]:
    """Seconds of each whole step, the ways taking turns."""
    models = {way: prepare(name, way) for way in WAYS}
    images = torch.randn(batch, 3, PIXELS, PIXELS)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for run in range(runs + 1):
        for way, model in models.items():
            start = time.perf_counter()
            forward(model, way, images).backward()
            if run:
                seconds[way].append(time.perf_counter() - start)
            model.zero_grad()
    return seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbones", nargs="*", default=BACKBONES)
    parser.add_argument("--runs", type=int, default=3, help="timed steps of each way (default: 3)")
    parser.add_argument("--batch", type=int, default=8, help="images a step (default: 8)")
    parser.add_argument("--measure", nargs=2, metavar=("BACKBONE", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure_memory(*arguments.measure, arguments.batch)))
        return
    print(f"batch {arguments.batch}, {PIXELS} px, {torch.get_num_threads()} threads, torch {torch.__version__}")
    times_header = f"{'median s':>10}{'best s':>8}{'ratio':>7}"
    print(f"{'backbone':24}{'way':18}{'kept MB':>9}{'ratio':>7}{'peak MB':>9}{'ratio':>7}{times_header}", flush=True)
    for name in arguments.backbones:
        memory = {way: memory_in_a_process(name, way, arguments.batch) for way in WAYS}
        times = measure_times(name, arguments.batch, arguments.runs)
        for way in WAYS:
            row = f"{name:24}{way:18}"
            for key in ("kept", "peak"):
                row += f"{memory[way][key]:9.0f}{memory[way][key] / memory['plain'][key]:7.2f}"
            best = min(times[way])
            print(f"{row}{statistics.median(times[way]):10.2f}{best:8.2f}{best / min(times['plain']):7.2f}", flush=True)


if __name__ == "__main__":
    main()
