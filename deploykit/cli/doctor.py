"""``deploykit doctor``: what this machine can export for and run, and the command that adds what is absent."""

from __future__ import annotations

import importlib.util
import json as json_module
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass

import deploykit
from deploykit.backends.backend import Backend
from deploykit.backends.table import backend_names, engine_names, load_backend
from deploykit.child_process import child_environment, run_code
from deploykit.cli.output import JsonFlag, show, show_json, table
from deploykit.errors import SpecError
from deploykit.optional import PACKAGES, installed_version
from deploykit.places import CACHE
from deploykit.processor import Processor, read_processor

EXAMPLE = "Example: deploykit doctor --json"
PROBE_SECONDS = 120.0

_PROBE = """
import json, sys
from deploykit.backends.backend import Backend
from deploykit.backends.table import load_backend
backend = load_backend(sys.argv[1]).on_device(sys.argv[2])
backend.require()
print("devices:" + json.dumps(backend.load_devices()()))
"""


@dataclass(frozen=True, kw_only=True)
class RuntimeHealth:
    """A runtime here, or one of its devices that needs a package of its own.

    ``version`` None means that its package is absent, and ``install`` is the command.
    ``package`` is the distribution that is installed of it, of which some runtimes have several. ``devices`` are those
    that the adapter can open; ``problem`` says why there are none to name.
    """

    runtime: str
    package: str
    version: str | None
    devices: tuple[str, ...] = ()
    problem: str | None = None
    install: str


@dataclass(frozen=True, kw_only=True)
class Health:
    """Everything that doctor found; folders are paths on this machine."""

    python: str
    deploykit: str
    platform: str
    processor: Processor
    runtimes: tuple[RuntimeHealth, ...]
    build_packages: dict[str, str | None]
    compiler: str | None
    weights: tuple[str, ...]
    hub_cache: str
    engine_cache: str


def doctor(json: JsonFlag = False) -> None:
    """Show the processor, the runtimes with their devices, and how to install what is absent."""
    health = examine()
    if json:
        show_json(health)
        return
    _show_page(health)


def examine() -> Health:
    """Look at everything; whatever is broken becomes a word in its row, never an error."""
    return Health(
        python=f"{platform.python_version()} ({sys.executable})",
        deploykit=deploykit.__version__,
        platform=f"{platform.system()} {platform.machine()}",
        processor=read_processor(),
        runtimes=_examine_runtimes(),
        build_packages={name: installed_version(name) for name in PACKAGES if name not in _runtime_modules()},
        compiler=find_compiler(),
        weights=_weights_packages(),
        hub_cache=_hub_cache(),
        engine_cache=_engine_cache(),
    )


def _examine_runtimes() -> tuple[RuntimeHealth, ...]:
    """Ask each installed runtime for its devices, each in a process of its own: a broken one may crash it."""
    backends = _backends()
    running = {
        title: _start_probe(backend)
        for title, backend in backends.items()
        if backend.has_system and backend.own_version() is not None
    }
    try:
        return tuple(_health(backend, running.get(title)) for title, backend in backends.items())
    finally:
        for probe in running.values():
            probe.kill()  # harmless after its end


def _backends() -> dict[str, Backend]:
    """Return every runtime, and behind it its devices that need a package of their own, by title."""
    found = (each for name in backend_names() for each in load_backend(name).with_accelerators())
    return {backend.title: backend for backend in found}


def _health(backend: Backend, probe: subprocess.Popen[str] | None) -> RuntimeHealth:
    package = backend.own_package
    devices, problem = _finish_probe(probe) if probe is not None else ((), None)
    builds = package.installed_builds()
    if len(builds) > 1 and problem is None:
        problem = f"{' and '.join(builds)} are both installed, and overwrite each other's files"
    return RuntimeHealth(
        runtime=backend.title,
        package=package.build if builds else package.module,
        version=backend.own_version(),
        devices=devices,
        problem=problem,
        install=package.repair if builds and problem is not None else package.command,
    )


def _runtime_modules() -> set[str]:
    return {load_backend(name).package.module for name in backend_names()}


def _start_probe(backend: Backend) -> subprocess.Popen[str]:
    return subprocess.Popen(
        run_code(_PROBE, backend.name, backend.accelerator or ""),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=child_environment(),
    )


def _finish_probe(probe: subprocess.Popen[str]) -> tuple[tuple[str, ...], str | None]:
    """Return the devices, or why they cannot be told."""
    try:
        said, complaint = probe.communicate(timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        probe.kill()
        probe.communicate()
        return (), f"broken: it did not answer in {PROBE_SECONDS:g} s"
    answers = [line.removeprefix("devices:") for line in said.splitlines() if line.startswith("devices:")]
    if probe.returncode == 0 and answers:
        return tuple(json_module.loads(answers[-1])), None
    if probe.returncode < 0:
        return (), f"broken: importing it ends the process (signal {-probe.returncode})"
    last = [line for line in complaint.splitlines() if line.strip()]
    return (), f"broken: {last[-1].strip() if last else 'no reason given'}"


def _version_shown(row: RuntimeHealth) -> str:
    """Return the version, after the distribution where that is not the runtime's usual one."""
    if row.version is None:
        return "absent"
    usual = _backends()[row.runtime].own_package.distribution
    return row.version if row.package == usual else f"{row.package} {row.version}"


def find_compiler() -> str | None:
    """Return the C++ compiler that torch_compile would use: ``$CXX``, else one of the usual names."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++", "c++"]:
        if found := shutil.which(name):
            return found
    return None


def _weights_packages() -> tuple[str, ...]:
    """Return ``tag for variants`` of each installed weights package, or what is wrong with one."""
    from deploykit.backbones.weight_packages import installed_offers
    from deploykit.errors import WeightsError

    try:
        return tuple(f"{offer.tag} for {', '.join(offer.variants)}" for offer in installed_offers())
    except WeightsError as error:
        return (f"broken: {error}",)


def _engine_cache() -> str:
    from deploykit.cache import EngineCache

    try:
        root = EngineCache().root
    except SpecError as error:
        return f"broken: {error}"
    return str(root) if root is not None else f"none: there is no home folder; set {CACHE} to a writable folder"


def _hub_cache() -> str:
    if importlib.util.find_spec("huggingface_hub") is None:
        return f"huggingface_hub is not installed: {PACKAGES['huggingface_hub'].command}"
    try:
        return str(importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE)
    except Exception as error:  # a broken package may raise anything
        return f"broken: {error}"


def _show_page(health: Health) -> None:
    chip = health.processor
    instructions = ", ".join(chip.int8) or "none of the INT8 kind: int8 engines may be no faster than fp32"
    facts: dict[str, object] = {
        "python": health.python,
        "deploykit": health.deploykit,
        "platform": health.platform,
        "processor": f"{chip.model}, {chip.cores} cores",
        "int8": instructions + (f" (absent: {', '.join(chip.absent)})" if chip.absent else ""),
        "compiler": health.compiler or "no C++ compiler, which some runtimes need: apt-get install g++, or set CXX",
        "weights": "; ".join(health.weights) or "no weights package: weights come from the hub or from files",
        "hub cache": health.hub_cache,
        "engine cache": health.engine_cache,
        "for export": ", ".join(f"{name} {version or 'absent'}" for name, version in health.build_packages.items()),
    }
    show(*(f"{name:<13} {value}" for name, value in facts.items()), "")
    rows = [
        [
            row.runtime,
            _version_shown(row),
            row.problem or (", ".join(row.devices) or "no device here: it can build, not run") if row.version else "",
            "" if row.version and not row.problem else row.install,
        ]
        for row in health.runtimes
    ]
    show(table(("runtime", "version", "devices", "to install"), rows))
    ready = {row.runtime for row in health.runtimes if row.devices}
    first = next((name for name in engine_names() if name in ready), None)
    show(f"Next: deploykit export resnet18 --runtime {first}" if first else "Next: install a runtime, as above.")
