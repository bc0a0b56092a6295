"""Builds one TensorRT-RTX plan; run as a process of its own, because a build can end the process.

``python -m deploykit.export.tensorrt_builder REQUEST.json``, where the request has ``model`` (an
ONNX file), ``plan`` (the file to write), ``capability`` (``sm86``), ``input`` (its name) and
``profile`` (min, opt and max shape, or null when every shape is fixed). Warnings and errors go to
stderr, one a line, after their severity. Exit status: 0 the plan was written, 1 it was not.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from deploykit.optional import require


def main(request_file: str) -> int:
    """Build what the request asks for; 0 on success."""
    request: dict[str, Any] = json.loads(Path(request_file).read_text())
    trt = require("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.WARNING)  # writes to stderr
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["model"]):
        for index in range(parser.num_errors):
            error = parser.get_error(index)
            _say(f"parser: {error.desc()} (node {error.node_name()!r}, {error.node_operator()})")
        return 1
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.num_compute_capabilities = 1
    capability = getattr(trt.ComputeCapability, request["capability"].upper())
    if not config.set_compute_capability(capability, 0):
        _say(f"the compute capability {request['capability']} was refused")
        return 1
    if request["profile"] is not None:
        profile = builder.create_optimization_profile()
        profile.set_shape(request["input"], *(tuple(shape) for shape in request["profile"]))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        _say("no plan came out of the build")
        return 1
    Path(request["plan"]).write_bytes(plan)
    return 0


def _say(message: str) -> None:
    sys.stderr.write(f"[builder] {message}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
