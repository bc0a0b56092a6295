"""OpenVINO: opens ``model.xml`` on the one device asked for, with the inference precision pinned."""

from __future__ import annotations

from collections import deque
from functools import partial

from deploykit.arrays import FloatArray, ImageArray
from deploykit.backends.engine_file import EngineFile
from deploykit.backends.fork_guard import ForkGuard
from deploykit.backends.openvino.package import load_openvino
from deploykit.backends.openvino.protocols import CompiledModel, InferRequest, Model, OVCore
from deploykit.backends.openvino.read_error import REFUSALS, read_error
from deploykit.backends.openvino.request_queue import RequestQueue
from deploykit.backends.runtime import RUNS_AHEAD, Runtime
from deploykit.errors import BundleError, DeviceUnavailable, IncompatibleEngine

_RUNS = ForkGuard()
"""Forks wait for runs: in a child that was forked while a thread entered TBB's pool, opening an engine would hang."""


class OpenVINORuntime(Runtime):
    """An OpenVINO IR, compiled for latency or for throughput.

    A call takes an idle infer request, or makes one more, so the number of requests grows to the
    number of threads that ever called at once. The images are read where they are, without a
    copy; outputs are copied out of the request, so the caller owns them.
    """

    def _open(self, engine: EngineFile, device: str) -> str:
        openvino = load_openvino()
        core = openvino.Core()
        target = "CPU" if device == "auto" else device.upper()
        if f"{target}.0" in core.available_devices:
            target = f"{target}.0"  # with two GPUs OpenVINO lists GPU.0 and GPU.1, and no GPU
        if target not in core.available_devices:
            raise DeviceUnavailable(
                f"OpenVINO has no device {device!r} here; it has {', '.join(self.devices()) or 'none'}. "
                "Choose one of these, or install the driver of the device."
            )
        config: dict[str, object] = {
            **self.open_options,
            "INFERENCE_PRECISION_HINT": _pinned_precision(core, target, self.precision.name),
            "PERFORMANCE_HINT": self.hint.upper(),
        }
        if target == "CPU" and self.threads is not None:
            # Tied to processors, the threads of two processes that share a machine would meet on the same ones.
            config |= {"INFERENCE_NUM_THREADS": self.threads, "ENABLE_CPU_PINNING": False}
        if target == "CPU" and self.streams is not None:
            config["NUM_STREAMS"] = self.streams
        model = _read(core, engine)
        try:
            compiled = core.compile_model(model, target, config)
        except REFUSALS as error:
            raise IncompatibleEngine(
                f"OpenVINO {openvino.__version__} does not compile {engine.name} for {target}: {read_error(error)}. "
                "Install the openvino that the manifest names, or export the bundle again here."
            ) from error
        _check_device(compiled, target)
        self._outputs = _output_positions(compiled, self._output_names, engine)
        self._compiled: CompiledModel | None = compiled
        self._idle: deque[InferRequest] = deque([compiled.create_infer_request()])
        if self.hint == "throughput":
            self.in_flight = RUNS_AHEAD * compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        return target.lower()

    def _run(self, images: ImageArray) -> list[FloatArray]:
        compiled = self._compiled
        if compiled is None:
            raise self._unusable()
        try:
            request = self._idle.pop()
        except IndexError:
            request = compiled.create_infer_request()
        # OpenVINO wraps only writeable memory; it does not write to an input.
        with _RUNS:
            results = request.infer([images], share_inputs=images.flags.writeable)
        outputs = [results[position] for position in self._outputs]
        self._idle.append(request)
        return outputs

    def _queue(self, in_flight: int) -> RequestQueue:
        if self._compiled is None:
            raise self._unusable()
        tensor = partial(load_openvino().Tensor, shared_memory=True)
        return RequestQueue(self._compiled, self._outputs, in_flight, tensor)

    def _close(self) -> None:
        self._compiled = None
        self._idle.clear()

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """OpenVINO's devices on this machine: ``cpu``, ``gpu``, ``gpu.1``, ``npu``."""
        return tuple(name.lower() for name in load_openvino().Core().available_devices)


def _pinned_precision(core: OVCore, target: str, precision: str) -> str:
    """Return the inference precision: that of the graph, which OpenVINO would otherwise choose by itself."""
    if precision == "bf16":
        capabilities = core.get_property(target, "OPTIMIZATION_CAPABILITIES")
        if "BF16" not in capabilities:
            raise DeviceUnavailable(
                f"OpenVINO's {target} lists {', '.join(capabilities)} and not BF16, which this engine needs. "
                "Export it with precision='fp32' or 'int8' for this device."
            )
        return "bf16"
    if precision == "fp16" and target != "CPU":
        return "f16"
    return "f32"


def _check_device(compiled: CompiledModel, target: str) -> None:
    """Refuse a model that OpenVINO put on another device than the one asked for."""
    used = [str(name).strip("()") for name in compiled.get_property("EXECUTION_DEVICES")]
    if used != [target]:
        raise DeviceUnavailable(
            f"OpenVINO was asked for {target} and compiled the model for {', '.join(used)}. "
            "Check the driver of the device, or name another with device=."
        )


def _read(core: OVCore, engine: EngineFile) -> Model:
    """Return the IR as a model, whose weights OpenVINO copies.

    Raises:
        BundleError: no IR, or its weights are missing or too short.
    """
    if not engine.read()[:64].lstrip().startswith((b"<?xml", b"<net")):
        raise BundleError(
            f"{engine.name} is not an OpenVINO IR: it does not start with an XML declaration. "
            "Export the bundle again, or copy it again."
        )
    weights = engine.parts().get(f"{engine.name.removesuffix('.xml')}.bin", b"")
    try:
        return core.read_model(engine.read(), weights)
    except REFUSALS as error:
        raise BundleError(
            f"{engine.name} is not a readable OpenVINO IR ({read_error(error)}). "
            "Export the bundle again, or copy it again."
        ) from error


def _output_positions(compiled: CompiledModel, expected: tuple[str, ...], engine: EngineFile) -> tuple[int, ...]:
    """Return where each output of the manifest stands among the engine's."""
    try:
        found = [set(output.names) for output in compiled.outputs]
    except UnicodeDecodeError as error:
        raise BundleError(
            f"{engine.name} has an output whose name is no UTF-8. Export the bundle again, or copy it again."
        ) from error
    missing = [name for name in expected if not any(name in names for names in found)]
    if missing:
        raise BundleError(
            f"{engine.name} has the outputs {', '.join(sorted(set().union(*found)))}; the manifest names also "
            f"{', '.join(missing)}. The engine is not the one that the manifest describes: export the bundle again."
        )
    return tuple(next(i for i, names in enumerate(found) if name in names) for name in expected)
