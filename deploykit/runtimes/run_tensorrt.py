"""TensorRT-RTX: opens a plan on the NVIDIA GPU that it was built for."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any, ClassVar, Literal

from deploykit.errors import BundleError, DeployKitError, DeviceUnavailable, IncompatibleEngine, MissingDependency
from deploykit.optional import installed_version, require
from deploykit.runtimes.base import FloatArray, Runtime

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # cuda.h: CUdevice_attribute


class TensorRTRuntime(Runtime):
    """A TensorRT plan, with one execution context behind a lock.

    Images are copied to the GPU and outputs back from it, through torch's CUDA allocator.
    """

    runtime: ClassVar[str] = "tensorrt"
    package: ClassVar[str] = "tensorrt_rtx"
    version_policy: ClassVar[Literal["exact", "same_or_newer"]] = "exact"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "int8")

    def _open(self, engine: Path, device: str) -> str:
        built_for = self.manifest.requires.get("compute_capability", "the one it was built for")
        if device not in ("auto", "cuda") or not cuda_capabilities():
            raise DeviceUnavailable(
                f"the plan {engine.name} was built, but it can only be opened on a machine with an NVIDIA GPU of "
                f"compute capability {built_for}; here {_describe_devices()}, and {device!r} was asked for. Copy the "
                "bundle to such a machine and open it there, or export for onnxruntime or openvino to run here."
            )
        self._check_capability()
        self._torch = _torch_with_cuda()
        trt = require("tensorrt_rtx")
        self._lock = threading.Lock()
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._trt_runtime: Any = trt.Runtime(self._logger)
        self._engine: Any = self._trt_runtime.deserialize_cuda_engine(_read(engine))
        if self._engine is None:
            raise IncompatibleEngine(
                f"TensorRT-RTX {trt.__version__} refuses the plan {engine.name}. "
                "A plan is tied to the exact version and GPU: export the bundle again for this machine."
            )
        self._context: Any = self._engine.create_execution_context()
        self._stream = self._torch.cuda.Stream()
        return "cuda"

    def _run(self, images: FloatArray) -> list[FloatArray]:
        torch, context = self._torch, self._context
        with self._lock, torch.cuda.stream(self._stream):
            source = torch.from_numpy(images).to("cuda")
            context.set_input_shape(self.input_spec.name, images.shape)
            context.set_tensor_address(self.input_spec.name, source.data_ptr())
            outputs = []
            for name in self._output_names:
                shape = tuple(context.get_tensor_shape(name))
                outputs.append(torch.empty(shape, dtype=torch.float32, device="cuda"))
                context.set_tensor_address(name, outputs[-1].data_ptr())
            if not context.execute_async_v3(self._stream.cuda_stream):
                raise DeployKitError(
                    f"TensorRT refused to run images of shape {images.shape}. Export the bundle again for this machine."
                )
            return [output.cpu().numpy() for output in outputs]

    def _close(self) -> None:
        with self._lock:
            self._context = None
            self._engine = None
            self._trt_runtime = None

    def _check_capability(self) -> None:
        built_for = self.manifest.requires.get("compute_capability")
        here = cuda_capabilities()[0]
        if built_for is not None and built_for != here:
            raise IncompatibleEngine(
                f"this plan was built for compute capability {built_for} and the GPU here has {here}. "
                f"Export the bundle again with target={here!r}."
            )

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """``cuda`` where there is an NVIDIA GPU and its driver; nothing elsewhere."""
        require("tensorrt_rtx")
        return ("cuda",) if cuda_capabilities() else ()


def cuda_capabilities() -> tuple[str, ...]:
    """The compute capability of each CUDA device, as ``sm86``; empty without a GPU or a driver.

    Asks the driver only: TensorRT's runtime can end the process where there is no GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    found = []
    for ordinal in range(count.value):
        device, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
        driver.cuDeviceGet(ctypes.byref(device), ordinal)
        driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
        found.append(f"sm{major.value}{minor.value}")
    return tuple(found)


def _describe_devices() -> str:
    found = cuda_capabilities()
    return f"the GPUs are {', '.join(found)}" if found else "there is no CUDA device"


def _torch_with_cuda() -> Any:
    if installed_version("torch") is not None:
        torch = require("torch")
        if torch.cuda.is_available():
            return torch
    raise MissingDependency(
        "running a TensorRT plan needs buffers on the GPU, which deploykit takes from torch; no torch with CUDA is "
        "installed, and the lighter way through cuda-python is not built yet. Install it: pip install torch",
        package="torch",
        command="pip install torch",
    )


def _read(engine: Path) -> bytes:
    try:
        return engine.read_bytes()
    except OSError as error:
        raise BundleError(f"the plan {engine.name} cannot be read ({error}). Copy the bundle again.") from error
