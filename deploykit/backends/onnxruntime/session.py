"""The one place that makes ONNX Runtime sessions on the CPU for deploykit's own work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from deploykit.arrays import Array
from deploykit.backends.onnxruntime.package import load_onnxruntime
from deploykit.backends.onnxruntime.protocols import OnnxRuntimePackage, OrtOptions, OutputBinding, Session
from deploykit.optional import require
from deploykit.threads import thread_limit

if TYPE_CHECKING:
    import onnx_ir as ir

KEEP_FLOAT_WEIGHTS = ("optimization.disable_specified_optimizers", "WeightBiasQuantization")
"""Without it ONNX Runtime quantizes, with one scale per tensor, each float convolution between two Q/DQ pairs:
the layers that a plan keeps in float because they lose most (21 dB became 7 dB on EfficientNet-Lite0)."""

STOP_SPINNING = ("session.force_spinning_stop", "1")
"""Threads spin during a call, where that saves their waking up, and sleep after it. By default they go on for a while
and take the cores from whatever else the process does."""

LOG_ERRORS = 3


class OrtSession:
    """An opened graph; every call gives new arrays."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def run(self, outputs: Sequence[str] | None, feeds: Mapping[str, Array]) -> list[Array]:
        """Compute outputs by name (None: all) from inputs by name."""
        return self._session.run(outputs, feeds)

    def run_path(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """Compute outputs, and nothing that they do not need."""
        options = load_onnxruntime().RunOptions()
        options.only_execute_path_to_fetches = True
        return self._session.run(outputs, feeds, options)

    def repeated(self, outputs: Sequence[str]) -> RepeatedRun:
        """Return a call that computes outputs by name, each time into the same arrays."""
        return RepeatedRun(self._session, outputs)

    def end_profiling(self) -> Path:
        """Write the profile; returns its file."""
        return Path(self._session.end_profiling())


class RepeatedRun:
    """Computes outputs into the arrays of the call before, where inputs have the same shapes.

    New arrays for all tensors of a network would cost more time than some of its layers.
    """

    def __init__(self, session: Session, outputs: Sequence[str]) -> None:
        self._session = session
        self._outputs = outputs
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._binding: OutputBinding | None = None
        self._arrays: list[Array] = []

    def __call__(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Return the outputs, which the next call writes over."""
        shapes = {name: values.shape for name, values in feeds.items()}
        if self._binding is None or shapes != self._shapes:
            self._arrays, self._shapes = self._session.run(self._outputs, feeds), shapes
            self._binding = self._session.io_binding()
            for name, values in zip(self._outputs, self._arrays, strict=True):
                self._binding.bind_output(
                    name, element_type=values.dtype.type, shape=values.shape, buffer_ptr=values.ctypes.data
                )
            return self._arrays
        for name, values in feeds.items():
            self._binding.bind_cpu_input(name, np.ascontiguousarray(values))
        self._session.run_with_iobinding(self._binding)
        return self._arrays


def ort_session(
    model: ir.Model | Path, *, optimize: bool = True, optimized_to: Path | None = None, profile_to: Path | None = None
) -> OrtSession:
    """Open a graph or an ONNX file on the CPU.

    Args:
        model: the graph, or the file; external weights lie beside a file.
        optimize: False runs each node as it is written.
        optimized_to: where to write the optimized graph.
        profile_to: the prefix of the profile that ``end_profiling()`` writes.
    """
    onnxruntime = load_onnxruntime()
    options = session_options(onnxruntime, thread_limit())
    options.add_session_config_entry(*KEEP_FLOAT_WEIGHTS)
    options.add_session_config_entry(*STOP_SPINNING)
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized_to is not None:
        options.optimized_model_filepath = str(optimized_to)
    if profile_to is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_to)
    return OrtSession(onnxruntime.InferenceSession(_source(model), options, providers=["CPUExecutionProvider"]))


def session_options(onnxruntime: OnnxRuntimePackage, threads: int | None) -> OrtOptions:
    """Return options that compute in ``threads``; None: one for each core of the machine, each on its own.

    With a number ONNX Runtime ties no thread to a processor, which it otherwise does also where this process may not
    use that processor.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = LOG_ERRORS
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _source(model: ir.Model | Path) -> str | bytes:
    if isinstance(model, Path):
        return str(model)
    serialized: bytes = require("onnx_ir").to_proto(model).SerializeToString()
    return serialized


def float16_converter() -> ModuleType:
    """Return the package's module that casts a graph to FP16."""
    return require("onnxruntime.transformers.float16")
