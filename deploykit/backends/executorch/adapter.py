"""ExecuTorch: opens ``model.pte`` on the CPU."""

from __future__ import annotations

import threading

import numpy as np

from deploykit.arrays import FloatArray, ImageArray
from deploykit.backends.engine_file import EngineFile
from deploykit.backends.executorch.package import PACKAGE, load_library
from deploykit.backends.executorch.protocols import Library, Method, Program
from deploykit.backends.executorch.thread_pool import Lease, lease_pool
from deploykit.backends.runtime import Runtime
from deploykit.errors import BundleError, DeviceUnavailable, IncompatibleEngine
from deploykit.optional import installed_version, require

FORWARD = "forward"
"""The method that computes."""

INPUT_NAME, OUTPUT_NAMES = "input_name", "output_names"
"""Methods that take nothing and return strings: ExecuTorch has inputs and outputs by position alone."""


class ExecuTorchRuntime(Runtime):
    """A .pte file in ExecuTorch's C++ runtime, whose kernels are XNNPACK's.

    A method serves one thread at a time and makes others wait, so calls from several threads are safe and run one
    after another. An engine for a dynamic batch holds a network of one image, which runs once for each.
    """

    def _open(self, engine: EngineFile, device: str) -> str:
        name = "cpu" if device == "auto" else device.lower()
        if name != "cpu":
            raise DeviceUnavailable(
                f"executorch runs here on cpu, and {device!r} was asked for. Open the bundle with device='cpu'."
            )
        library = load_library()
        self._content = engine.read()  # the program reads its constants there
        program = _program(library, self._content, engine)
        asked = self._options["threads"] is not None
        self._lease: Lease | None = lease_pool(library, self.threads or self._cores(), asked=asked)
        self.threads = self._lease.threads
        method = _method(program, engine)
        self._batch = _check_input(program, method, self.input_spec.name, self._sample_shape, engine)
        self._order = _check_outputs(program, method, self._output_names, engine)
        self._from_numpy = require("torch").from_numpy
        self._method: Method | None = method
        self._lock = threading.Lock()
        return name

    def _run(self, images: ImageArray) -> list[FloatArray]:
        contiguous = np.require(images, requirements=["C", "W"])  # torch warns at memory that it may not write
        with self._lock:
            method = self._method
            if method is None:
                raise self._unusable()
            parts = [
                self._run_once(method, contiguous[start : start + self._batch])
                for start in range(0, len(contiguous), self._batch)
            ]
        if len(parts) == 1:
            return parts[0]
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    def _run_once(self, method: Method, images: ImageArray) -> list[FloatArray]:
        outputs = method.call([self._from_numpy(images)])
        return [np.ascontiguousarray(outputs[position].numpy()) for position in self._order]

    def _close(self) -> None:
        with self._lock:
            self._method = self._lease = None
            self._content = b""

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """Return ``cpu``: the Python package has no other delegate that needs no vendor's libraries."""
        load_library()
        return ("cpu",)


def _program(library: Library, content: bytes, engine: EngineFile) -> Program:
    """Open a program.

    Raises:
        BundleError: it is no .pte file, or a damaged one.
    """
    if content[4:6] != b"ET":
        raise BundleError(
            f"{engine.name} is not an ExecuTorch program: its identifier is {content[4:8]!r}; expected b'ET12'. "
            "Export the bundle again, or copy it again."
        )
    try:
        return library._load_program_from_buffer(content, program_verification=library.Verification.InternalConsistency)
    except RuntimeError as error:
        raise BundleError(
            f"{engine.name} is not a readable ExecuTorch program ({error}). Export the bundle again, or copy it again."
        ) from error


def _method(program: Program, engine: EngineFile) -> Method:
    """Load the method that computes.

    Raises:
        IncompatibleEngine: an operator, or a delegate's operator, that this version does not have.
    """
    try:
        return program.load_method(FORWARD)
    except RuntimeError as error:
        raise IncompatibleEngine(
            f"executorch {installed_version(PACKAGE.module, PACKAGE)} does not prepare {engine.name}: {error}. "
            "Install the executorch that the manifest names, or export the bundle again here."
        ) from error


def _names(program: Program, method: str) -> tuple[str, ...]:
    """Return the strings of a method; none where the program has no such method."""
    try:
        return tuple(str(name) for name in program.load_method(method).call([]))
    except RuntimeError:
        return ()


def _check_input(program: Program, method: Method, name: str, sample: tuple[int | str, ...], engine: EngineFile) -> int:
    """Return the batch of the program, whose images have the name and the size that the manifest says."""
    meta = method.method_meta()
    shapes = [tuple(meta.input_tensor_meta(index).sizes()) for index in range(meta.num_inputs())]
    names = _names(program, INPUT_NAME)
    if names != (name,) or len(shapes) != 1 or shapes[0][1:] != sample:
        found = ", ".join(f"{key} {shape}" for key, shape in zip(names or ("?",), shapes, strict=False)) or "none"
        raise BundleError(
            f"{engine.name} has the inputs {found}; the manifest describes {name} ('batch', "
            f"{', '.join(map(str, sample))}). The engine is not the one that the manifest describes: "
            "export the bundle again."
        )
    return int(shapes[0][0])


def _check_outputs(program: Program, method: Method, expected: tuple[str, ...], engine: EngineFile) -> tuple[int, ...]:
    """Return the position of each output of the manifest."""
    names = _names(program, OUTPUT_NAMES)
    missing = [name for name in expected if name not in names]
    if missing or len(names) != method.method_meta().num_outputs():
        raise BundleError(
            f"{engine.name} has the outputs {', '.join(names) or 'of no name'}; the manifest names "
            f"{', '.join(missing or expected)}. The engine is not the one that the manifest describes: "
            "export the bundle again."
        )
    return tuple(names.index(name) for name in expected)
