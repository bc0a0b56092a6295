"""What deploykit calls of ExecuTorch's bindings, ``executorch.extension.pybindings._C``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class TensorInfo(Protocol):
    """An input or an output of a method."""

    def sizes(self) -> tuple[int, ...]:
        """Return the shape."""
        ...


class MethodMeta(Protocol):
    """The inputs and outputs of a method, by position."""

    def num_inputs(self) -> int:
        """Return the number of inputs."""
        ...

    def input_tensor_meta(self, index: int) -> TensorInfo:
        """Describe an input; IndexError, RuntimeError: there is none, or it is no tensor."""
        ...

    def num_outputs(self) -> int:
        """Return the number of outputs."""
        ...


class Method(Protocol):
    """A loaded method, for one thread at a time."""

    def call(self, inputs: Sequence[Tensor], clone_outputs: bool = True) -> list[Tensor]:
        """Run; the outputs are new tensors, or what a constant method holds."""
        ...

    def method_meta(self) -> MethodMeta:
        """Describe the inputs and outputs."""
        ...


class Program(Protocol):
    """A program, which reads the bytes that it was opened from for as long as it lives."""

    def load_method(self, method_name: str) -> Method:
        """Load a method; RuntimeError: there is none, or one of its operators is unknown."""
        ...


class Library(Protocol):
    """The module of the bindings."""

    class Verification:
        """How thoroughly a program is checked when it is opened."""

        InternalConsistency: Library.Verification

    def _load_program_from_buffer(self, buffer: bytes, *, program_verification: Verification) -> Program: ...

    def _get_operator_names(self) -> list[str]: ...

    def _threadpool_get_thread_count(self) -> int: ...

    def _unsafe_reset_threadpool(self, num_threads: int) -> None: ...
