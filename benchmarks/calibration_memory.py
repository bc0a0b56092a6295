"""Peak memory and time of calibrating, by the number of images: each cell in a process of its own.

The images are JPEG files, crops of scikit-image's photographs at random places, written once to a work
folder. A process opens the master graph, calibrates on the first N files as an export does, and reports the
highest resident memory that the kernel saw of it, and the time.

Bars: the peak with 4096 images at most 1.1 times that with 64, and time linear in their number; Swin-T with
entropy calibration under 2.5 GB.

    python benchmarks/calibration_memory.py                          # mobilenetv3_small_100: 64, 512, 4096
    python benchmarks/calibration_memory.py --network swin_tiny_patch4_window7_224 --calibrator entropy \
        --images 64 256
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _memory import in_a_process, peak_mb


def write_photographs(folder: Path, count: int, side: int) -> Path:
    """``count`` JPEG crops of a side in pixels, of half to all of a photograph's; those that are there are kept."""
    from PIL import Image

    from deploykit.cli.demo import CALIBRATED, SHOWN, photograph_folder

    folder.mkdir(parents=True, exist_ok=True)
    photographs = [Image.open(photograph_folder() / name).convert("RGB") for name in (*CALIBRATED, *SHOWN)]
    generator = np.random.default_rng(0)
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        part = int(min(photograph.size) * generator.uniform(0.5, 1.0))
        left, top = (int(generator.integers(0, length - part + 1)) for length in photograph.size)
        path = folder / f"{number:05d}.jpg"
        if not path.exists():
            crop = photograph.crop((left, top, left + part, top + part)).resize((side, side))
            crop.save(path, quality=90)
    return folder


def write_graph(name: str, path: Path, size: int, *, dynamic: bool) -> None:
    """The fused master graph of a backbone with random weights, of batch 1 or of a dynamic one."""
    import onnx_ir as ir
    import torch
    from _from_tests import realistic

    from deploykit.backbones.base import BackboneOptions
    from deploykit.backbones.registry import build
    from deploykit.export.measure import parity_images
    from deploykit.export.to_onnx import to_onnx
    from deploykit.export.trace import output_names, trace
    from deploykit.fusion.pipeline import fuse
    from deploykit.spec import BatchRange

    torch.manual_seed(0)
    backbone = realistic(build(name, BackboneOptions(image_size=(size, size)))).eval()
    spec = replace(backbone.input_spec, batch=BatchRange() if dynamic else 1)
    fused = fuse(trace(backbone, spec), spec, parity_images(None, spec))
    ir.save(to_onnx(fused.program, spec, output_names(backbone)), path)


def calibrate_here(graph: Path, photographs: Path, count: int, calibrator: str) -> dict[str, Any]:
    """Calibrate in this process and say what it took."""
    import onnx_ir as ir

    from deploykit.calibration.images import calibration_set
    from deploykit.calibration.plan import calibrate
    from deploykit.calibration.statistics import Statistics
    from deploykit.onnx_session import graph_batch
    from deploykit.spec import InputSpec, Int8

    model = ir.load(graph)
    height, width = (int(side) for side in list(model.graph.inputs[0].shape or ())[2:])
    spec = InputSpec(height=height, width=width)
    images = calibration_set(sorted(photographs.iterdir())[:count], spec)
    before, start = peak_mb(), time.perf_counter()
    calibrate(
        model,
        images.batches(graph_batch(model)),
        Int8(calibrator=calibrator),  # type: ignore[arg-type]
        key="",
        started=Statistics(spec.preprocessing),
    )
    return {"before_mb": before, "peak_mb": peak_mb(), "seconds": time.perf_counter() - start}


def main() -> None:
    """Print a row a number of images, with its ratios to the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="mobilenetv3_small_100", help="default: %(default)s")
    parser.add_argument("--image-size", type=int, default=224, help="in pixels (default: %(default)s)")
    parser.add_argument("--images", type=int, nargs="+", default=[64, 512, 4096], help="default: %(default)s")
    parser.add_argument("--calibrator", default="mse", help="default: %(default)s")
    parser.add_argument("--dynamic", action="store_true", help="of a dynamic batch: 4 images at a time, not 1")
    parser.add_argument("--work", type=Path, help="a folder that keeps graphs and photographs (default: none)")
    parser.add_argument("--here", nargs=4, metavar="PART", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        graph, photographs, count, calibrator = options.here
        print(json.dumps(calibrate_here(Path(graph), Path(photographs), int(count), calibrator)))
        return
    with tempfile.TemporaryDirectory(prefix="deploykit-calibration-memory-") as scratch:
        work = options.work or Path(scratch)
        size = options.image_size
        photographs = write_photographs(work / f"photographs-{size}", max(options.images), 8 * size // 7)
        graph = work / f"{options.network}-{size}{'-dynamic' if options.dynamic else ''}.onnx"
        if not graph.exists():
            write_graph(options.network, graph, size, dynamic=options.dynamic)
        print(f"{options.network}, {size} px, {options.calibrator}, batches of {4 if options.dynamic else 1}")
        print(f"{'images':>7}{'before MB':>11}{'peak MB':>9}{'ratio':>7}{'seconds':>9}{'ms/image':>10}{'ratio':>7}")
        rows: list[dict[str, Any]] = []
        for count in options.images:
            row = in_a_process(__file__, ["--here", str(graph), str(photographs), str(count), options.calibrator])
            rows.append(row)
            each, ratio = 1000 * row["seconds"] / count, row["peak_mb"] / rows[0]["peak_mb"]
            slower = each / (1000 * rows[0]["seconds"] / options.images[0])
            memory = f"{row['before_mb']:11.0f}{row['peak_mb']:9.0f}{ratio:7.3f}"
            print(f"{count:7}{memory}{row['seconds']:9.1f}{each:10.1f}{slower:7.2f}", flush=True)


if __name__ == "__main__":
    main()
