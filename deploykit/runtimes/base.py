"""What every runtime adapter shares: checks on the way in, copies on the way out, closing, threads.

An adapter is one class in one file with three methods: `_open`, `_run`, `_close`.
"""

from __future__ import annotations

import importlib
import re
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from deploykit.errors import DeployKitError, IncompatibleEngine, SpecError, nearest
from deploykit.optional import installed_version, require
from deploykit.spec import FeatureInfo, InputSpec, Precision, parse_precision

if TYPE_CHECKING:
    import torch

    from deploykit.bundle import Manifest

FloatArray: TypeAlias = npt.NDArray[np.float32]
Images: TypeAlias = "npt.NDArray[Any] | torch.Tensor"

RUNTIMES: dict[str, str] = {
    "torch_compile": "deploykit.runtimes.run_inductor:InductorRuntime",
    "onnxruntime": "deploykit.runtimes.run_onnxruntime:OnnxRuntime",
    "openvino": "deploykit.runtimes.run_openvino:OpenVINORuntime",
    "tensorrt": "deploykit.runtimes.run_tensorrt:TensorRTRuntime",
}
"""Runtimes that open an engine from a bundle. ``torch`` is the module itself: see run_torch.py."""


class Runtime(ABC):
    """A backbone behind one runtime, called like the torch module.

    ``model(images)`` takes ``(N, C, H, W)`` float32, normalised as ``input_spec.preprocessing``
    says. NumPy in gives NumPy out, torch in gives torch out (on the CPU). With ``features_only``
    the result is a dict from level name to ``(N, C, H/stride, W/stride)``; otherwise
    ``(N, num_classes)`` logits, or the ``(N, D)`` embedding. The caller owns every returned
    buffer. Calls are safe from several threads.

    Raises:
        DeviceUnavailable: the device asked for is not here.
        IncompatibleEngine: the engine was built by a runtime version that this one cannot read.
    """

    runtime: ClassVar[str]
    package: ClassVar[str]
    version_policy: ClassVar[Literal["exact", "same_or_newer"]]
    precisions: ClassVar[tuple[str, ...]]

    def __init__(self, manifest: Manifest, folder: Path, *, device: str = "auto") -> None:
        require(self.package)
        self.manifest = manifest
        self.input_spec: InputSpec = manifest.input
        self.feature_info = FeatureInfo(manifest.backbone.levels)
        self.precision: Precision = parse_precision(manifest.precision, manifest.precision_settings)
        self._output_names = tuple(output.name for output in manifest.outputs)
        self._features_only = manifest.backbone.features_only
        self._sample_shape = self.input_spec.shape[1:]
        self._closed = False
        self._check_version()
        self.device = self._open(folder / manifest.engine, device)

    @abstractmethod
    def _open(self, engine: Path, device: str) -> str:
        """Load the engine file; return the device that it runs on."""

    @abstractmethod
    def _run(self, images: FloatArray) -> list[FloatArray]:
        """Run once, from any thread; new arrays in the order of the manifest's outputs."""

    @abstractmethod
    def _close(self) -> None:
        """Give the engine's memory back."""

    @classmethod
    @abstractmethod
    def devices(cls) -> tuple[str, ...]:
        """The devices of this machine that the runtime can use; needs the package."""

    def __call__(self, images: Images) -> Any:
        """Run the engine; see the class for shapes.

        Raises:
            SpecError: wrong type, rank, layout, size, dtype or batch, NaN or infinity in the
                images, or the model is closed.
            DeployKitError: the runtime itself failed; its error is chained.
        """
        if self._closed:
            raise self._closed_error()
        array, to_caller = (images, None) if isinstance(images, np.ndarray) else _from_torch(images)
        array = check_images(array, self.input_spec)
        try:
            outputs: list[Any] = self._run(array)
        except (DeployKitError, MemoryError):
            raise
        except Exception as error:
            # Runtimes raise classes of their own, which share no base.
            if self._closed:
                raise self._closed_error() from error
            raise DeployKitError(
                f"{self.package} failed to run the engine on {self.device}: {error}. "
                "Export the bundle again; deploykit verify says whether the engine ever ran."
            ) from error
        if to_caller is not None:
            outputs = [to_caller(output) for output in outputs]
        if self._features_only:
            return dict(zip(self._output_names, outputs, strict=True))
        return outputs[0]

    def close(self) -> None:
        """Give the engine's memory back; calling twice is harmless."""
        if not self._closed:
            self._closed = True
            self._close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<{self.manifest.backbone.name} in {self.runtime} {self.manifest.precision} on {self.device}, "
            f"images {self.input_spec.shape}>"
        )

    def _closed_error(self) -> SpecError:
        return SpecError(f"this {self.runtime} model is closed. Open the bundle again with load_bundle().")

    def _check_version(self) -> None:
        built, here = self.manifest.runtime_version, installed_version(self.package) or "unknown"
        usable = built == here if self.version_policy == "exact" else version_key(here) >= version_key(built)
        if not usable:
            relation = "exactly" if self.version_policy == "exact" else "at least"
            raise IncompatibleEngine(
                f"this engine was built with {self.package} {built} and {here} is installed here; it needs {relation} "
                f"{built}. Install {self.package}=={built.partition('+')[0]}, or export the bundle again here."
            )


def run_in_batches(model: Runtime, images: FloatArray) -> dict[str, FloatArray]:
    """Run a model over any number of images in batches that it takes; every output by name.

    A last partial batch is filled up by repeating its images, and the surplus is cut off.
    """
    batch = model.input_spec.batch
    size = batch if isinstance(batch, int) else min(batch.max, max(batch.min, 4))
    parts: list[dict[str, FloatArray]] = []
    for start in range(0, len(images), size):
        piece = images[start : start + size]
        filled = piece[np.arange(size) % len(piece)]
        outputs = model(filled)
        named = outputs if isinstance(outputs, dict) else {model.manifest.outputs[0].name: outputs}
        parts.append({name: output[: len(piece)] for name, output in named.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def version_key(version: str) -> tuple[int, ...]:
    """``"2026.4.1+cpu"`` to ``(2026, 4, 1)``, for ordering; a part that is no number ends it."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def load_runtime(name: str) -> type[Runtime]:
    """The adapter class of a runtime.

    Raises:
        SpecError: no such runtime.
    """
    if name not in RUNTIMES:
        raise SpecError(f"unknown runtime {name!r}. {nearest(name, ['torch', *RUNTIMES])}")
    module, _, attribute = RUNTIMES[name].partition(":")
    adapter: type[Runtime] = getattr(importlib.import_module(module), attribute)
    return adapter


def check_images(images: npt.NDArray[Any], spec: InputSpec) -> FloatArray:
    """The images as one contiguous float32 array, or an error that says what is wrong with them.

    Raises:
        SpecError: wrong rank, layout, size, dtype or batch, or NaN or infinity.
    """
    expected = f"{spec.shape} float32 {spec.layout}"
    if images.dtype != np.float32:
        hint = (
            "decode and normalise first: deploykit.load_images(files, model.input_spec)"
            if images.dtype == np.uint8
            else "convert with .astype(np.float32)"
        )
        raise SpecError(f"the images are {images.dtype}; expected {expected}. To mend it, {hint}.")
    if images.ndim != 4:
        hint = " Add the batch dimension: images[None]." if images.ndim == 3 else ""
        raise SpecError(f"the images have shape {images.shape}; expected {expected}.{hint}")
    if images.shape[1:] != (spec.channels, spec.height, spec.width):
        hint = ""
        if images.shape[1:] == (spec.height, spec.width, spec.channels):
            hint = " These look like NHWC: use images.transpose(0, 3, 1, 2)."
        raise SpecError(f"the images have shape {images.shape}; expected {expected}.{hint}")
    if not spec.accepts_batch(images.shape[0]):
        raise SpecError(
            f"the batch has {images.shape[0]} images and the model takes {spec.batch}. "
            "Export with batch_size='dynamic' (or a range) for other batches."
        )
    images = np.ascontiguousarray(images)
    flat = images.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        # One pass without a temporary: a NaN or an infinity anywhere shows in the sum of squares.
        energy = np.dot(flat, flat)
    if not np.isfinite(energy) and not np.isfinite(images).all():
        bad = [int(index) for index in np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))]
        raise SpecError(f"the images hold NaN or infinity (in batch positions {bad}); expected finite values.")
    return images


def _from_torch(images: Any) -> tuple[npt.NDArray[Any], Any]:
    """A torch tensor as an array that shares its memory, and the way back."""
    torch_module = sys.modules.get("torch")
    if torch_module is None or not isinstance(images, torch_module.Tensor):
        raise SpecError(
            f"the images are a {type(images).__name__}; expected a numpy.ndarray or a torch.Tensor. "
            "Files are read with deploykit.load_images(files, model.input_spec)."
        )
    if images.dtype != torch_module.float32 or images.layout != torch_module.strided:
        raise SpecError(
            f"the images are a {images.layout} tensor of {images.dtype}; expected a dense tensor of torch.float32. "
            "To mend it, convert with .to_dense() and .float()."
        )
    device = images.device
    return images.detach().cpu().numpy(), lambda output: torch_module.from_numpy(output).to(device)
