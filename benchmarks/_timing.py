"""Graphs as calls, and calls that take turns: what the benchmarks share."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from deploykit.arrays import FloatArray
from deploykit.backends.onnxruntime.adapter import SESSION_SETTINGS

WARM_UP = 3

Call = Callable[[FloatArray], list[FloatArray]]


def in_onnxruntime(model: onnx.ModelProto | ir.Model | Path, *, without: str | None = None) -> Call:
    """A graph, or its file, as a call in ONNX Runtime, on the CPU, with the settings of deploykit's adapter.

    ``without`` is a setting that is left to the default.

    Its threads sleep between calls. By default they spin for some 50 ms more, and those of one session take a
    core from the next: on 2 cores that doubled the time of EfficientNet-Lite0, in some turns and not in others.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for key, value in SESSION_SETTINGS.items():
        if key != without:
            options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(_readable(model), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def in_openvino(
    model: onnx.ModelProto | ir.Model | Path,
    precision: str = "f32",
    *,
    without: str | None = None,
    threads: int | None = None,
    pinned: bool = False,
) -> Call:
    """A graph, or its file, as a call in OpenVINO, on the CPU, ``precision`` pinned where there are no integers.

    ``without`` is a setting that is left to the default; a number of threads is tied to processors if ``pinned``.
    """
    import openvino

    settings: dict[str, object] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        settings |= {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": pinned}
    settings.pop(without or "", None)
    core = openvino.Core()
    request = core.compile_model(core.read_model(_readable(model)), "CPU", settings).create_infer_request()

    def call(images: FloatArray) -> list[FloatArray]:
        request.infer([images], share_inputs=True)
        return [np.array(request.get_output_tensor(index).data) for index in range(len(request.model_outputs))]

    return call


def _readable(model: onnx.ModelProto | ir.Model | Path) -> str | bytes:
    if isinstance(model, Path):
        return str(model)
    return (ir.to_proto(model) if isinstance(model, ir.Model) else model).SerializeToString()


RUNTIMES: dict[str, Callable[[onnx.ModelProto | ir.Model | Path], Call]] = {
    "onnxruntime": in_onnxruntime,
    "openvino": in_openvino,
}


def alternate(calls: Mapping[str, Call], images: FloatArray, rounds: int) -> dict[str, float]:
    """Milliseconds a call, the median of ``rounds`` in which all take turns; see `turns`."""
    return {name: statistics.median(values) for name, values in turns(calls, images, rounds).items()}


def turns(
    calls: Mapping[str, Call], images: FloatArray, rounds: int, *, pause_s: float = 0.0
) -> dict[str, list[float]]:
    """Milliseconds of each call in each of ``rounds`` in which all take turns, in another order in each.

    Each turn makes two calls and times the second, which finds its weights in the caches. Threads of torch spin on
    after its call: in a fixed order that cost the same successor half its time in every round. A pause before each turn
    lets them come to rest.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)  # noqa: S311  (no secret)
    for _ in range(rounds + WARM_UP):
        for name in order.sample(list(calls), len(calls)):
            time.sleep(pause_s)
            calls[name](images)
            start = time.perf_counter()
            calls[name](images)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: values[WARM_UP:] for name, values in times.items()}


def outputs_of(call: Call, images: FloatArray) -> list[FloatArray]:
    """Every output over all images, one image a call."""
    return [np.concatenate(parts) for parts in zip(*(call(image[None]) for image in images), strict=True)]
