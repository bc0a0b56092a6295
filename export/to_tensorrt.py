"""Graph -> TensorRT-RTX plan, built in a subprocess on any x86-64 machine, with or without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import deploykit
from deploykit.errors import ExportError, nearest
from deploykit.export.lowering import TARGETS, Engine, Graph
from deploykit.export.onnx_file import model_of, write_onnx
from deploykit.optional import installed_version, require
from deploykit.spec import BatchRange, InputSpec

if TYPE_CHECKING:
    import onnx

CAPABILITIES = TARGETS["tensorrt"]
"""The compute capabilities that TensorRT-RTX builds for; sm75 takes no FP32 matrix product."""

DEFAULT_CAPABILITY = "sm86"
BUILD_SECONDS = 600.0
"""A build that takes longer is stopped. Builds were measured at 0.1 to 7 s."""

_LOG_LINES = 12
_CHANGED_TYPE = re.compile(r"defaulting to \w+ instead|cast(ing)? down|does not natively support", re.IGNORECASE)
_REFUSED_OPERATORS = re.compile(r"QLinear\w*|\w+Integer|DynamicQuantizeLinear")
_INT8 = 3  # onnx.TensorProto.INT8


def to_tensorrt(graph: Graph, folder: Path, *, target: str | None = None, time_limit: float = BUILD_SECONDS) -> Engine:
    """Build ``model.plan`` for one compute capability, strongly typed, without TF32.

    Args:
        graph: its ONNX model's Q/DQ nodes, if any, are signed INT8 with zero point 0.
        folder: where the plan goes; nothing is left there when the build fails.
        target: the GPU's compute capability, one of `CAPABILITIES`; None: `DEFAULT_CAPABILITY`.
        time_limit: in seconds.

    Raises:
        ExportError: an unknown target, Q/DQ nodes or operators that TensorRT refuses or reads
            wrongly, or a build that failed, crashed or took too long; with the end of its log.
    """
    require("tensorrt_rtx")
    capability = target or DEFAULT_CAPABILITY
    if capability not in CAPABILITIES:
        raise ExportError(f"unknown TensorRT target {capability!r}. {nearest(capability, CAPABILITIES)}")
    model = model_of(graph, "tensorrt")
    check_quantization(model)
    with tempfile.TemporaryDirectory(prefix="deploykit-tensorrt-") as staging:
        work = Path(staging)
        write_onnx(model, work / "model.onnx")
        _build(work, graph.input, capability, time_limit)
        (folder / "model.plan").write_bytes((work / "model.plan").read_bytes())
    version = installed_version("tensorrt_rtx") or "unknown"
    return Engine(
        file="model.plan",
        runtime_version=version,
        requires={"compute_capability": capability},
        tools={"onnx": installed_version("onnx") or "unknown", "tensorrt_rtx": version},
    )


def check_quantization(model: onnx.ModelProto) -> None:
    """Refuse what TensorRT refuses, or what it reads as another type without saying so.

    Raises:
        ExportError: naming each node: QLinear, Integer and dynamic operators; a zero point that is
            missing (ONNX then means uint8), is not INT8, or is not 0.
    """
    numpy_helper = require("onnx.numpy_helper")
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    faults = []
    for node in model.graph.node:
        where = f"{node.op_type} {node.name or node.output[0]!r}"
        if _REFUSED_OPERATORS.fullmatch(node.op_type):
            faults.append(f"{where}: the operator is refused")
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero_point = constants.get(node.input[2]) if len(node.input) > 2 else None
            if zero_point is None:
                if node.op_type == "QuantizeLinear" and not _writes_int8(node):
                    faults.append(f"{where}: no zero point is written, which means uint8")
            elif zero_point.data_type != _INT8:
                faults.append(f"{where}: the zero point is not INT8")
            elif numpy_helper.to_array(zero_point).any():
                faults.append(f"{where}: the zero point is not 0")
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ExportError(
            f"TensorRT takes Q/DQ nodes only as signed INT8 with zero point 0; found {'; '.join(faults[:8])}{more}. "
            "Quantize with the tensorrt dialect."
        )


def _writes_int8(node: onnx.NodeProto) -> bool:
    return any(attribute.name == "output_dtype" and attribute.i == _INT8 for attribute in node.attribute)


def _build(work: Path, spec: InputSpec, capability: str, time_limit: float) -> None:
    """Run the builder in ``work``, which holds ``model.onnx``; leaves ``model.plan`` there."""
    request = {
        "model": str(work / "model.onnx"),
        "plan": str(work / "model.plan"),
        "capability": capability,
        "input": spec.name,
        "profile": _profile(spec),
    }
    (work / "request.json").write_text(json.dumps(request))
    package_parent = str(Path(str(deploykit.__file__)).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package_parent, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "deploykit.export.tensorrt_builder", str(work / "request.json")]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=time_limit, env=environment, check=False
        )
    except subprocess.TimeoutExpired as error:
        log = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else error.stderr or ""
        raise ExportError(
            f"the TensorRT build took more than {time_limit:g} s and was stopped. Try a smaller model or batch range."
            f"{_tail(log)}"
        ) from error
    log = done.stdout + done.stderr
    changed = [line for line in log.splitlines() if _CHANGED_TYPE.search(line)]
    if changed:
        raise ExportError(
            f"TensorRT would change a type in the graph, and with it the numbers: {changed[0].strip()} "
            "Quantize with the tensorrt dialect, or keep INT64 and FP64 out of the graph."
        )
    if done.returncode != 0 or not (work / "model.plan").is_file():
        how = f"crashed (signal {-done.returncode})" if done.returncode < 0 else "failed"
        raise ExportError(
            f"the TensorRT build for {capability} {how}. The end of its log names the node; "
            f"export for onnxruntime to see whether the graph itself runs.{_tail(log)}"
        )


def _profile(spec: InputSpec) -> list[list[int]] | None:
    """The min, opt and max shape of a dynamic batch; None for a fixed one."""
    if not isinstance(spec.batch, BatchRange):
        return None
    rest = [spec.channels, spec.height, spec.width]
    return [[count, *rest] for count in (spec.batch.min, spec.batch.opt, spec.batch.max)]


def _tail(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return "".join(f"\n  {line}" for line in lines[-_LOG_LINES:])
