"""The speed guard: an INT8 engine timed in turns with the FP32 and FP16 engines of its runtime; why it is slower."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import onnx

from deploykit.errors import ExportError
from deploykit.export.inductor_kernels import left_in_float
from deploykit.optional import require
from deploykit.runtimes.base import ImageArray, Runtime
from deploykit.runtimes.run_onnxruntime import KEEP_FLOAT_WEIGHTS

ROUNDS = 60
LEAST_ROUNDS = 7
SECONDS = 2.0
"""A comparison ends after `ROUNDS` rounds, or after this time and `LEAST_ROUNDS`."""
PAUSE = 0.02
"""Seconds before a call, by which the threads of the model before it are asleep."""
SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class SpeedReport:
    """An INT8 engine against float ones on this machine: medians in milliseconds a call, timed in turns.

    ``fp16_ms``: of the engine with everything in half precision; None where the runtime has none.
    ``float_nodes`` are the plan's, with their reasons. ``left`` counts what the runtime's optimized
    graph still computes in float or converts: empty where the runtime shows no such graph.
    """

    fp32_ms: float
    int8_ms: float
    fp16_ms: float | None = None
    rounds: int
    float_nodes: dict[str, str] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        """FP32's time over the INT8 engine's: above 1 where INT8 is faster."""
        return self.fp32_ms / self.int8_ms

    @property
    def slower(self) -> bool:
        """Whether a float engine of the same runtime is faster."""
        return self.int8_ms > min(self.fp32_ms, self.fp16_ms or self.fp32_ms)

    def sentence(self) -> str:
        """One line: how much faster or slower."""
        times = f"{'slower; ' if self.slower else ''}median of {self.rounds} rounds in turns, one run"
        half = "" if self.fp16_ms is None else f", {self.fp16_ms / self.int8_ms:.2f} times as fast as fp16,"
        return f"int8 is {self.speedup:.2f} times as fast as fp32{half} in this runtime here ({times})."

    def reasons(self) -> list[str]:
        """What keeps the engine from being faster, as lines."""
        lines = [f"stays in float: {node}: {reason}" for node, reason in list(self.float_nodes.items())[:SHOWN]]
        if len(self.float_nodes) > SHOWN:
            lines.append(f"and {len(self.float_nodes) - SHOWN} more nodes stay in float: see quantization-plan.json")
        if self.left:
            counted = ", ".join(f"{count} {operator}" for operator, count in self.left.items())
            lines.append(f"the runtime's optimized graph still has {counted}")
        return lines or ["every node of the plan runs in integers; this processor or batch gains nothing from them"]


def check_speedup(report: SpeedReport | None, runtime: str) -> None:
    """Refuse an engine that is slower than FP32 or FP16, or that was not timed.

    Raises:
        ExportError: either.
    """
    if report is None:
        raise ExportError(
            f"a speedup is required, and {runtime} has no device here to time the engine on. Export on its device, or "
            "leave require_speedup out."
        )
    if report.slower:
        lines = "".join(f"\n  {line}" for line in report.reasons())
        raise ExportError(
            f"{report.sentence()} A speedup is required; what is against it:{lines}\n"
            "Export at the faster precision for this runtime, try another runtime, or leave require_speedup out."
        )


def time_in_turns(models: Sequence[Runtime], images: ImageArray) -> tuple[list[float], int]:
    """The median milliseconds of a call of each model, called in turns on one batch, and the rounds it took."""
    return time_calls([_call(model, images) for model in models])


def time_calls(calls: Sequence[Callable[[], object]]) -> tuple[list[float], int]:
    """The median milliseconds of each call, made in turns, and the rounds it took.

    Before each call there is a pause, and a call that is not timed: a runtime's threads wait actively for a
    while after a call, and would take a core from the next model.
    """
    for call in (*calls, *calls):
        call()
    times: list[list[float]] = [[] for _ in calls]
    start = perf_counter()
    while len(times[0]) < ROUNDS and (len(times[0]) < LEAST_ROUNDS or perf_counter() - start < SECONDS):
        for call, taken in zip(calls, times, strict=True):
            sleep(PAUSE)
            call()
            before = perf_counter()
            call()
            taken.append(1e3 * (perf_counter() - before))
    return [median(taken) for taken in times], len(times[0])


def _call(model: Runtime, images: ImageArray) -> Callable[[], object]:
    batch = model.input_spec.batch
    size = batch if isinstance(batch, int) else batch.opt
    piece = images[[index % len(images) for index in range(size)]]
    return lambda: model(piece)


def left_in_onnxruntime(engine: Path) -> dict[str, int]:
    """What ONNX Runtime's optimized graph of an engine still converts, and which weighted nodes run in float."""
    onnxruntime = require("onnxruntime")
    with tempfile.TemporaryDirectory(prefix="deploykit-optimized-") as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(*KEEP_FLOAT_WEIGHTS)
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(str(engine), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    found: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            found[node.op_type] += 1
        elif node.op_type in ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"):
            found[f"float {node.op_type}"] += len(node.input) > 1 and node.input[1] in constants
    return {operator: count for operator, count in sorted(found.items()) if count}


def left_in_openvino(engine: Path) -> dict[str, int]:
    """What OpenVINO's compiled graph of an engine still rounds by itself, and which weighted nodes run in float."""
    core = require("openvino").Core()
    compiled = core.compile_model(core.read_model(str(engine)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        kind, precision = (str(node.get_rt_info()[key].astype(str)) for key in ("layerType", "runtimePrecision"))
        if kind == "FakeQuantize":
            found[kind] += 1
        elif kind in OPENVINO_PRODUCTS and precision not in ("i8", "u8"):
            found[f"float {kind}"] += _is_constant(node.input_value(1))
    return {operator: count for operator, count in sorted(found.items()) if count}


def _is_constant(value: Any) -> bool:
    return str(value.get_node().get_rt_info()["layerType"].astype(str)) == "Const"


OPENVINO_PRODUCTS = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul")
LEFT_IN_FLOAT: dict[str, Callable[[Path], dict[str, int]]] = {
    "onnxruntime": left_in_onnxruntime,
    "openvino": left_in_openvino,
    "torch_compile": left_in_float,
}
"""The runtimes whose optimized graph, or generated code, can be read."""
