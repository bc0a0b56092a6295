"""From a decoded image to the engine's answer: preprocessing in NumPy and the float engine, against the uint8 engine.

Every call starts from the same ``(1, 224, 224, 3)`` uint8 photograph. ``numpy`` is the arithmetic of
`deploykit.load_images`; ``tuned`` is the fewest passes that NumPy allows, a multiplication and an
addition; ``uint8`` is the engine with embedded preprocessing. Rounds go through all three in turn,
in one process, with a pause before each call: the threads of the engine that ran before spin for a
while and would slow the next one down. Printed are the medians, and the median of the ratios round
by round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import deploykit
from deploykit.backends.torch.adapter import scale_and_shift
from deploykit.cli.demo import photograph_folder
from deploykit.images.preprocess import normalize
from deploykit.parity.metrics import sqnr_db
from deploykit.spec import Preprocessing

MODELS = ("mobilenetv3_small_100", "efficientnet_lite0", "resnet50", "vit_tiny_patch16_224")
RUNTIMES = ("onnxruntime", "openvino")
WARM_UP = 10
PAUSE_S = 0.02


def main() -> None:
    """Print a row a model and runtime."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=150, help="rounds of the three calls (default: %(default)s)")
    parser.add_argument("--precision", default="fp32", help="of both engines (default: %(default)s)")
    parser.add_argument("--models", nargs="+", default=MODELS, help="(default: %(default)s)")
    arguments = parser.parse_args()
    photograph = photograph_folder() / "chelsea.png"
    print(f"{arguments.precision}, batch 1, medians of {arguments.rounds} rounds in ms; dB: uint8 against numpy")
    columns = " ".join(f"{name:>8}" for name in ("numpy", "tuned", "uint8"))
    print(f"{'runtime':<12} {'model':<22} {columns} {'uint8/numpy':>12} {'uint8/tuned':>12}   dB")
    for name in arguments.models:
        backbone: Any = deploykit.create_backbone(name, image_size=224)
        backbone.eval()
        given = deploykit.load_images(photograph, backbone.input_spec.as_pixels())
        for runtime in RUNTIMES:
            calls = engines(backbone, runtime, arguments.precision, given)
            numbers = sqnr_db(calls["numpy"](), calls["uint8"]())
            times = [{which: timed(call) for which, call in calls.items()} for _ in range(arguments.rounds + WARM_UP)]
            _print_row(runtime, name, times[WARM_UP:], numbers)


def engines(backbone: Any, runtime: str, precision: str, given: Any) -> dict[str, Callable[[], Any]]:
    """The three ways from pixels to logits, as calls without arguments."""
    settings: dict[str, Any] = {"runtime": runtime, "precision": precision, "cache": False}
    if precision == "int8":
        settings["calibration"] = normalize(given, backbone.input_spec.preprocessing)
    of_floats: Any = deploykit.create_backbone(backbone, **settings)
    of_pixels: Any = deploykit.create_backbone(backbone, embed_preprocessing=True, **settings)
    how: Preprocessing = backbone.input_spec.preprocessing
    scale, shift = (values.reshape(1, -1, 1, 1) for values in scale_and_shift(how))

    def tuned() -> Any:
        images = np.ascontiguousarray(given.transpose(0, 3, 1, 2)) * scale
        images += shift
        return of_floats(images)

    return {"numpy": lambda: of_floats(normalize(given, how)), "tuned": tuned, "uint8": lambda: of_pixels(given)}


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of one call, after a pause."""
    time.sleep(PAUSE_S)
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def _print_row(runtime: str, name: str, times: list[dict[str, float]], numbers: float) -> None:
    medians = {which: statistics.median(row[which] for row in times) for which in times[0]}
    ratios = [statistics.median(row["uint8"] / row[which] for row in times) for which in ("numpy", "tuned")]
    figures = " ".join(f"{value:8.3f}" for value in medians.values())
    print(f"{runtime:<12} {name:<22} {figures} {ratios[0]:12.3f} {ratios[1]:12.3f} {numbers:4.0f}", flush=True)


if __name__ == "__main__":
    main()
