"""The one door to TensorRT: 10.x, 11.x or TensorRT-RTX, and only what the three share.

Shared: strongly typed networks, explicit TF32, optimization profiles, ``execute_async_v3`` and
``set_tensor_address``. What one of them has alone (targets, hardware and version compatibility, timing
caches) goes through `check_build_options` and the functions below it, and is never assumed: TensorRT-RTX
has the names of all of them, and some do nothing. Imports neither torch nor onnx: devices have neither.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

from deploykit.backends.tensorrt.protocols import Builder, Config, Network, TimingCache, TrtPackage
from deploykit.errors import DeployKitError, SpecError
from deploykit.optional import OptionalPackage, installed_version, require
from deploykit.spec import BuildOptions

RTX = "tensorrt_rtx"
FLAVOURS = (RTX, "tensorrt")
"""The packages by preference: TensorRT-RTX builds with no GPU; full TensorRT comes with JetPack."""

PACKAGES = {
    flavour: OptionalPackage(
        module=flavour,
        distribution=flavour,
        extra="tensorrt",
        feature="the tensorrt runtime",
        distributions=(f"{flavour}_cu12", f"{flavour}_cu13"),
    )
    for flavour in FLAVOURS
}

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
    """Return those of `FLAVOURS` that are installed here, found without importing them."""
    return tuple(name for name in FLAVOURS if importlib.util.find_spec(name) is not None)


def default_flavour() -> str:
    """Return the flavour to use here: `ENVIRONMENT`'s, else the first installed, else the first that can be installed.

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
    """Return the package, checked for all that deploykit calls.

    Raises:
        MissingDependency: it is not installed.
        DeployKitError: it is too old, or too new, to have what the three versions share.
    """
    trt = require(flavour, PACKAGES[flavour])
    absent = [name for name in _NEEDED if not _has(trt, name)]
    if absent:
        raise DeployKitError(
            f"{flavour} {trt.__version__} lacks {', '.join(absent)}; deploykit works with TensorRT 10.x and 11.x and "
            f"with TensorRT-RTX. Install one of these, or name the other package with {ENVIRONMENT}."
        )
    return trt


def flavour_version(flavour: str) -> str:
    """Return the exact installed version, which a plan is tied to; ``unknown`` where it is absent.

    JetPack installs TensorRT outside pip, so the module is asked where there is no distribution.
    """
    version = installed_version(flavour, PACKAGES[flavour])
    if version is None and flavour in installed_flavours():
        version = getattr(require(flavour, PACKAGES[flavour]), "__version__", None)
    return version or "unknown"


def typed_network(trt: TrtPackage, builder: Builder) -> Network:
    """Return a network whose types are the graph's: 10.x needs to be told, and 11 has no other kind."""
    return builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def set_tf32(trt: TrtPackage, config: Config, *, on: bool) -> None:
    """Say whether FP32 products may be rounded to TF32: the versions differ in their default."""
    (config.set_flag if on else config.clear_flag)(trt.BuilderFlag.TF32)


def check_build_options(options: BuildOptions, target: str | None, flavour: str | None = None) -> None:
    """Refuse what a flavour (None: the default one) does not do, before any work.

    TensorRT-RTX 1.7 looks for a library that its wheel lacks when version compatibility is on, and says
    of timing caches that they do nothing.

    Raises:
        SpecError: naming the option and what to do instead.
    """
    flavour = flavour or default_flavour()
    if flavour != RTX:
        return
    if options.version_compatible:
        raise SpecError(
            "version_compatible=True was given, and the TensorRT-RTX package carries no lean runtime, which such plans "
            "need. Leave it out and export once a version, or with portable=True (--portable) for every version."
        )
    if options.timing_cache is not None:
        raise SpecError(
            f"timing_cache={options.timing_cache!r} was given, and TensorRT-RTX measures no kernels when it builds, so "
            "that its timing caches are empty. Leave it out."
        )
    if options.hardware_compatibility == "ampere_plus" and target is not None:
        raise SpecError(
            f"hardware_compatibility='ampere_plus' and target={target!r} were both given, and a plan of TensorRT-RTX "
            "is for one or the other. Leave one out."
        )


def set_gpus(trt: TrtPackage, config: Config, *, flavour: str, capability: str | None, hardware: str) -> str | None:
    """Say which GPUs a plan is for; returns what this package refuses, or None.

    TensorRT-RTX takes a compute capability; with none it builds for every GPU since Ampere. Full TensorRT
    builds for the GPU here, and has hardware compatibility levels (a member of
    ``HardwareCompatibilityLevel``, in lower case), which TensorRT-RTX takes and ignores.
    """
    if flavour == RTX:
        if hardware == "ampere_plus":
            return None
        value = getattr(trt.ComputeCapability, (capability or "current").upper(), None)
        if value is not None:
            config.num_compute_capabilities = 1
        return None if value is not None and config.set_compute_capability(value, 0) else f"target {capability}"
    if hardware == "none":
        return None
    level = getattr(getattr(trt, "HardwareCompatibilityLevel", None), hardware.upper(), None)
    if level is None:
        return f"hardware compatibility {hardware!r}"
    config.hardware_compatibility_level = level
    return None


def set_version_compatible(trt: TrtPackage, config: Config) -> str | None:
    """Let newer versions open the plan; returns what this package lacks, or None."""
    flag = getattr(trt.BuilderFlag, "VERSION_COMPATIBLE", None)
    if flag is None:
        return "version compatibility"
    config.set_flag(flag)
    return None


def use_timing_cache(config: Config, path: Path) -> TimingCache | None:
    """Attach the timing cache in a file to a build, or an empty one where TensorRT refuses it (another GPU or version).

    Returns:
        The cache, to be saved after the build; None where TensorRT takes none.
    """
    for content in (path.read_bytes() if path.is_file() else b"", b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None


def _has(root: object, dotted: str) -> bool:
    for part in dotted.split("."):
        if not hasattr(root, part):
            return False
        root = getattr(root, part)
    return True
