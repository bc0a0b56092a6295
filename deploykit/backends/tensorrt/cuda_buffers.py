"""Memory and a stream on one GPU, through torch where torch is there, through cuda-python where it is not."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Protocol

import numpy as np

from deploykit.arrays import Array
from deploykit.errors import DeployKitError, MissingDependency
from deploykit.optional import PACKAGES, installed_version, require

if TYPE_CHECKING:
    from torch import Tensor


class CudaBuffers(Protocol):
    """Named buffers of one execution context, and the stream that it runs on; used by one thread at a time."""

    stream: int

    def activate(self) -> None:
        """Make the GPU the current one of the calling thread."""
        ...

    def reserve(self, name: str, size: int) -> int:
        """Return the address of a buffer of at least ``size`` bytes, kept for the next call."""
        ...

    def upload(self, name: str, array: Array) -> int:
        """Copy a contiguous array to its buffer on the stream; returns the address."""
        ...

    def download(self, name: str, array: Array) -> None:
        """Copy a buffer into a contiguous array, once the stream gets there."""
        ...

    def synchronize(self) -> None:
        """Wait for the stream."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


def buffers_for(ordinal: int) -> CudaBuffers:
    """Buffers on a GPU.

    Raises:
        MissingDependency: neither a torch with CUDA nor cuda-python is installed.
    """
    if torch_has_cuda():
        return TorchBuffers(ordinal)
    if _has_cuda_python():
        return CudaPythonBuffers(ordinal)
    command = PACKAGES["cuda"].command
    raise MissingDependency(
        "running a TensorRT plan needs buffers on the GPU, which deploykit takes from a torch with CUDA or from "
        f"cuda-python; neither is installed. Install the lighter one: {command}",
        package="cuda",
        command=command,
    )


def torch_has_cuda() -> bool:
    """Return whether torch is installed and can use a GPU here."""
    return installed_version("torch") is not None and bool(require("torch").cuda.is_available())


def _has_cuda_python() -> bool:
    try:
        return importlib.util.find_spec("cuda.bindings.runtime") is not None
    except ModuleNotFoundError:
        return False


class TorchBuffers:
    """Buffers from torch's caching allocator."""

    def __init__(self, ordinal: int) -> None:
        self._torch = require("torch")
        self._device = self._torch.device("cuda", ordinal)
        self._stream = self._torch.cuda.Stream(self._device)
        self.stream: int = self._stream.cuda_stream
        self._held: dict[str, Tensor] = {}

    def activate(self) -> None:
        """Make the GPU the current one of the calling thread."""
        self._torch.cuda.set_device(self._device)

    def reserve(self, name: str, size: int) -> int:
        """Return the address of a buffer of at least ``size`` bytes."""
        held = self._held.get(name)
        if held is None or held.numel() < size:
            with self._torch.cuda.stream(self._stream):
                held = self._held[name] = self._torch.empty(size, dtype=self._torch.uint8, device=self._device)
        return int(held.data_ptr())

    def upload(self, name: str, array: Array) -> int:
        """Copy an array to its buffer."""
        address = self.reserve(name, array.nbytes)
        flat = array.reshape(-1).view(np.uint8)
        source = self._torch.from_numpy(flat if flat.flags.writeable else flat.copy())
        with self._torch.cuda.stream(self._stream):
            self._held[name][: array.nbytes].copy_(source)
        return address

    def download(self, name: str, array: Array) -> None:
        """Copy a buffer into an array."""
        with self._torch.cuda.stream(self._stream):
            self._torch.from_numpy(array.reshape(-1).view(np.uint8)).copy_(self._held[name][: array.nbytes])

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()

    def close(self) -> None:
        """Give the memory back to torch's allocator."""
        self._held.clear()


class CudaPythonBuffers:
    """Buffers from the CUDA runtime itself, for devices without torch."""

    def __init__(self, ordinal: int) -> None:
        self._cuda = require("cuda.bindings.runtime")
        self._ordinal = ordinal
        self.activate()
        self.stream = self._call("cudaStreamCreate")
        self._held: dict[str, tuple[int, int]] = {}

    def activate(self) -> None:
        """Make the GPU the current one of the calling thread."""
        self._call("cudaSetDevice", self._ordinal)

    def reserve(self, name: str, size: int) -> int:
        """Return the address of a buffer of at least ``size`` bytes."""
        address, held = self._held.get(name, (0, 0))
        if held < size:
            if address:
                self._call("cudaFree", self._held.pop(name)[0])
            address = self._call("cudaMalloc", size)
            self._held[name] = (address, size)
        return address

    def upload(self, name: str, array: Array) -> int:
        """Copy an array to its buffer."""
        address = self.reserve(name, array.nbytes)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.stream)
        return address

    def download(self, name: str, array: Array) -> None:
        """Copy a buffer into an array."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, self._held[name][0], array.nbytes, kind, self.stream)

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call("cudaStreamSynchronize", self.stream)

    def close(self) -> None:
        """Free every buffer and the stream."""
        self.activate()
        for address, _ in self._held.values():
            self._call("cudaFree", address)
        self._held.clear()
        self._call("cudaStreamDestroy", self.stream)

    def _call(self, function: str, *arguments: object) -> int:
        """Call the CUDA runtime; its one result, an address; 0 where it gives none.

        Raises:
            DeployKitError: the call failed.
        """
        status, *results = getattr(self._cuda, function)(*arguments)
        if int(status) != 0:
            name = getattr(status, "name", str(status))
            raise DeployKitError(
                f"{function} failed with {name}. Check the GPU and its driver with nvidia-smi (tegrastats on a Jetson)."
            )
        return int(results[0]) if results else 0
