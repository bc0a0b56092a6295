"""What deploykit calls of the package openvino, whose own types do not go through `require`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, Protocol, overload

from deploykit.arrays import Array, FloatArray


class Value(Protocol):
    """An ``openvino.OVAny`` of a node's runtime information."""

    def astype(self, kind: type[str]) -> object:
        """Return the value in a type of Python's."""
        ...


class Node(Protocol):
    """``openvino.Node``."""

    def get_friendly_name(self) -> str:
        """Return the name that people see."""
        ...

    def set_friendly_name(self, name: str) -> None:
        """Rename the node."""
        ...

    def get_type_name(self) -> str:
        """Return the operator."""
        ...

    def get_rt_info(self) -> Mapping[str, Value]:
        """Return what the plugin notes of a compiled node."""
        ...

    def input_value(self, position: int) -> Output:
        """Return what the node reads."""
        ...


class Output(Protocol):
    """``openvino.Output``: a tensor, with all its names."""

    names: Collection[str]

    def get_node(self) -> Node:
        """Return the node that writes it."""
        ...


class Shape(Protocol):
    """``openvino.PartialShape``."""


class OVDimension(Protocol):
    """``openvino.Dimension``."""


class Model(Protocol):
    """``openvino.Model``."""

    def reshape(self, shapes: Mapping[str, Shape | list[int]]) -> None:
        """Set the shapes of inputs by name."""
        ...

    def get_ordered_ops(self) -> Sequence[Node]:
        """Return the nodes, each behind those that it reads."""
        ...

    def set_friendly_name(self, name: str) -> None:
        """Rename the model."""
        ...


class InferRequest(Protocol):
    """``openvino.InferRequest``, used by one thread at a time."""

    def infer(self, inputs: Sequence[Array], *, share_inputs: bool) -> Mapping[int, FloatArray]:
        """Compute the outputs by position."""
        ...

    def set_input_tensor(self, tensor: OVTensor) -> None:
        """Let the one input be read from this tensor."""
        ...

    def start_async(self) -> None:
        """Start a run on the tensor that was set."""
        ...

    def wait(self) -> None:
        """Wait for the run that was started."""
        ...

    def get_output_tensor(self, position: int) -> OVTensor:
        """Return an output of the last run, in the request's own memory."""
        ...


class OVTensor(Protocol):
    """``openvino.Tensor``."""

    data: FloatArray


class CompiledModel(Protocol):
    """``openvino.CompiledModel``."""

    outputs: Sequence[Output]

    def create_infer_request(self) -> InferRequest:
        """Return a request of its own memory."""
        ...

    @overload
    def get_property(self, name: Literal["EXECUTION_DEVICES"]) -> Sequence[str]: ...
    @overload
    def get_property(self, name: Literal["OPTIMAL_NUMBER_OF_INFER_REQUESTS"]) -> int: ...

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[int, Array]:
        """Compute the outputs by position."""
        ...

    def get_runtime_model(self) -> Model:
        """Return the graph as the plugin runs it."""
        ...


class OVCore(Protocol):
    """``openvino.Core``."""

    available_devices: Sequence[str]

    def read_model(self, model: str | bytes, weights: bytes = b"") -> Model:
        """Read a file by its path, or an IR from memory."""
        ...

    def compile_model(self, model: Model, device: str, config: Mapping[str, object]) -> CompiledModel:
        """Compile a model for one device."""
        ...

    def get_property(self, device: str, name: str) -> Sequence[str]:
        """Return a property of a device that is a list of names."""
        ...


class OpenVINOPackage(Protocol):
    """The module openvino."""

    __version__: str

    def Core(self) -> OVCore:  # noqa: N802  (the package's name)
        """Return the entry point."""
        ...

    def Dimension(self, least: int, most: int = ...) -> OVDimension:  # noqa: N802
        """Return one size, or its bounds."""
        ...

    def PartialShape(self, dimensions: Sequence[OVDimension]) -> Shape:  # noqa: N802
        """Return a shape."""
        ...

    def Tensor(self, array: Array, *, shared_memory: bool) -> OVTensor:  # noqa: N802
        """Return a tensor of an array, in its memory or of a copy."""
        ...

    def save_model(self, model: Model, path: str, *, compress_to_fp16: bool) -> None:
        """Write an IR."""
        ...
