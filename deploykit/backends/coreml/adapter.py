"""Core ML: opens ``model.mlpackage`` on macOS, on the CPU, the GPU and the Neural Engine."""

from __future__ import annotations

import platform
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from deploykit.arrays import Array, FloatArray, ImageArray
from deploykit.backends.coreml.mil_program import INT32, Feature, MilProgram
from deploykit.backends.coreml.package import PACKAGE, PACKAGE_FOLDER, SYSTEMS
from deploykit.backends.engine_file import EngineFile
from deploykit.backends.runtime import Runtime
from deploykit.errors import BundleError, DeviceUnavailable, IncompatibleEngine, SpecError
from deploykit.optional import require

if TYPE_CHECKING:
    from deploykit.manifest import Manifest

COMPUTE_UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "ane": "CPU_AND_NE"}
"""Devices, each with the member of ``coremltools.ComputeUnit`` that allows it.

Core ML computes on the CPU what the GPU or the Neural Engine does not have; ``all`` leaves the choice to it.
"""


class Model(Protocol):
    """What is used of ``coremltools.models.MLModel``."""

    def predict(self, data: dict[str, Array]) -> dict[str, Array]:
        """Run once; inputs and outputs by name."""
        ...


class CoreMLRuntime(Runtime):
    """An ML program in Core ML.

    A model serves one thread at a time and makes others wait. An engine for a dynamic batch holds a network of one
    image, which runs once for each. Core ML chooses its own number of threads.
    """

    def _open(self, engine: EngineFile, device: str) -> str:
        name = "all" if device == "auto" else device.lower()
        if name not in self.devices():
            raise DeviceUnavailable(
                f"coreml has no device {device!r} here; it has {', '.join(self.devices()) or 'none'}. "
                "Open the bundle with one of them, or with device='auto'."
            )
        if self._options["threads"] is not None:
            raise SpecError("Core ML chooses its own number of threads. Leave threads out.")
        source = check_ends(MilProgram(engine.parts(), PACKAGE_FOLDER), self.manifest)
        self._batch, self._dtype = source.shape[0], np.int32 if source.dtype == INT32 else np.float32
        self._model: Model | None = _load(Path(engine).parent, COMPUTE_UNITS[name])
        self._lock = threading.Lock()
        return name

    def _run(self, images: ImageArray) -> list[FloatArray]:
        with self._lock:
            if self._model is None:
                raise self._unusable()
            parts = [
                self._run_once(self._model, images[start : start + self._batch])
                for start in range(0, len(images), self._batch)
            ]
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    def _run_once(self, model: Model, images: ImageArray) -> list[FloatArray]:
        outputs = model.predict({self.input_spec.name: np.ascontiguousarray(images, self._dtype)})
        return [np.asarray(outputs[name], np.float32) for name in self._output_names]

    def _close(self) -> None:
        with self._lock:
            self._model = None

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """Return ``all``, ``cpu``, and ``gpu`` and ``ane`` where this Mac has them; nothing on other systems."""
        if platform.system() not in SYSTEMS:
            return ()
        found = require("coremltools.models.compute_device", PACKAGE)
        kinds = {type(device) for device in found.MLComputeDevice.get_all_compute_devices()}
        present = {"gpu": found.MLGPUComputeDevice in kinds, "ane": found.MLNeuralEngineComputeDevice in kinds}
        return tuple(name for name in COMPUTE_UNITS if present.get(name, True))


def check_ends(program: MilProgram, manifest: Manifest) -> Feature:
    """Return the input of a package whose input and outputs are those of a manifest.

    Raises:
        BundleError: they are others.
    """
    expected, (source, *others) = manifest.input, program.inputs or (None,)
    sample = expected.shape[1:]
    if source is None or others or source.name != expected.name or source.shape[1:] != sample:
        found = ", ".join(f"{feature.name} {feature.shape}" for feature in program.inputs) or "none"
        raise BundleError(
            f"{PACKAGE_FOLDER} has the inputs {found}; the manifest describes {expected.name} ('batch', "
            f"{', '.join(map(str, sample))}). The engine is not the one that the manifest describes: "
            "export the bundle again."
        )
    names = {feature.name for feature in program.outputs}
    missing = [output.name for output in manifest.outputs if output.name not in names]
    if missing:
        raise BundleError(
            f"{PACKAGE_FOLDER} has the outputs {', '.join(sorted(names))}; the manifest names also "
            f"{', '.join(missing)}. The engine is not the one that the manifest describes: export the bundle again."
        )
    return source


def _load(package: Path, units: str) -> Model:
    """Let Core ML compile and load a package.

    Raises:
        IncompatibleEngine: it refuses it; this macOS is older than the package needs, or the package is damaged.
    """
    library: Any = require("coremltools", PACKAGE)
    with warnings.catch_warnings():
        # coremltools only warns where Core ML refuses a model, and fails at the first call.
        warnings.filterwarnings("error", message="You will not be able to run predict", category=RuntimeWarning)
        try:
            model: Model = library.models.MLModel(str(package), compute_units=getattr(library.ComputeUnit, units))
        except (RuntimeError, RuntimeWarning, ValueError) as error:
            raise IncompatibleEngine(
                f"Core ML of macOS {platform.mac_ver()[0]} does not load {package.name}: {error}. "
                "Packages need macOS 14 or newer; update it, or export the bundle again."
            ) from error
    return model
