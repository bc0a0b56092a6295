"""What every runtime adapter shares: checks on the way in, copies on the way out, closing, threads.

An adapter is one class in one file with three methods: `_open`, `_run`, `_close`.
"""

from __future__ import annotations

import importlib
import platform
import re
import sys
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from deploykit.errors import DeployKitError, IncompatibleEngine, SaturationWarning, SpecError, nearest
from deploykit.feature_dict import Features
from deploykit.optional import installed_version, require
from deploykit.processor import read_processor, this_processor
from deploykit.spec import FeatureInfo, InputSpec, Int8, Precision, parse_precision

if TYPE_CHECKING:
    import torch

    from deploykit.bundle import Manifest

FloatArray: TypeAlias = npt.NDArray[np.float32]
ImageArray: TypeAlias = npt.NDArray[Any]
"""Float32 images or uint8 pixels, as an engine's `InputSpec` says."""
Images: TypeAlias = "ImageArray | torch.Tensor"

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
    says; or ``(N, H, W, C)`` uint8 pixels where ``input_spec.embeds_preprocessing``. NumPy in gives
    NumPy out, torch in gives torch out (on the CPU). With ``features_only``
    the result is a dict from level name to ``(N, C, H/stride, W/stride)`` (`Features`); otherwise
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
    int8_float_dtypes: ClassVar[tuple[str, ...]] = ("fp32",)
    uses_cpu: ClassVar[bool] = True

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
        self._warn_of_saturation()

    @abstractmethod
    def _open(self, engine: Path, device: str) -> str:
        """Load the engine file; return the device that it runs on."""

    @abstractmethod
    def _run(self, images: ImageArray) -> list[FloatArray]:
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
        array, to_caller = (images, None) if isinstance(images, np.ndarray) else _from_torch(images, self.input_spec)
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
            return Features(zip(self._output_names, outputs, strict=True), self.feature_info.by_index())
        return outputs[0]

    def seen_on(self) -> dict[str, str]:
        """The machine, the device and the versions that run this engine, for a bundle's manifest."""
        version = installed_version(self.package) or "unknown"
        return machine() | {"device": self.device, self.package: version}

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

    def _warn_of_saturation(self) -> None:
        """Say so where this processor may not give the numbers that the engine was compared with."""
        exact = not isinstance(self.precision, Int8) or self.precision.reduce_range
        if exact or not self.device.startswith("cpu") or not this_processor().saturates:
            return
        warnings.warn(
            f"this int8 engine has weights whose products can saturate on this processor "
            f"({this_processor().model}, without VNNI), so its outputs may differ from those it was compared with. "
            "Run deploykit verify here, or export it again for this processor: target='x86-avx2'.",
            SaturationWarning,
            stacklevel=4,
        )

    def _check_version(self) -> None:
        built, here = self.manifest.runtime_version, installed_version(self.package) or "unknown"
        usable = built == here if self.version_policy == "exact" else version_key(here) >= version_key(built)
        if not usable:
            relation = "exactly" if self.version_policy == "exact" else "at least"
            raise IncompatibleEngine(
                f"this engine was built with {self.package} {built} and {here} is installed here; it needs {relation} "
                f"{built}. Install {self.package}=={built.partition('+')[0]}, or export the bundle again here."
            )


def machine() -> dict[str, str]:
    """The operating system and the processor of this machine."""
    return {"system": f"{platform.system()} {platform.machine()}", "processor": read_processor().model}


def run_in_batches(model: Runtime, images: ImageArray) -> dict[str, FloatArray]:
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


def check_images(images: npt.NDArray[Any], spec: InputSpec) -> ImageArray:
    """The images as one contiguous array of the input's dtype, or an error that says what is wrong with them.

    Raises:
        SpecError: wrong rank, layout, size, dtype or batch, or NaN or infinity.
    """
    if images.dtype != spec.dtype:
        raise SpecError(
            f"the images are {images.dtype}; expected {_expected(spec)}. To mend it, {_cast_hint(images, spec)}."
        )
    check_shape(images.shape, spec)
    images = np.ascontiguousarray(images)
    if spec.dtype == "float32":
        _check_finite(images)
    return images


def check_shape(shape: tuple[int, ...], spec: InputSpec) -> None:
    """Refuse images of another shape than the input's.

    Raises:
        SpecError: wrong rank, layout, size or batch.
    """
    if len(shape) != 4:
        hint = " Add the batch dimension: images[None]." if len(shape) == 3 else ""
        raise SpecError(f"the images have shape {shape}; expected {_expected(spec)}.{hint}")
    if shape[1:] != spec.shape[1:]:
        raise SpecError(f"the images have shape {shape}; expected {_expected(spec)}.{_layout_hint(shape, spec)}")
    if not spec.accepts_batch(shape[0]):
        raise SpecError(
            f"the batch has {shape[0]} images and the model takes {spec.batch}. "
            "Export with batch_size='dynamic' (or a range) for other batches."
        )


def _expected(spec: InputSpec) -> str:
    return f"{spec.shape} {spec.dtype} {spec.layout}"


def _cast_hint(images: npt.NDArray[Any], spec: InputSpec) -> str:
    """What to do with images of another dtype."""
    if spec.dtype == "float32":
        if images.dtype == np.uint8:
            return "decode and normalise first: deploykit.load_images(files, model.input_spec)"
        return "convert with .astype(np.float32)"
    if images.dtype.kind == "f":
        return (
            "pass the decoded pixels, 0 to 255, without mean and std, which are inside this engine: "
            "deploykit.load_images(files, model.input_spec)"
        )
    return "convert pixels from 0 to 255 with .astype(np.uint8)"


def _layout_hint(shape: tuple[int, ...], spec: InputSpec) -> str:
    """How to turn images that stand in the other layout; empty where they do not."""
    other = (spec.as_pixels() if spec.layout == "NCHW" else spec.as_images()).shape
    if shape[1:] != other[1:]:
        return ""
    if spec.layout == "NCHW":
        return " These look like NHWC: use images.transpose(0, 3, 1, 2)."
    return " These look like NCHW: use images.transpose(0, 2, 3, 1)."


def _check_finite(images: FloatArray) -> None:
    flat = images.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        # One pass without a temporary: a NaN or an infinity anywhere shows in the sum of squares.
        energy = np.dot(flat, flat)
    if not np.isfinite(energy) and not np.isfinite(images).all():
        bad = [int(index) for index in np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))]
        raise SpecError(f"the images hold NaN or infinity (in batch positions {bad}); expected finite values.")


def check_tensor(images: Any, spec: InputSpec) -> Any:
    """Refuse what is not a dense torch tensor of the input's dtype; returns the module torch.

    Raises:
        SpecError: no tensor, a sparse one, or one of another dtype.
    """
    torch_module = sys.modules.get("torch")
    if torch_module is None or not isinstance(images, torch_module.Tensor):
        raise SpecError(
            f"the images are a {type(images).__name__}; expected a numpy.ndarray or a torch.Tensor. "
            "Files are read with deploykit.load_images(files, model.input_spec)."
        )
    if images.dtype != getattr(torch_module, spec.dtype) or images.layout != torch_module.strided:
        remedy = (
            "convert with .to_dense() and .float()"
            if spec.dtype == "float32"
            else "pass the decoded pixels, 0 to 255, without mean and std, which are inside this engine"
        )
        raise SpecError(
            f"the images are a {images.layout} tensor of {images.dtype}; expected a dense tensor of "
            f"torch.{spec.dtype}. To mend it, {remedy}."
        )
    return torch_module


def _from_torch(images: Any, spec: InputSpec) -> tuple[ImageArray, Any]:
    """A torch tensor as an array that shares its memory, and the way back."""
    torch_module = check_tensor(images, spec)
    device = images.device
    return images.detach().cpu().numpy(), lambda output: torch_module.from_numpy(output).to(device)
