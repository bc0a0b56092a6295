"""What calling through deploykit costs over the runtime's own call: MobileNetV3-S INT8, batch 1.

Both calls run in one process in alternating order on the same engine and the same image; printed are the medians over
all rounds, and the median of the ratios, pair by pair. The raw runtime is opened twice: with the settings of
deploykit's adapter, which leaves the facade alone between the two, and with its defaults, which are what a user has
without deploykit. ONNX Runtime's threads then spin after each call, and take a core from whoever comes next, ours here.

``kept`` images lie where the calls before left them, mostly outside the core's cache; ``written`` ones are copied into
place before each call, outside of its time, as preprocessing does with every frame.

``facade`` is the processor time of a call whose engine answers at once, which holds on a loaded machine too: the checks
of the images, which read each value once, and the way in and out.

Bar: 1.03 of the raw call with the same settings.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from _results import machine_line, parser, save, silence
from startup import NETWORK, bundle_of

import deploykit
from deploykit.arrays import FloatArray
from deploykit.backends.onnxruntime.adapter import SESSION_SETTINGS
from deploykit.backends.onnxruntime.package import load_onnxruntime
from deploykit.backends.onnxruntime.session import session_options
from deploykit.backends.runtime import Runtime
from deploykit.threads import thread_limit

BAR = 1.03
WARM_UP = 100
SAME, DEFAULTS = "our settings", "its defaults"

RawCall = Callable[[FloatArray], object]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Median milliseconds of both calls, the median of the pairs' ratios, and microseconds of the facade alone."""

    runtime: str
    settings: str
    image: str
    raw_ms: float
    ours_ms: float
    ratio: float
    facade_us: float


def raw_onnxruntime(folder: Path, settings: str) -> RawCall:
    """ONNX Runtime's own call on a session."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if settings == SAME:
        options = session_options(load_onnxruntime(), thread_limit())
        for key, value in SESSION_SETTINGS.items():
            options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"images": images})


def raw_openvino(folder: Path, settings: str) -> RawCall:
    """OpenVINO's own call on an infer request, precision pinned, the output copied as ours is."""
    import openvino

    config: dict[str, object] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    threads = thread_limit()
    if settings == SAME and threads is not None:
        config |= {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
    request = openvino.Core().compile_model(folder / "model.xml", "CPU", config).create_infer_request()
    return lambda images: request.infer([images], share_inputs=True)[0]


RAW = {"onnxruntime": raw_onnxruntime, "openvino": raw_openvino}


def measure(runtime: str, folder: Path, rounds: int) -> list[Row]:
    """Time pairs of calls for both settings of the raw runtime."""
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    rows = []
    with deploykit.load_bundle(folder) as model:
        facade = facade_us(model, image, rounds)
        for settings, kind in ((SAME, "kept"), (SAME, "written"), (DEFAULTS, "kept")):
            source = image.copy() if kind == "written" else None
            raw = RAW[runtime](folder, settings)
            pairs = [_pair(raw, model, image, source, number) for number in range(rounds + WARM_UP)][WARM_UP:]
            theirs, ours = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(own / other for other, own in pairs)
            figures = {"raw_ms": theirs, "ours_ms": ours, "ratio": ratio, "facade_us": facade}
            rows.append(Row(runtime=runtime, settings=settings, image=kind, **figures))
    return rows


def facade_us(model: Runtime, image: FloatArray, rounds: int) -> float:
    """Microseconds of this thread in a call whose engine answers at once, with what it answered before."""
    answered = model._run(image)
    with mock.patch.object(model, "_run", lambda images: answered):
        model(image)
        start = time.thread_time()
        for _ in range(rounds):
            model(image)
        return 1e6 * (time.thread_time() - start) / rounds


def _pair(
    raw: RawCall, model: RawCall, image: FloatArray, source: FloatArray | None, number: int
) -> tuple[float, float]:
    """Seconds of the raw call and of ours, in turn the first one."""
    if number % 2:
        ours = timed(model, image, source)
        return timed(raw, image, source), ours
    return timed(raw, image, source), timed(model, image, source)


def timed(call: RawCall, image: FloatArray, source: FloatArray | None) -> float:
    """Seconds of one call, before which the image is written from ``source``, where there is one."""
    if source is not None:
        image[...] = source
    start = time.perf_counter()
    call(image)
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row a runtime and settings."""
    options = parser(__doc__)
    options.add_argument("--network", default=NETWORK, help="default: %(default)s")
    options.add_argument("--rounds", type=int, help="pairs of calls (default: 2000; 300 with --quick)")
    options.add_argument("--work", type=Path, metavar="FOLDER", help="keep bundles here (default: a temporary folder)")
    asked = options.parse_args(arguments)
    silence()
    rounds = asked.rounds or (300 if asked.quick else 2000)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="deploykit-facade-") as scratch:
        for runtime in RAW:
            rows += measure(runtime, bundle_of(asked.network, runtime, asked.work or Path(scratch)), rounds)
    print(machine_line())
    print(f"{asked.network} INT8, batch 1, medians of {rounds} alternating pairs")
    head = f"{'runtime':<12} {'raw with':<13} {'image':<8} {'raw ms':>8} {'ours ms':>8}"
    print(f"{head} {'ours/raw':>9} {'facade us':>10}")
    for row in rows:
        met = f"  {'within' if row.ratio <= BAR else 'outside'} the bar, {BAR}" if row.settings == SAME else ""
        figures = f"{row.raw_ms:8.3f} {row.ours_ms:8.3f} {row.ratio:9.3f} {row.facade_us:10.1f}"
        print(f"{row.runtime:<12} {row.settings:<13} {row.image:<8} {figures}{met}")
    save(asked.json, rows=[asdict(row) for row in rows])


if __name__ == "__main__":
    main()
