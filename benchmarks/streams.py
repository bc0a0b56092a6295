"""Streams against the runtimes' own benchmark tools, at the same settings; and memory over many frames.

OpenVINO's tool is benchmark_app, with as many requests, threads and streams as ours has. ONNX Runtime's is what
onnxruntime_perf_test does with -c: as many threads as there are runs at a time, each calling one session. Tools and
streams take turns. No tool checks images, copies them, keeps the order or hands the outputs out, which a stream does.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import deploykit
from deploykit.arrays import ImageArray
from deploykit.backends.runtime import Runtime
from deploykit.bench import random_images, throughput

_APP = "import sys; sys.modules['openvino_telemetry'] = None; from openvino.tools.benchmark.main import main; main()"
_STATUS = Path("/proc/self/statm")


def openvino_tool(model: Runtime, folder: Path, images: ImageArray, seconds: float) -> float:
    """Images a second by benchmark_app, without its reports of usage."""
    settings = {
        "-m": folder / "model.xml",
        "-d": "CPU",
        "-hint": "none",
        "-api": "async",
        "-infer_precision": "f32",
        "-nireq": model.in_flight,
        "-nthreads": model.threads or os.cpu_count(),
        "-nstreams": model._compiled.get_property("NUM_STREAMS"),
        "-pin": "NO",
        "-t": max(1, round(seconds)),
    }
    words = [str(word) for pair in settings.items() for word in pair]
    done = subprocess.run([sys.executable, "-c", _APP, *words], capture_output=True, text=True, check=True)
    return float(re.search(r"Throughput:\s*([\d.]+)", done.stdout)[1]) * len(images)


def onnxruntime_tool(model: Runtime, folder: Path, images: ImageArray, seconds: float) -> float:
    """Images a second of threads that each call the session."""
    session, feeds = model._session, {model.input_spec.name: images}
    counts, end = [0] * model.parallel, perf_counter() + seconds

    def work(place: int) -> None:
        while perf_counter() < end:
            session.run(None, feeds)
            counts[place] += 1

    threads = [threading.Thread(target=work, args=(place,)) for place in range(model.parallel)]
    start = perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) * len(images) / (perf_counter() - start)


TOOLS: dict[str, Callable[[Runtime, Path, ImageArray, float], float]] = {
    "onnxruntime": onnxruntime_tool,
    "openvino": openvino_tool,
}


def compare(folder: Path, runtime: str, hint: str, arguments: argparse.Namespace) -> None:
    """Print one row: the tool, the stream, and the median of their ratios, turn by turn."""
    with deploykit.load_bundle(folder, hint=hint, threads=arguments.threads) as model:
        images = random_images(model, model.input_spec.best_batch)
        pairs = []
        for _ in range(arguments.turns):
            theirs = TOOLS[runtime](model, folder, images, arguments.seconds)
            pairs.append((theirs, throughput(model, images, arguments.seconds)))
        tool, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(own / other for other, own in pairs)
        print(f"{runtime:<12} {hint:<11} {model.in_flight:>9} {tool:>10.0f} {ours:>10.0f} {ratio:>11.3f}", flush=True)


def memory(folder: Path, runtime: str, arguments: argparse.Namespace) -> None:
    """Print the resident memory along a stream of many frames."""

    def frames(image: ImageArray) -> Iterator[ImageArray]:
        for _ in range(arguments.frames):
            yield image

    with deploykit.load_bundle(folder, hint="throughput", threads=arguments.threads) as model:
        told = []
        for done, _ in enumerate(model.stream(frames(random_images(model, 1))), 1):
            if done in {arguments.frames // 10, arguments.frames // 2, arguments.frames}:
                pages = int(_STATUS.read_text().split()[1])
                told.append(f"{done}: {pages * os.sysconf('SC_PAGE_SIZE') / 1e6:.1f} MB")
        print(f"{runtime:<12} {', '.join(told)}", flush=True)


def main() -> None:
    """Print a row a runtime and hint, and the memory of each runtime."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="mobilenetv3_small_075")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--frames", type=int, default=0, help="of the memory's stream; 0: none")
    arguments = parser.parse_args()
    print(f"{'runtime':<12} {'hint':<11} {'in flight':>9} {'tool im/s':>10} {'ours im/s':>10} {'ours/tool':>11}")
    with tempfile.TemporaryDirectory() as scratch:
        for runtime in TOOLS:
            folder = Path(scratch) / runtime
            deploykit.export_backbone(arguments.backbone, folder, runtime=runtime, image_size=arguments.image_size)
            for hint in ("latency", "throughput"):
                compare(folder, runtime, hint, arguments)
            if arguments.frames:
                memory(folder, runtime, arguments)


if __name__ == "__main__":
    main()
