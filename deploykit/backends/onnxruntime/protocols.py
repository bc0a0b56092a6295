"""What deploykit calls of the package onnxruntime, which has no types of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from deploykit.arrays import Array


class NodeArg(Protocol):
    """An input or output of a graph."""

    name: str


class OrtOptions(Protocol):
    """``onnxruntime.SessionOptions``."""

    log_severity_level: int
    intra_op_num_threads: int
    graph_optimization_level: object
    optimized_model_filepath: str
    enable_profiling: bool
    profile_file_prefix: str

    def add_session_config_entry(self, key: str, value: str) -> None:
        """Set one of the keys of onnxruntime_session_options_config_keys.h."""
        ...

    def add_provider_for_devices(self, devices: Sequence[EpDevice], options: Mapping[str, str]) -> None:
        """Run on devices of an execution provider that is a plugin."""
        ...


class HardwareDevice(Protocol):
    """``onnxruntime.OrtHardwareDevice``."""

    type: object


class EpDevice(Protocol):
    """``onnxruntime.OrtEpDevice``: an execution provider on a device."""

    ep_name: str
    device: HardwareDevice


class OrtRunOptions(Protocol):
    """``onnxruntime.RunOptions``."""

    only_execute_path_to_fetches: bool


class OutputBinding(Protocol):
    """``onnxruntime.IOBinding``."""

    def bind_cpu_input(self, name: str, values: Array) -> None:
        """Read an input from an array."""
        ...

    def bind_output(self, name: str, *, element_type: type, shape: Sequence[int], buffer_ptr: int) -> None:
        """Write an output to memory of the processor, which holds its elements in its shape."""
        ...


class Session(Protocol):
    """``onnxruntime.InferenceSession``."""

    _model_bytes: bytes | None

    def run(
        self, outputs: Sequence[str] | None, feeds: Mapping[str, Array], options: OrtRunOptions | None = None
    ) -> list[Array]:
        """Compute outputs by name (None: all); new arrays."""
        ...

    def io_binding(self) -> OutputBinding:
        """Return where a call is to read and to write."""
        ...

    def run_with_iobinding(self, binding: OutputBinding) -> None:
        """Compute what is bound."""
        ...

    def get_outputs(self) -> Sequence[NodeArg]:
        """Return the graph's outputs in order."""
        ...

    def get_providers(self) -> Sequence[str]:
        """Return the active execution providers, first the preferred one."""
        ...

    def end_profiling(self) -> str:
        """Write the profile; its path."""
        ...


class OptimizationLevels(Protocol):
    """``onnxruntime.GraphOptimizationLevel``."""

    ORT_DISABLE_ALL: object


class HardwareTypes(Protocol):
    """``onnxruntime.OrtHardwareDeviceType``."""

    NPU: object


class OnnxRuntimePackage(Protocol):
    """The module onnxruntime; what plugins need is there from 1.23 on."""

    __version__: str
    OrtHardwareDeviceType: HardwareTypes
    GraphOptimizationLevel: OptimizationLevels

    def SessionOptions(self) -> OrtOptions:  # noqa: N802  (the package's name)
        """Return the defaults."""
        ...

    def RunOptions(self) -> OrtRunOptions:  # noqa: N802
        """Return the defaults."""
        ...

    def InferenceSession(  # noqa: N802
        self,
        model: str | bytes,
        options: OrtOptions,
        *,
        providers: Sequence[str | tuple[str, Mapping[str, str]]] = (),
        enable_fallback: int = 1,
    ) -> Session:
        """Open a file, by its path, or its bytes."""
        ...

    def register_execution_provider_library(self, name: str, library: str) -> None:
        """Load a plugin's library under a name, once in a process."""
        ...

    def get_ep_devices(self) -> Sequence[EpDevice]:
        """Return every execution provider, on each of its devices."""
        ...

    def get_available_providers(self) -> Sequence[str]:
        """Return the execution providers that this build carries."""
        ...
