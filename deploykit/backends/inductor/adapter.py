"""torch.compile's ahead-of-time form: opens an AOTInductor package, on the CPU."""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np

from deploykit.arrays import FloatArray, ImageArray
from deploykit.backends.engine_file import EngineFile
from deploykit.backends.inductor.archive import open_package
from deploykit.backends.inductor.protocols import PackageRunner
from deploykit.backends.runtime import Runtime
from deploykit.errors import BundleError, DeviceUnavailable, IncompatibleEngine
from deploykit.optional import require

_THREADS = threading.Lock()
"""Torch has one number of threads for the whole process: held while a call has another than the user's."""


class InductorRuntime(Runtime):
    """An AOTInductor package, which holds machine code and the frozen weights.

    The package's loader lends its one model to one thread at a time and makes others wait, so
    calls from several threads are safe and run one after another.
    """

    def _open(self, engine: EngineFile, device: str) -> str:
        name = "cpu" if device == "auto" else device.lower()
        if name != "cpu":
            raise DeviceUnavailable(
                f"this package was compiled for cpu and {device!r} was asked for. Open it with device='cpu'."
            )
        _check_tie(self.manifest.requires)
        self._torch = require("torch")
        self._loader: PackageRunner | None = open_package(engine.read(), engine.name)
        _check_outputs(self._torch, self._loader, self._output_names, engine)
        return name

    def _run(self, images: ImageArray) -> list[FloatArray]:
        torch, loader = self._torch, self._loader
        if loader is None:
            raise self._unusable()
        if not images.flags.writeable:
            images = images.copy()  # torch warns at memory that it may not write
        with torch.inference_mode(), _threads(torch, self.threads):
            outputs = loader.run([torch.from_numpy(images)])
        return [np.ascontiguousarray(output.numpy()) for output in outputs]

    def _close(self) -> None:
        self._loader = None

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """Return ``cpu``: packages are compiled for the CPU only."""
        require("torch")
        return ("cpu",)


def machine_tie() -> dict[str, str]:
    """Return what machine code compiled here is tied to: the architecture and its vector instructions.

    ``{"machine": "x86_64", "cpu_capability": "AVX512+VNNI"}``; AVX512 alone would let a package
    with VNNI or AMX instructions crash an older processor.
    """
    torch = require("torch")
    capability = str(torch.backends.cpu.get_cpu_capability())
    for suffix, probe in (("VNNI", "_is_vnni_supported"), ("AMX", "_is_amx_tile_supported")):
        if getattr(torch.cpu, probe, bool)():
            capability += f"+{suffix}"
    return {"machine": platform.machine(), "cpu_capability": capability}


def _check_tie(requires: dict[str, str]) -> None:
    here = machine_tie()
    wrong = [key for key, value in here.items() if requires.get(key, value) != value]
    if wrong:
        raise IncompatibleEngine(
            f"this package was compiled for {', '.join(f'{key} {requires[key]}' for key in wrong)} and this machine "
            f"is {', '.join(f'{key} {here[key]}' for key in wrong)}. Export the bundle again here."
        )


@contextmanager
def _threads(torch: ModuleType, count: int | None) -> Iterator[None]:
    """Let torch compute in ``count`` threads; None, or the number that it has: as it is."""
    if count is None or count == torch.get_num_threads():
        yield
        return
    with _THREADS:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def load_package(path: Path) -> PackageRunner:
    """Open a package that this process has just made; see `open_package`."""
    return open_package(path.read_bytes(), path.name)


def _check_outputs(torch: ModuleType, loader: PackageRunner, expected: tuple[str, ...], engine: EngineFile) -> None:
    """Compare the number of outputs: a package gives them by position, without names."""
    found = torch.utils._pytree.treespec_loads(loader.get_call_spec()[1]).num_leaves
    if found != len(expected):
        raise BundleError(
            f"{engine.name} has {found} outputs; the manifest names {len(expected)}: {', '.join(expected)}. "
            "The engine is not the one that the manifest describes: export the bundle again."
        )
