"""What deploykit knows of one runtime: the descriptor that every folder in backends/ fills in."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import msgspec

from deploykit.errors import DeviceUnavailable
from deploykit.optional import OptionalPackage, installed_version, require, require_version
from deploykit.spec import DEFAULT_BUILD, BuildOptions

if TYPE_CHECKING:
    from deploykit.backends.runtime import Runtime

VersionRule: TypeAlias = Literal["exact", "same_or_newer"]
"""Which installed versions open an engine: the one that built it, or that one, newer ones and those older ones that
have all that the engine needs.
"""

Setting: TypeAlias = Literal["threads", "streams", "in_flight"]
"""How an engine is opened: in so many threads, which so many calls share, and so many runs of a stream at a time."""

StepListener: TypeAlias = Callable[[str, int, int], None]
"""Hears of a phase of a build, the steps done and the steps in all."""

_SYSTEM_NAMES = {"Darwin": "macOS"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Backend:
    """One runtime. Code is named by dotted paths, ``module:attribute``, imported when first used.

    Args:
        name: what users call the runtime.
        package: what must be installed to open and to build its engines.
        plugin: what must be installed beside it.
        precisions: those that it has.
        int8_float_dtypes: what may stay in float beside INT8.
        version_rule: which installed versions open an engine.
        least_version: ``(engine, name) -> str | None``: the oldest version that reads an engine's bytes; None: the one
            that built it.
        image_sizes: one engine takes a range of image sizes.
        batches: one engine takes a range of batches.
        uses_cpu: INT8 products run on the CPU, where some processors saturate.
        targets: what engines can be built for, by name; empty: nothing to choose.
        source: the form that is lowered: an ONNX graph or a torch program.
        systems: where its engines run, as `platform.system` says; empty: wherever its package is.
        devices: ``() -> tuple[str, ...]``: the devices of this machine; needs the package.
        accelerators: devices whose engines are built and opened in a way of their own, each with the path of the
            `Backend` that says how.
        accelerator: of such a descriptor, its device; None: it is the runtime's own.
        simulator: of such a descriptor, the device that stands in for it where it is not here; None: none does.
        tie: ``() -> dict[str, str]``: what an engine that is built here is tied to beside its target and the version,
            such as the processor's instructions; None: nothing.
        open_options: the runtime's own settings that an edge target may give, for the build and the opening of an
            engine.
        check_settings: ``(settings) -> object``: refuse those of an edge target that do not fit together; None: any do.
        tunable: which of ``threads``, ``streams`` and ``in_flight`` change its speed, for ``deploykit tune``.
        place: ``(backbone, precision, device, embed_preprocessing, threads) -> module``, for a runtime that runs the
            torch module itself and has no engines; None: engines.
        adapter: the `Runtime` class that opens its engines; None with ``place``.
        dialect: the `Dialect` that writes a precision plan into its graph; None with ``place``.
        code_suffix: how those of its engine files end that are machine code; None: none is.
        lower: a `Lowering`; None with ``place``.
        portable: the lowering to an engine that the device finishes, where the runtime has such a form.
        options: ``(BuildOptions, target) -> None``: refuse build options; None: it takes none.
        inspect: ``(engine file) -> dict[str, int]``: what its optimized form still computes in float.
        profile: ``(float graph, INT8 graph, nodes, batch) -> dict[str, float] | None``: milliseconds that each node
            gains by running in integers.
        debug: ``(part of a graph, inputs, min_sqnr_db) -> str | None``: what the runtime does wrong with it.
        run_part: ``(part of a graph, inputs) -> list of arrays``: what the runtime gives for it.
        serving: the `Serving` that says how model servers open its engines; None: none of their own does.
        reducible: its engines, or its portable ones, are ONNX graphs, of which ``verify --debug`` finds a failing part.
        demo: the precisions that ``deploykit demo`` exports.
    """

    name: str
    package: OptionalPackage
    plugin: OptionalPackage | None = None
    precisions: tuple[str, ...]
    int8_float_dtypes: tuple[str, ...] = ("fp32",)
    version_rule: VersionRule = "exact"
    least_version: str | None = None
    image_sizes: bool = False
    batches: bool = True
    uses_cpu: bool = True
    targets: tuple[str, ...] = ()
    source: Literal["onnx", "torch"] = "onnx"
    systems: tuple[str, ...] = ()
    devices: str
    accelerators: dict[str, str] = field(default_factory=dict)
    accelerator: str | None = None
    simulator: str | None = None
    tie: str | None = None
    open_options: tuple[str, ...] = ()
    check_settings: str | None = None
    tunable: tuple[Setting, ...] = ()
    place: str | None = None
    adapter: str | None = None
    dialect: str | None = None
    code_suffix: str | None = None
    lower: str | None = None
    portable: str | None = None
    options: str | None = None
    inspect: str | None = None
    profile: str | None = None
    debug: str | None = None
    run_part: str | None = None
    serving: str | None = None
    reducible: bool = False
    demo: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What people call it: the runtime, and its device where that has engines of its own."""
        return self.name if self.accelerator is None else f"{self.name} on {self.accelerator}"

    def on_device(self, device: str) -> Backend:
        """Return the descriptor of the engines of a device: its own where it has one, and else this one."""
        backend: Backend = resolve(self.accelerators[device]) if device in self.accelerators else self
        return backend

    def with_accelerators(self) -> tuple[Backend, ...]:
        """Return this descriptor and those of its accelerators."""
        return (self, *map(self.on_device, self.accelerators))

    @property
    def own_package(self) -> OptionalPackage:
        """The package that it alone needs: its plugin, or else the runtime's."""
        return self.plugin or self.package

    @property
    def has_engines(self) -> bool:
        """Whether something can be exported for it."""
        return self.lower is not None

    @property
    def has_system(self) -> bool:
        """Whether this operating system runs its engines; they are built on any."""
        return not self.systems or platform.system() in self.systems

    def check_system(self) -> None:
        """Refuse to open an engine on an operating system that does not have the runtime.

        Raises:
            DeviceUnavailable: this is none of `systems`.
        """
        if not self.has_system:
            systems = " or ".join(_SYSTEM_NAMES.get(name, name) for name in self.systems)
            raise DeviceUnavailable(
                f"{self.name} runs on {systems}, and this machine has {platform.system()}: its engines are built here "
                f"and run there. Copy the bundle to a machine with {systems} and open it there, or export for another "
                "runtime to run here."
            )

    def require(self) -> ModuleType:
        """Import the runtime's package, and its plugin where it has one.

        Raises:
            MissingDependency: one is not installed; the message has the pip command.
        """
        package = require(self.package.module, self.package)
        if self.plugin is not None:
            require(self.plugin.module, self.plugin)
        return package

    def check_installed(self) -> None:
        """Import the runtime's package, or, where it only builds on this system, look for it.

        Raises:
            MissingDependency: it is not installed; the message has the pip command.
        """
        if self.has_system:
            self.require()
        else:
            require_version(self.package)

    def installed_version(self) -> str | None:
        """Return the installed version of the package, without importing it; None when absent."""
        return installed_version(self.package.module, self.package)

    def own_version(self) -> str | None:
        """Return the installed version of `own_package`, without importing it; None: it or the runtime is absent."""
        version = self.installed_version()
        return version if version is None or self.plugin is None else installed_version(self.plugin.module, self.plugin)

    def machine_tie(self) -> dict[str, str]:
        """Return what an engine that is built on this machine is tied to; needs the package."""
        tied: dict[str, str] = resolve(self.tie)() if self.tie is not None else {}
        return tied

    def oldest_version(self, engine: bytes, name: str) -> str | None:
        """Return the oldest version of the runtime that reads an engine's bytes; None: it cannot be told."""
        oldest: str | None = resolve(self.least_version)(engine, name) if self.least_version is not None else None
        return oldest

    def is_code(self, engine: str) -> bool:
        """Return whether an engine file is machine code, which runs with the user's rights when it is opened."""
        return self.code_suffix is not None and engine.endswith(self.code_suffix)

    def load_adapter(self) -> type[Runtime]:
        """Return the class that opens engines."""
        adapter: type[Runtime] = resolve(str(self.adapter))
        return adapter

    def load_devices(self) -> Callable[[], tuple[str, ...]]:
        """Return the function that lists this machine's devices."""
        devices: Callable[[], tuple[str, ...]] = resolve(self.devices)
        return devices


# Structs from here on: their classes are made in a tenth of a dataclass's time, which each start of a device takes.


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """How model servers open a runtime's engines.

    ``triton_backend`` is the name of Triton's backend, and ``triton_parameters`` what it is told; None: it has none.
    ``model_server``, ``(manifest) -> dict[str, str]``, gives what the runtime's own model server is told; None: it has
    no such server. ``notes`` say, by precision, what Triton's backend may do otherwise than the adapter.
    """

    triton_backend: str | None = None
    triton_parameters: dict[str, str] = msgspec.field(default_factory=dict)
    model_server: str | None = None
    notes: dict[str, str] = msgspec.field(default_factory=dict)


class LowerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a lowering is told beside the graph.

    ``settings`` are the runtime's own, as the target gives them; ``on_step`` hears of the build's own phases.
    """

    target: str | None = None
    settings: dict[str, str] = msgspec.field(default_factory=dict)
    build: BuildOptions = DEFAULT_BUILD
    on_step: StepListener = lambda phase, done, total: None


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """An engine file, by its name in the folder, and what it is tied to.

    ``compiler`` is what its compiler chose or left out, where it tells.
    """

    file: str
    runtime_version: str
    requires: dict[str, str] = msgspec.field(default_factory=dict)
    tools: dict[str, str] = msgspec.field(default_factory=dict)
    compiler: dict[str, str] = msgspec.field(default_factory=dict)


class Lowering(Protocol):
    """Write a graph into ``folder`` as an engine of one runtime.

    Raises:
        ExportError: the runtime does not take the graph; nothing is left in the folder.
    """

    def __call__(self, graph: Any, folder: Path, options: LowerOptions) -> Engine:
        """Lower ``graph``, an `OnnxGraph` or a `TorchProgram` as the backend's ``source`` says."""
        ...


def resolve(path: str) -> Any:
    """Import what a dotted path names, ``module:attribute`` or ``module:Class.attribute``."""
    module, _, attributes = path.partition(":")
    value: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        value = getattr(value, attribute)
    return value
