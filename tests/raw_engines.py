"""A graph in a runtime itself, without an adapter: every output by name."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import openvino

from deploykit.backends.onnxruntime.session import ort_session


def by_onnxruntime(model, feeds):
    names = [str(value.name) for value in model.graph.outputs]
    return dict(zip(names, ort_session(model).run(names, feeds), strict=True))


def by_openvino(model, feeds):
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(ir.to_proto(model).SerializeToString(), b""), "CPU", settings)
    results = compiled(feeds)
    return {str(value.name): np.array(results[compiled.output(str(value.name))]) for value in model.graph.outputs}


RUNS = {"onnxruntime": by_onnxruntime, "openvino": by_openvino}
