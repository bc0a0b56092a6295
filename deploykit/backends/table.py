"""The runtimes, one row each. Other packages add theirs through the entry-point group `ENTRY_POINTS`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from deploykit.backends.backend import Backend, resolve
from deploykit.errors import BundleError, DeployKitError, SpecError, nearest

if TYPE_CHECKING:
    import importlib.metadata

    from deploykit.manifest import Manifest

BACKENDS: dict[str, str] = {
    "torch": "deploykit.backends.torch.backend:BACKEND",
    "torch_compile": "deploykit.backends.inductor.backend:BACKEND",
    "onnxruntime": "deploykit.backends.onnxruntime.backend:BACKEND",
    "openvino": "deploykit.backends.openvino.backend:BACKEND",
    "tensorrt": "deploykit.backends.tensorrt.backend:BACKEND",
    "litert": "deploykit.backends.litert.backend:BACKEND",
    "executorch": "deploykit.backends.executorch.backend:BACKEND",
    "coreml": "deploykit.backends.coreml.backend:BACKEND",
}

SYNONYMS: dict[str, str] = {
    "onnx": "onnxruntime",
    "ort": "onnxruntime",
    "ov": "openvino",
    "trt": "tensorrt",
    "tflite": "litert",
    "pte": "executorch",
    "xnnpack": "executorch",
    "core-ml": "coreml",
    "mlpackage": "coreml",
    "mlprogram": "coreml",
    "aotinductor": "torch_compile",
    "inductor": "torch_compile",
    "pytorch": "torch",
}
"""What people call a runtime otherwise: suggested, never taken."""

ENTRY_POINTS = "deploykit.backends"
"""A package declares ``name = "module:BACKEND"`` in this group, with the name that its `Backend` has."""

EVALUATOR = "onnxruntime"
"""The runtime that every export needs: it evaluates ONNX graphs while planning, proving and comparing. It is also what
commands measure with, and suggest, where no runtime was named.
"""

GRAPH_SESSION = f"deploykit.backends.{EVALUATOR}.session:ort_session"
"""What opens a graph to evaluate."""

HALF_CONVERTER = f"deploykit.backends.{EVALUATOR}.session:float16_converter"
"""What gives the module that casts ONNX graphs to FP16."""


def backend_names() -> tuple[str, ...]:
    """Name every runtime: those of the table, then those of other packages."""
    return (*BACKENDS, *_entry_points())


def engine_names() -> tuple[str, ...]:
    """Name the runtimes that something can be exported for."""
    return tuple(name for name in backend_names() if load_backend(name).has_engines)


def load_backend(name: str) -> Backend:
    """Return the descriptor of a runtime.

    Raises:
        SpecError: no such runtime.
        DeployKitError: another package's entry point does not give the `Backend` that it names.
    """
    if name in BACKENDS:
        backend: Backend = resolve(BACKENDS[name])
        return backend
    if name not in _entry_points():
        meant = SYNONYMS.get(name.lower(), name)
        raise SpecError(f"unknown runtime {name!r}. {nearest(meant, backend_names())}")
    return _load_entry_point(name)


def backend_of(manifest: Manifest) -> Backend:
    """Return the descriptor of a bundle's engine: that of its runtime on the device that it was made for.

    Raises:
        SpecError: no such runtime.
        BundleError: the runtime has no engines.
    """
    backend = load_backend(manifest.runtime)
    if backend.adapter is None:
        raise BundleError(
            f"the manifest names the runtime {backend.name}, which is the module itself and has no engines. "
            "Do not open this bundle: it was not written by deploykit."
        )
    return backend if manifest.made_for is None else backend.on_device(manifest.made_for.device)


@functools.cache
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    import importlib.metadata

    found: dict[str, importlib.metadata.EntryPoint] = {}
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if entry.name in BACKENDS or entry.name in found:
            raise DeployKitError(
                f"two packages name a runtime {entry.name!r}: {entry.value} is one of them. "
                "Fix: uninstall one of the packages, or rename its entry point."
            )
        found[entry.name] = entry
    return found


def _load_entry_point(name: str) -> Backend:
    entry = _entry_points()[name]
    try:
        backend = entry.load()
    except Exception as error:  # another package's module may raise anything
        raise DeployKitError(
            f"the runtime {name!r} comes from the entry point {entry.value}, which does not load: {error}. "
            "Fix: repair or uninstall that package."
        ) from error
    if not isinstance(backend, Backend) or backend.name != name:
        raise DeployKitError(
            f"the entry point {entry.value} gives {backend!r}; expected a Backend named {name!r}. "
            "Fix: update or uninstall that package."
        )
    return backend
