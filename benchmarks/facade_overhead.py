"""What calling through deploykit costs over the runtime's own call: EfficientNet-Lite0 INT8, batch 1.

Both calls run in one process in alternating order on the same engine and the same image; printed
are the medians over all rounds and the median of the ratios, pair by pair.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import deploykit
from deploykit.arrays import FloatArray
from deploykit.cli.demo import photograph_folder, write_crops


def raw_onnxruntime(folder: Path) -> Callable[[FloatArray], object]:
    """ONNX Runtime's own call, with a session as a user would make it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})


def raw_openvino(folder: Path) -> Callable[[FloatArray], object]:
    """OpenVINO's own call on an infer request, precision pinned, the output copied as ours is."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(folder / "model.xml", "CPU", settings).create_infer_request()
    return lambda images: request.infer([images], share_inputs=True)[0]


RAW = {"onnxruntime": raw_onnxruntime, "openvino": raw_openvino}


def main() -> None:
    """Print a row a runtime."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2000, help="pairs of calls (default: %(default)s)")
    rounds = parser.parse_args().rounds
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    print(f"{'runtime':<12} {'raw ms':>8} {'ours ms':>8} {'ours/raw':>9}   median of {rounds} alternating pairs")
    with tempfile.TemporaryDirectory() as scratch:
        crops = write_crops(photograph_folder(), Path(scratch) / "crops", count=20)
        for runtime, make_raw in RAW.items():
            folder = Path(scratch) / runtime
            deploykit.export_backbone(
                "efficientnet_lite0", folder, runtime=runtime, precision="int8", calibration=crops, pretrained=True
            )
            with deploykit.load_bundle(folder) as model:
                raw = make_raw(folder)
                pairs = [(timed(raw, image), timed(model, image)) for _ in range(rounds + 100)][100:]
            ratio = statistics.median(ours / theirs for theirs, ours in pairs)
            theirs, ours = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
            print(f"{runtime:<12} {theirs:8.3f} {ours:8.3f} {ratio:9.3f}")


def timed(call: Callable[[FloatArray], object], image: FloatArray) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call(image)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
