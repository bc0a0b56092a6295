"""The one door to TensorRT: 10.x, 11.x or TensorRT-RTX, and only what the three share.

Shared: strongly typed networks, explicit TF32, optimization profiles, ``execute_async_v3`` and
``set_tensor_address``. What one of them has alone is asked for with `has_compute_capabilities` and
`set_where_known`, never assumed. Imports neither torch nor onnx: devices have neither.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from deploykit.errors import DeployKitError, SpecError
from deploykit.optional import installed_version, require

FLAVOURS = ("tensorrt_rtx", "tensorrt")
"""The packages by preference: TensorRT-RTX builds with no GPU; full TensorRT comes with JetPack."""

ENVIRONMENT = "DEPLOYKIT_TENSORRT"
"""Names one of `FLAVOURS` where both are installed."""

RTX_CAPABILITIES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""What TensorRT-RTX builds for on any machine; full TensorRT builds for the GPU that it runs on."""

_NEEDED = (
    "Builder.build_serialized_network",
    "BuilderFlag.TF32",
    "ICudaEngine.device_memory_size_v2",
    "IExecutionContext.execute_async_v3",
    "IExecutionContext.set_tensor_address",
    "IProgressMonitor",
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    "OnnxParser.parse_from_file",
)


def installed_flavours() -> tuple[str, ...]:
    """Those of `FLAVOURS` that are installed here, found without importing them."""
    return tuple(name for name in FLAVOURS if importlib.util.find_spec(name) is not None)


def default_flavour() -> str:
    """The flavour to use here: `ENVIRONMENT`'s, else the first installed, else the first that can be installed.

    Raises:
        SpecError: the environment names no flavour.
    """
    named = os.environ.get(ENVIRONMENT)
    if named:
        if named not in FLAVOURS:
            raise SpecError(f"{ENVIRONMENT} is {named!r}; expected one of {', '.join(FLAVOURS)}.")
        return named
    return (*installed_flavours(), *FLAVOURS)[0]


def load_tensorrt(flavour: str) -> ModuleType:
    """The package, checked for all that deploykit calls.

    Raises:
        MissingDependency: it is not installed.
        DeployKitError: it is too old, or too new, to have what the three versions share.
    """
    trt = require(flavour)
    absent = [name for name in _NEEDED if not _has(trt, name)]
    if absent:
        raise DeployKitError(
            f"{flavour} {trt.__version__} lacks {', '.join(absent)}; deploykit works with TensorRT 10.x and 11.x and "
            f"with TensorRT-RTX. Install one of these, or name the other package with {ENVIRONMENT}."
        )
    return trt


def flavour_version(flavour: str) -> str:
    """The exact installed version, which a plan is tied to; ``unknown`` where it is absent.

    JetPack installs TensorRT outside pip, so the module is asked where there is no distribution.
    """
    version = installed_version(flavour)
    if version is None and flavour in installed_flavours():
        version = getattr(require(flavour), "__version__", None)
    return version or "unknown"


def typed_network(trt: Any, builder: Any) -> Any:
    """A network whose types are the graph's: 10.x needs to be told, and 11 has no other kind."""
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def set_tf32(trt: Any, config: Any, *, on: bool) -> None:
    """Say whether FP32 products may be rounded to TF32: the versions differ in their default."""
    (config.set_flag if on else config.clear_flag)(trt.BuilderFlag.TF32)


def has_compute_capabilities(config: Any) -> bool:
    """Whether a build can be for another GPU than the one here: TensorRT-RTX alone."""
    return hasattr(config, "set_compute_capability")


def set_capability(trt: Any, config: Any, capability: str) -> bool:
    """Build for ``sm86``; False where this package does not know it or refuses it."""
    value = getattr(trt.ComputeCapability, capability.upper(), None)
    if value is None:
        return False
    config.num_compute_capabilities = 1
    return bool(config.set_compute_capability(value, 0))


def set_where_known(trt: Any, config: Any, *, hardware: str, version_compatible: bool) -> str | None:
    """Set hardware and version compatibility; returns what this package lacks, or None.

    Args:
        trt: the package.
        config: the builder's.
        hardware: a member of ``HardwareCompatibilityLevel`` in lower case; ``none`` for this GPU alone.
        version_compatible: the plan opens in other versions of the same package too.
    """
    if hardware != "none":
        level = getattr(getattr(trt, "HardwareCompatibilityLevel", None), hardware.upper(), None)
        if level is None or not hasattr(config, "hardware_compatibility_level"):
            return f"hardware compatibility {hardware!r}"
        config.hardware_compatibility_level = level
    if version_compatible:
        flag = getattr(trt.BuilderFlag, "VERSION_COMPATIBLE", None)
        if flag is None:
            return "version compatibility"
        config.set_flag(flag)
    return None


def use_timing_cache(config: Any, path: Path) -> Any:
    """Attach the timing cache in a file (or an empty one) to a build; None where this package has none."""
    if not hasattr(config, "create_timing_cache"):
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    return cache if cache is not None and config.set_timing_cache(cache, False) else None


def _has(root: Any, dotted: str) -> bool:
    for part in dotted.split("."):
        if not hasattr(root, part):
            return False
        root = getattr(root, part)
    return True
