"""The only door to optional packages."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType

from deploykit.errors import DeployKitError, MissingDependency


@dataclass(frozen=True, kw_only=True)
class OptionalPackage:
    """An optional package: what it is imported as, what brings it, and what it is for."""

    module: str
    distribution: str
    extra: str | None = None
    feature: str
    prepare: str | None = None
    """A function that is called before the first import, as ``module:function``."""

    @property
    def command(self) -> str:
        """The pip command that installs it: with the extra of deploykit that needs it, where there is one."""
        return f"pip install 'deploykit[{self.extra}]'" if self.extra else f"pip install {self.distribution}"


PACKAGES: dict[str, OptionalPackage] = {
    package.module: package
    for package in (
        OptionalPackage(module="torch", distribution="torch", extra="export", feature="torch backbones and export"),
        OptionalPackage(module="safetensors", distribution="safetensors", extra="export", feature="safetensors files"),
        OptionalPackage(
            module="huggingface_hub",
            distribution="huggingface_hub",
            extra="export",
            feature="pretrained weights from the model hub",
        ),
        OptionalPackage(module="onnx", distribution="onnx", extra="export", feature="ONNX export"),
        OptionalPackage(module="onnx_ir", distribution="onnx-ir", extra="export", feature="ONNX graph passes"),
        OptionalPackage(module="onnxscript", distribution="onnxscript", extra="export", feature="ONNX export"),
        OptionalPackage(
            module="cuda", distribution="cuda-python", extra="cuda", feature="engines on a GPU without torch"
        ),
        OptionalPackage(
            module="polygraphy", distribution="polygraphy", extra="debug", feature="reducing a failing model"
        ),
        OptionalPackage(
            module="onnx_graphsurgeon",
            distribution="onnx-graphsurgeon",
            extra="debug",
            feature="reducing a failing model",
        ),
        OptionalPackage(module="matplotlib", distribution="matplotlib", extra="plot", feature="drawing a plot"),
        OptionalPackage(module="skimage", distribution="scikit-image", extra="demo", feature="the demo's photographs"),
        OptionalPackage(
            module="timm",
            distribution="timm",
            extra="timm",
            feature="timm/<name> backbones",
            prepare="deploykit.torchvision_operators:declare_missing_operators",
        ),
    )
}


def require(module: str, package: OptionalPackage | None = None) -> ModuleType:
    """Import an optional package, or say how to install it.

    Args:
        module: the dotted name to import.
        package: what it is of; None: its row in `PACKAGES`, or else a distribution of the module's own name.

    Raises:
        MissingDependency: the package is not installed; the message has the pip command.
        DeployKitError: the package is installed and fails to import; the cause is chained.
    """
    root = module.partition(".")[0]
    package = package or _package_of(root)
    try:
        if package.prepare is not None and root not in sys.modules and importlib.util.find_spec(root) is not None:
            _call(package.prepare)
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        absent = (error.name or "").partition(".")[0]
        if absent == root:
            raise MissingDependency(
                f"{package.feature} needs the package {package.distribution!r}, which is not installed. "
                f"Install it: {package.command}",
                package=root,
                command=package.command,
            ) from error
        if absent and absent == error.name:
            raise _incomplete(package, absent) from error
        raise _broken(package, error) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise _broken(package, error) from error


def _call(path: str) -> None:
    module, _, function = path.partition(":")
    getattr(importlib.import_module(module), function)()


def _incomplete(package: OptionalPackage, absent: str) -> MissingDependency:
    """The error for a package that was installed without one that it imports."""
    from deploykit.torchvision_operators import install_command

    command = install_command() if absent == "torchvision" else f"pip install {absent}"
    return MissingDependency(
        f"the package {package.distribution!r} is installed, and imports {absent!r}, which is not. "
        f"Install it: {command}",
        package=absent,
        command=command,
    )


def _broken(package: OptionalPackage, error: Exception) -> DeployKitError:
    return DeployKitError(
        f"the package {package.distribution!r} is installed but does not import ({error}). "
        f"Reinstall it: pip install --force-reinstall {package.distribution}"
    )


def _package_of(module: str) -> OptionalPackage:
    return PACKAGES.get(module) or OptionalPackage(module=module, distribution=module, feature=f"the package {module}")


def installed_version(module: str, package: OptionalPackage | None = None) -> str | None:
    """Return the installed version of an optional package, without importing it; None when absent."""
    package = package or _package_of(module)
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
