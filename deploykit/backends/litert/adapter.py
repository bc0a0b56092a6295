"""LiteRT: opens ``model.tflite`` on the CPU; integers at its ends are quantized and dequantized here."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from deploykit.arrays import Array, FloatArray, ImageArray
from deploykit.backends.engine_file import EngineFile
from deploykit.backends.litert.package import PACKAGE, load_interpreter
from deploykit.backends.runtime import Runtime
from deploykit.errors import BundleError, DeviceUnavailable, IncompatibleEngine
from deploykit.optional import installed_version


class Interpreter(Protocol):
    """What is used of ``ai_edge_litert.interpreter.Interpreter``."""

    def allocate_tensors(self) -> None:
        """Prepare the kernels and their memory."""

    def set_tensor(self, index: int, value: Array) -> None:
        """Copy an input in."""

    def invoke(self) -> None:
        """Compute."""

    def get_tensor(self, index: int) -> Array:
        """Copy an output out."""
        ...

    def get_signature_list(self) -> dict[str, dict[str, list[str]]]:
        """Return the names of the inputs and outputs of each signature."""
        ...

    def get_signature_runner(self, signature_key: str) -> Any:
        """Return what has ``get_input_details`` and ``get_output_details``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Port:
    """An input or an output of an engine: its tensor, and how its integers stand for floats, where it has integers."""

    index: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    scale: float
    zero_point: int

    def encode(self, images: ImageArray) -> Array:
        """Return what the engine reads: the images, rounded where it takes int8."""
        if self.dtype != np.int8 or images.dtype != np.float32:
            return np.ascontiguousarray(images)
        steps: FloatArray = np.rint(images * np.float32(1 / self.scale))
        steps += self.zero_point
        np.clip(steps, -128, 127, out=steps)
        return steps.astype(np.int8)

    def decode(self, output: Array) -> FloatArray:
        """Return an output in float32."""
        if self.dtype != np.int8:
            return np.asarray(output, np.float32)
        floats = output.astype(np.float32)
        floats -= self.zero_point
        floats *= np.float32(self.scale)
        return floats


class LiteRTRuntime(Runtime):
    """A .tflite file in LiteRT's interpreter, whose default kernels are XNNPACK's.

    An interpreter serves one thread at a time and makes others wait, so calls from several threads are safe and run
    one after another. An engine for a dynamic batch holds a network of one image, which runs once for each.
    """

    def _open(self, engine: EngineFile, device: str) -> str:
        name = "cpu" if device == "auto" else device.lower()
        if name != "cpu":
            raise DeviceUnavailable(
                f"litert runs here on cpu, and {device!r} was asked for. Open the bundle with device='cpu'. GPUs and "
                "NPUs are for apps, which give the same model.tflite to LiteRT's own interfaces."
            )
        interpreter = _interpreter(engine, self._cores())  # given no number, LiteRT computes in one thread
        runner = interpreter.get_signature_runner(_only_signature(interpreter, engine))
        inputs = _ports(runner.get_input_details())
        outputs = _ports(runner.get_output_details())
        self._input = _only_input(inputs, self.input_spec.name, self._sample_shape, engine)
        self._outputs = _named_outputs(outputs, self._output_names, engine)
        self._batch = self._input.shape[0]
        self._interpreter: Interpreter | None = interpreter
        self._lock = threading.Lock()
        return name

    def _run(self, images: ImageArray) -> list[FloatArray]:
        with self._lock:
            interpreter = self._interpreter
            if interpreter is None:
                raise self._unusable()
            parts = [
                self._run_once(interpreter, images[start : start + self._batch])
                for start in range(0, len(images), self._batch)
            ]
        if len(parts) == 1:
            return parts[0]
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    def _run_once(self, interpreter: Interpreter, images: ImageArray) -> list[FloatArray]:
        interpreter.set_tensor(self._input.index, self._input.encode(images))
        interpreter.invoke()
        return [port.decode(interpreter.get_tensor(port.index)) for port in self._outputs]

    def _close(self) -> None:
        with self._lock:
            self._interpreter = None

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """Return ``cpu``: the Python package has no other kernels that keep an engine's numbers."""
        load_interpreter()
        return ("cpu",)


def _interpreter(engine: EngineFile, threads: int) -> Interpreter:
    """Return an interpreter with its memory allocated.

    Raises:
        BundleError: no .tflite file.
        IncompatibleEngine: an operator that this version does not have.
    """
    library = load_interpreter()
    content = engine.read()
    if content[4:8] != b"TFL3":
        raise BundleError(
            f"{engine.name} is not a LiteRT model: its identifier is {content[4:8]!r}; expected b'TFL3'. "
            "Export the bundle again, or copy it again."
        )
    try:
        interpreter: Interpreter = library.Interpreter(model_content=content, num_threads=threads)
    except (ValueError, RuntimeError) as error:
        raise BundleError(
            f"{engine.name} is not a readable LiteRT model ({error}). Export the bundle again, or copy it again."
        ) from error
    try:
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise IncompatibleEngine(
            f"ai-edge-litert {installed_version(PACKAGE.module, PACKAGE)} does not prepare {engine.name}: {error}. "
            "Install the ai-edge-litert that the manifest names, or export the bundle again here."
        ) from error
    return interpreter


def _ports(details: dict[str, dict[str, Any]]) -> dict[str, Port]:
    ports = {}
    for name, detail in details.items():
        scale, zero_point = detail["quantization"]
        shape = tuple(int(size) for size in detail["shape"])
        ports[name] = Port(
            index=detail["index"],
            shape=shape,
            dtype=np.dtype(detail["dtype"]),
            scale=float(scale),
            zero_point=int(zero_point),
        )
    return ports


def _only_signature(interpreter: Interpreter, engine: EngineFile) -> str:
    signatures = list(interpreter.get_signature_list())
    if len(signatures) != 1:
        raise BundleError(
            f"{engine.name} has {len(signatures)} signatures; expected one. The engine is not one that deploykit "
            "wrote: export the bundle again."
        )
    return signatures[0]


def _only_input(ports: dict[str, Port], name: str, sample: tuple[int | str, ...], engine: EngineFile) -> Port:
    """Return the port of the images, of the size that the manifest says."""
    port = ports.get(name)
    if port is None or port.shape[1:] != sample:
        found = ", ".join(f"{key} {value.shape}" for key, value in ports.items()) or "none"
        raise BundleError(
            f"{engine.name} has the inputs {found}; the manifest describes {name} ('batch', "
            f"{', '.join(map(str, sample))}). The engine is not the one that the manifest describes: "
            "export the bundle again."
        )
    return port


def _named_outputs(ports: dict[str, Port], expected: tuple[str, ...], engine: EngineFile) -> tuple[Port, ...]:
    missing = [name for name in expected if name not in ports]
    if missing:
        raise BundleError(
            f"{engine.name} has the outputs {', '.join(ports)}; the manifest names also {', '.join(missing)}. "
            "The engine is not the one that the manifest describes: export the bundle again."
        )
    return tuple(ports[name] for name in expected)
