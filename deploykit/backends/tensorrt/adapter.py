"""TensorRT: opens a plan on the NVIDIA GPU that it was built for, or builds it there from a portable bundle."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from deploykit.arrays import FloatArray, ImageArray, Images
from deploykit.backends.engine_file import EngineFile
from deploykit.backends.input_checks import check_shape, check_tensor
from deploykit.backends.runtime import Runtime, machine, version_key
from deploykit.backends.tensorrt import api
from deploykit.backends.tensorrt.cuda_buffers import CudaBuffers, buffers_for
from deploykit.backends.tensorrt.cuda_driver import cuda_capabilities, gpu_identity
from deploykit.backends.tensorrt.plan_file import check_plan
from deploykit.backends.tensorrt.portable import is_portable, local_plan
from deploykit.backends.tensorrt.protocols import Context, CudaEvent, Engine, PlanRuntime
from deploykit.errors import BundleError, DeployKitError, DeviceUnavailable, IncompatibleEngine, SpecError
from deploykit.optional import require

if TYPE_CHECKING:
    from torch import Tensor as TorchTensor

    from deploykit.bundle import Manifest

__all__ = ["TensorRTRuntime", "cuda_capabilities"]

AMPERE = 80
"""The compute capability, times ten, of the oldest GPU that an ``ampere_plus`` plan runs on."""

_DEVICE = re.compile(r"cuda(?::(\d+))?")


class _Lane:
    """One execution context with its buffers, used by one thread at a time."""

    def __init__(self, context: Context, buffers: CudaBuffers) -> None:
        self.context = context
        self.buffers = buffers
        self.finished: CudaEvent | None = None  # the end of a run on the caller's own stream


class TensorRTRuntime(Runtime):
    """A TensorRT plan; as many execution contexts as threads ever called at once.

    Arrays and CPU tensors are copied to the GPU and the outputs back. A CUDA tensor is read where
    it is, on the caller's current stream, and gives CUDA tensors; it is not searched for NaN, which
    would stop the stream. ``cuda_graphs=True`` replays a recorded graph of kernels, in TensorRT-RTX.
    """

    def __init__(self, manifest: Manifest, folder: Path, *, cuda_graphs: bool = False, **options: Any) -> None:
        self._cuda_graphs = cuda_graphs
        self._lock = threading.Lock()
        self._idle: deque[_Lane] = deque()
        self._engine: Engine | None = None
        self._trt_runtime: PlanRuntime | None = None
        super().__init__(manifest, folder, **options)
        self._options["cuda_graphs"] = cuda_graphs

    def _open(self, engine: EngineFile, device: str) -> str:
        self._ordinal = self._find_device(engine, device)
        manifest = self.manifest
        with ExitStack() as kept:
            if is_portable(manifest):
                manifest, folder = kept.enter_context(local_plan(manifest, engine, gpu_identity(self._ordinal)))
                engine = EngineFile(manifest, folder)
            self._check_capability(manifest)
            plan = engine.read()
        self._flavour = manifest.requires.get("flavour", self.backend.package.module)
        check_plan(plan, self._flavour, manifest.runtime_version)
        self._first_buffers: CudaBuffers | None = buffers_for(self._ordinal)
        self._trt = trt = api.load_tensorrt(self._flavour)
        self._first_buffers.activate()
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._trt_runtime = runtime = trt.Runtime(self._logger)
        if self._is_version_compatible:
            runtime.engine_host_code_allowed = True  # the plan carries the runtime of its own version
        self._engine = opened = runtime.deserialize_cuda_engine(plan)
        if opened is None:
            raise IncompatibleEngine(
                f"{self._flavour} {trt.__version__} refuses the plan {engine.name}. "
                "A plan is tied to the exact version and GPU: export the bundle again for this machine."
            )
        self._check_tensors(opened, engine)
        self._idle.append(self._make_lane())
        return f"cuda:{self._ordinal}" if self._ordinal else "cuda"

    def __call__(self, images: Images) -> Any:
        """Run the engine; a CUDA tensor without a copy. See `Runtime` for shapes and errors."""
        if not _is_cuda_tensor(images):
            return super().__call__(images)
        if self._closed or os.getpid() != self._process:
            raise self._unusable()
        outputs = self._run_on_gpu(images)
        return dict(zip(self._output_names, outputs, strict=True)) if self._features_only else outputs[0]

    def _run(self, images: ImageArray) -> list[FloatArray]:
        outputs: list[FloatArray] = []
        with self._lane() as lane:
            buffers, context = lane.buffers, lane.context
            if lane.finished is not None:
                lane.finished.synchronize()
            self._set_shape(context, tuple(images.shape))
            context.set_tensor_address(self.input_spec.name, buffers.upload(self.input_spec.name, images))
            for name in self._output_names:
                outputs.append(np.empty(tuple(context.get_tensor_shape(name)), np.float32))
                context.set_tensor_address(name, buffers.reserve(name, outputs[-1].nbytes))
            self._execute(context, buffers.stream, tuple(images.shape))
            for name, output in zip(self._output_names, outputs, strict=True):
                buffers.download(name, output)
            buffers.synchronize()
        return outputs

    def _run_on_gpu(self, images: TorchTensor) -> list[TorchTensor]:
        """Read a CUDA tensor where it is; new CUDA tensors, ready on the caller's current stream."""
        torch = require("torch")
        images = self._check_cuda_tensor(images)
        stream = torch.cuda.current_stream(images.device)
        outputs = []
        with self._lane() as lane:
            context = lane.context
            if lane.finished is not None:
                stream.wait_event(lane.finished)
            self._set_shape(context, tuple(images.shape))
            context.set_tensor_address(self.input_spec.name, images.data_ptr())
            for name in self._output_names:
                shape = tuple(context.get_tensor_shape(name))
                outputs.append(torch.empty(shape, dtype=torch.float32, device=images.device))
                context.set_tensor_address(name, outputs[-1].data_ptr())
            self._execute(context, stream.cuda_stream, tuple(images.shape))
            lane.finished = torch.cuda.Event()
            lane.finished.record(stream)
        return outputs

    def _close(self) -> None:
        with self._lock:
            while self._idle:
                lane = self._idle.pop()
                del lane.context  # before its engine
                with suppress(DeployKitError):  # a GPU that is lost holds no memory
                    lane.buffers.close()
            self._engine = None
            self._trt_runtime = None

    def seen_on(self) -> dict[str, str]:
        """Return the machine, its GPU, driver and CUDA, and the package that ran the plan."""
        return (
            machine() | {"device": self.device, self._flavour: str(self._trt.__version__)} | gpu_identity(self._ordinal)
        )

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """``cuda``, and ``cuda:1`` and so on, where there are NVIDIA GPUs and their driver; nothing elsewhere."""
        flavour = api.default_flavour()
        require(flavour, api.PACKAGES[flavour])
        return tuple(f"cuda:{index}" if index else "cuda" for index in range(len(cuda_capabilities())))

    def _check_version(self) -> None:
        """Refuse another package or version; a portable bundle is tied to none."""
        if is_portable(self.manifest):
            return
        flavour = self.manifest.requires.get("flavour", self.backend.package.module)
        if flavour not in api.installed_flavours():
            raise IncompatibleEngine(
                f"this plan was built with {flavour}, and here is {', '.join(api.installed_flavours())}: neither opens "
                f"the other's plans. Install {flavour}=={self.manifest.runtime_version}, or export the bundle again "
                "here, or once with portable=True (--portable) for every device."
            )
        built, here = self.manifest.runtime_version, api.flavour_version(flavour)
        if self._is_version_compatible and _opens_newer(built, here):
            return
        if built != here:
            raise IncompatibleEngine(
                f"this plan was built with {flavour} {built} and {here} is installed here; it needs exactly {built}. "
                f"Install {api.PACKAGES[flavour].build}=={built.partition('+')[0]}, or export the bundle again here."
            )

    @property
    def _is_version_compatible(self) -> bool:
        return self.manifest.requires.get("version_compatible") == "on"

    def _find_device(self, engine: EngineFile, device: str) -> int:
        """Return the ordinal of the GPU asked for."""
        found = cuda_capabilities()
        match = _DEVICE.fullmatch("cuda" if device == "auto" else device.lower())
        ordinal = int(match.group(1) or 0) if match else len(found)
        if ordinal >= len(found):
            built_for = _built_for(self.manifest)
            here = f"the GPUs are {', '.join(found)}" if found else "there is no CUDA device"
            what = "the graph" if is_portable(self.manifest) else "the plan"
            raise DeviceUnavailable(
                f"{what} {engine.name} was built, but it can only be opened on a machine with an NVIDIA GPU of "
                f"compute capability {built_for}; here {here}, and {device!r} was asked for. Copy the "
                "bundle to such a machine and open it there, or export for another runtime to run here."
            )
        return ordinal

    def _check_capability(self, manifest: Manifest) -> None:
        built_for = manifest.requires.get("compute_capability")
        here = cuda_capabilities()[self._ordinal]
        if manifest.requires.get("hardware_compatibility") == "ampere_plus":
            if int(here.removeprefix("sm")) >= AMPERE:
                return
            built_for = _built_for(manifest)
        if built_for is not None and built_for != here:
            raise IncompatibleEngine(
                f"this plan was built for compute capability {built_for} and the GPU here has {here}. "
                f"Export the bundle again with target={here!r}, or with portable=True (--portable)."
            )

    def _check_tensors(self, opened: Engine, engine: EngineFile) -> None:
        """Compare the plan's inputs and outputs with the manifest's."""
        found = {opened.get_tensor_name(index) for index in range(opened.num_io_tensors)}
        missing = {self.input_spec.name, *self._output_names} - found
        if missing:
            raise BundleError(
                f"{engine.name} has the tensors {', '.join(sorted(found))}; the manifest names also "
                f"{', '.join(sorted(missing))}. The engine is not the one that the manifest describes: export again."
            )

    @contextmanager
    def _lane(self) -> Iterator[_Lane]:
        """Give an idle context, or one more; one that failed is not used again."""
        try:
            lane = self._idle.pop()
        except IndexError:
            lane = self._make_lane()
        lane.buffers.activate()
        try:
            yield lane
        except BaseException:
            with suppress(DeployKitError):
                lane.buffers.close()
            raise
        self._idle.append(lane)

    def _make_lane(self) -> _Lane:
        with self._lock:
            if self._engine is None:
                raise self._unusable()
            buffers, self._first_buffers = self._first_buffers or buffers_for(self._ordinal), None
            context = self._make_context(self._engine)
        if context is None:
            raise DeployKitError(
                "TensorRT made no execution context: the GPU's memory is full. Close other models, or call from "
                "fewer threads."
            )
        return _Lane(context, buffers)

    def _make_context(self, engine: Engine) -> Context | None:
        if not self._cuda_graphs:
            return engine.create_execution_context()
        strategy = getattr(self._trt, "CudaGraphStrategy", None)
        if strategy is None:
            raise SpecError(
                f"cuda_graphs=True was given, and {self._flavour} {self._trt.__version__} does not record graphs by "
                "itself; TensorRT-RTX does. Leave it out."
            )
        config = engine.create_runtime_config()
        config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE
        return engine.create_execution_context(config)

    def _set_shape(self, context: Context, shape: tuple[int, ...]) -> None:
        if not context.set_input_shape(self.input_spec.name, shape):
            raise DeployKitError(
                f"TensorRT refuses images of shape {shape}, and the manifest's input is {self.input_spec.shape}. "
                "Export the bundle again for this machine."
            )

    def _execute(self, context: Context, stream: int, shape: tuple[int, ...]) -> None:
        if not context.execute_async_v3(stream):
            raise DeployKitError(
                f"TensorRT failed to run images of shape {shape}. Export the bundle again for this machine."
            )

    def _check_cuda_tensor(self, images: TorchTensor) -> TorchTensor:
        if images.device.index != self._ordinal:
            here = f"cuda:{self._ordinal}"
            raise SpecError(f"the images are on {images.device}, and the engine is on {here}. Use images.to({here!r}).")
        check_tensor(images, self.input_spec)
        check_shape(tuple(images.shape), self.input_spec)
        return images.detach().contiguous()


def _built_for(manifest: Manifest) -> str:
    """Return the compute capabilities that a bundle opens on, for a message."""
    if manifest.requires.get("hardware_compatibility") == "ampere_plus":
        return f"sm{AMPERE} or newer"
    return manifest.requires.get("compute_capability", "any")


def _opens_newer(built: str, here: str) -> bool:
    """Whether a version-compatible plan of one version opens in another: the same major version, and not older."""
    return version_key(here)[:1] == version_key(built)[:1] and version_key(here) >= version_key(built)


def _is_cuda_tensor(images: object) -> TypeGuard[TorchTensor]:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(images, torch.Tensor) and images.is_cuda
