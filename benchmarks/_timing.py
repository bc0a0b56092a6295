"""Graphs as calls, and calls that take turns: what the benchmarks share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
import onnx

from deploykit.runtimes.base import FloatArray
from deploykit.runtimes.run_onnxruntime import SESSION_SETTINGS

WARM_UP = 3

Call = Callable[[FloatArray], list[FloatArray]]


def in_onnxruntime(model: onnx.ModelProto) -> Call:
    """A graph as a call in ONNX Runtime, on the CPU, with the settings of deploykit's adapter.

    Its threads sleep between calls. By default they spin for some 50 ms more, and those of one session take a
    core from the next: on 2 cores that doubled the time of EfficientNet-Lite0, in some turns and not in others.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for key, value in SESSION_SETTINGS.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def in_openvino(model: onnx.ModelProto) -> Call:
    """A graph as a call in OpenVINO, on the CPU, precision pinned to FP32 where the graph has no integers."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    core = openvino.Core()
    request = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings).create_infer_request()

    def call(images: FloatArray) -> list[FloatArray]:
        request.infer([images], share_inputs=True)
        return [np.array(request.get_output_tensor(index).data) for index in range(len(request.model_outputs))]

    return call


RUNTIMES: dict[str, Callable[[onnx.ModelProto], Call]] = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}


def alternate(calls: Mapping[str, Call], images: FloatArray, rounds: int) -> dict[str, float]:
    """Milliseconds a call, the median of ``rounds`` in which all take turns.

    Each turn makes two calls and times the second, which finds its weights in the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + WARM_UP):
        for name, call in calls.items():
            call(images)
            start = time.perf_counter()
            call(images)
            times[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values[WARM_UP:]) for name, values in times.items()}


def outputs_of(call: Call, images: FloatArray) -> list[FloatArray]:
    """Every output over all images, one image a call."""
    return [np.concatenate(parts) for parts in zip(*(call(image[None]) for image in images), strict=True)]
