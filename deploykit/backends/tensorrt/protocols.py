"""What deploykit calls of TensorRT 10.x, 11.x and TensorRT-RTX, whose wheels have no types."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Protocol, SupportsInt

TrtPackage = ModuleType
"""The package, one of `deploykit.backends.tensorrt.api.FLAVOURS`, whose members differ by version."""


class Named(Protocol):
    """A member of one of TensorRT's enumerations."""

    name: str


class Tensor(Protocol):
    """``ITensor``."""

    dtype: Named


class Layer(Protocol):
    """``ILayer``."""

    type: object

    def get_input(self, index: int) -> Tensor:
        """Return what it reads."""
        ...

    def get_output(self, index: int) -> Tensor:
        """Return what it writes."""
        ...


class Network(Protocol):
    """``INetworkDefinition``."""

    num_layers: int

    def get_layer(self, index: int) -> Layer:
        """Return a layer."""
        ...


class Serialized(Protocol):
    """``IHostMemory``: bytes that TensorRT owns."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


class TimingCache(Protocol):
    """``ITimingCache``."""

    def serialize(self) -> Serialized:
        """Return the bytes to keep."""
        ...


class Profile(Protocol):
    """``IOptimizationProfile``."""

    def set_shape(self, name: str, least: Sequence[int], usual: Sequence[int], most: Sequence[int]) -> None:
        """Bound an input's shape."""
        ...


class Config(Protocol):
    """``IBuilderConfig``."""

    progress_monitor: object
    num_compute_capabilities: int
    hardware_compatibility_level: object

    def set_flag(self, flag: object) -> None:
        """Switch a ``BuilderFlag`` on."""
        ...

    def clear_flag(self, flag: object) -> None:
        """Switch a ``BuilderFlag`` off."""
        ...

    def add_optimization_profile(self, profile: Profile) -> int:
        """Take a profile."""
        ...

    def set_compute_capability(self, capability: object, index: int) -> bool:
        """Choose a GPU; TensorRT-RTX alone has it."""
        ...

    def create_timing_cache(self, content: bytes) -> TimingCache | None:
        """Return a cache from kept bytes."""
        ...

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        """Attach a cache; False where it was made elsewhere."""
        ...


class Builder(Protocol):
    """``IBuilder``."""

    def create_network(self, flags: SupportsInt) -> Network:
        """Return an empty network."""
        ...

    def create_builder_config(self) -> Config:
        """Return the defaults."""
        ...

    def create_optimization_profile(self) -> Profile:
        """Return an empty profile."""
        ...

    def build_serialized_network(self, network: Network, config: Config) -> Serialized | None:
        """Return a plan; None where the build failed."""
        ...


class Context(Protocol):
    """``IExecutionContext``, used by one thread at a time."""

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        """Set the shape of an input."""
        ...

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        """Return the shape of an output, once all inputs have theirs."""
        ...

    def set_tensor_address(self, name: str, address: int) -> bool:
        """Say where a tensor is on the GPU."""
        ...

    def execute_async_v3(self, stream: int) -> bool:
        """Enqueue one run."""
        ...


class RuntimeConfig(Protocol):
    """``IRuntimeConfig``, of TensorRT-RTX."""

    cuda_graph_strategy: object


class Engine(Protocol):
    """``ICudaEngine``."""

    num_io_tensors: int

    def get_tensor_name(self, index: int) -> str:
        """Return the name of an input or output."""
        ...

    def create_execution_context(self, config: RuntimeConfig = ...) -> Context | None:
        """Return a context; None where the GPU's memory is full."""
        ...

    def create_runtime_config(self) -> RuntimeConfig:
        """Return the defaults."""
        ...


class PlanRuntime(Protocol):
    """``IRuntime``."""

    engine_host_code_allowed: bool

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        """Open a plan; None where it is refused."""
        ...


class CudaEvent(Protocol):
    """``torch.cuda.Event``."""

    def record(self, stream: object) -> None:
        """Mark the end of what a stream has been given so far."""
        ...

    def synchronize(self) -> None:
        """Wait for the mark."""
        ...
