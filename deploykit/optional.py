"""The only door to optional packages."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from deploykit.errors import DeployKitError, MissingDependency

DISTRIBUTION = "deploykit-vision"
"""What pip calls deploykit: the name deploykit on the public index belongs to another project."""

_RELEASE = re.compile(r"\d+(\.\d+)+")
_VERSION_LINE = re.compile(
    r"^__version__(?::\s*\w+)?\s*=\s*(?P<quote>['\"])(?P<version>[^'\"]+)(?P=quote)", re.MULTILINE
)


@dataclass(frozen=True, kw_only=True)
class OptionalPackage:
    """An optional package: what it is imported as, what brings it, and what it is for.

    Args:
        module: what it is imported as.
        distribution: what pip installs to bring it.
        extra: the extra of deploykit that needs it.
        feature: what it is for.
        distributions: other builds of the same module, for other devices or from every night, each instead of
            ``distribution``: two of them in one environment overwrite each other's files.
        prepare: a function that is called before the first import, as ``module:function``.
    """

    module: str
    distribution: str
    extra: str | None = None
    feature: str
    distributions: tuple[str, ...] = ()
    prepare: str | None = None

    @property
    def command(self) -> str:
        """The pip command that installs it, and what else its extra of deploykit has that is not here."""
        beside = (each for each in PACKAGES.values() if self.extra is not None and each.extra == self.extra)
        absent = (each.distribution for each in beside if each.module != self.module and _spec_of(each.module) is None)
        return f"pip install {' '.join((self.distribution, *absent))}"

    @property
    def repair(self) -> str:
        """The pip command that mends the build that is installed, and puts no other one over it."""
        builds = self.installed_builds()
        if len(builds) > 1:
            return f"pip uninstall {' '.join(builds)}, which overwrite each other, then pip install one of them"
        return f"pip install --force-reinstall {self.build}"

    @property
    def build(self) -> str:
        """The distribution that is installed of it; ``distribution`` where none is."""
        return (*self.installed_builds(), self.distribution)[0]

    def missing(self) -> MissingDependency:
        """Return the error of the package that is not installed, with the command that installs it."""
        return MissingDependency(
            f"{self.feature} needs the package {self.distribution!r}, which is not installed. "
            f"Install it: {self.command}",
            package=self.module,
            command=self.command,
        )

    def installed_builds(self) -> tuple[str, ...]:
        """Return the distributions that are installed of it; first the one whose version the module has.

        One that another of them requires is a part of that one.
        """
        import importlib.metadata  # a third of the time of importing deploykit, which needs no version

        own = module_version(self.module) or ""
        found = {name: version for name in (self.distribution, *self.distributions) if (version := _version_of(name))}
        if not found and _spec_of(self.module) is not None:
            return tuple(importlib.metadata.packages_distributions().get(self.module, ()))
        parts = {_plain_name(need) for name in found for need in importlib.metadata.requires(name) or ()}
        whole = [name for name in found if _plain_name(name) not in parts]
        return tuple(sorted(whole, key=lambda name: not _same_release(own, found[name])))


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
        OptionalPackage(
            module="model_signing", distribution="model-signing", extra="sign", feature="signatures of bundles"
        ),
        OptionalPackage(module="pyarrow", distribution="pyarrow", extra="parquet", feature="writing Parquet files"),
        OptionalPackage(module="ray", distribution="ray[data]", extra="ray", feature="work on several machines"),
        OptionalPackage(module="PIL", distribution="pillow", extra="images", feature="reading images"),
        OptionalPackage(
            module="rich", distribution="rich", extra="cli", feature="the deploykit command and its tables"
        ),
        OptionalPackage(module="typer", distribution="typer", extra="cli", feature="the deploykit command"),
        OptionalPackage(module="platformdirs", distribution="platformdirs", feature="the folder of the engine cache"),
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
        removed = root not in sys.modules and package.installed_builds()  # its files are gone, and its record is not
        if absent == root and not removed:
            raise package.missing() from error
        if absent and absent == error.name and absent != root:
            raise _incomplete(package, absent) from error
        raise _broken(package, error) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise _broken(package, error) from error


def _call(path: str) -> None:
    module, _, function = path.partition(":")
    getattr(importlib.import_module(module), function)()


def _incomplete(package: OptionalPackage, absent: str) -> MissingDependency:
    """Return the error for a package that was installed without one that it imports."""
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
        f"the package {package.build!r} is installed but does not import ({error}). Reinstall it: {package.repair}"
    )


def _package_of(module: str) -> OptionalPackage:
    return PACKAGES.get(module) or OptionalPackage(module=module, distribution=module, feature=f"the package {module}")


def installed_version(module: str, package: OptionalPackage | None = None) -> str | None:
    """Return the installed version of an optional package, without importing it; None when absent.

    The module's own word counts, whichever distribution brought it; where it has none, its distribution's does.
    """
    if _spec_of(module) is None:
        return None
    own = module_version(module)
    if own is not None and _RELEASE.fullmatch(own):  # what pip calls it too, whose records take long to read
        return own
    package = package or _package_of(module)
    version = _version_of(package.distribution)
    # Of 2026.4.1 a module may say 2026.4.1-22051-release; what pip calls it is shorter, and what manifests have.
    if version is not None and (own is None or _same_release(own, version)):
        return version
    builds = package.installed_builds() if own is None else ()
    return own or next((_version_of(name) for name in builds), None)


def require_version(package: OptionalPackage) -> str:
    """Return the version of a package, without importing it.

    Raises:
        MissingDependency: it is not installed.
    """
    version = installed_version(package.module, package)
    if version is None:
        raise package.missing()
    return version


def module_version(module: str) -> str | None:
    """Return what a module says of its own version: from the module where it is imported, else from its source."""
    loaded = getattr(sys.modules.get(module), "__version__", None)
    if isinstance(loaded, str):
        return loaded
    spec = _spec_of(module)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for name in ("__init__.py", "version.py", "_version.py"):
            with suppress(OSError):
                match = _VERSION_LINE.search((Path(folder) / name).read_text(encoding="utf-8", errors="replace"))
                if match:
                    return match.group("version")
    return None


def _spec_of(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None


def _version_of(distribution: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain_name(requirement: str) -> str:
    """Return the name in a requirement such as ``tensorrt_rtx_cu13==1.7; extra == "x"``, as pip compares names."""
    match = re.match(r"[\w.-]+", requirement.strip())
    return re.sub(r"[-_.]+", "-", match.group() if match else "").lower()


def _same_release(own: str, distribution: str) -> bool:
    return own.partition("-")[0].partition("+")[0] == distribution.partition("+")[0]
