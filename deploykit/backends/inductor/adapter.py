"""torch.compile's ahead-of-time form: opens an AOTInductor package, on the CPU."""

from __future__ import annotations

import platform
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.arrays import FloatArray
from deploykit.backends.runtime import Runtime
from deploykit.errors import BundleError, DeviceUnavailable, IncompatibleEngine
from deploykit.optional import require


class InductorRuntime(Runtime):
    """An AOTInductor package, which holds machine code and the frozen weights.

    The package's loader lends its one model to one thread at a time and makes others wait, so
    calls from several threads are safe and run one after another.
    """

    def _open(self, engine: Path, device: str) -> str:
        name = "cpu" if device == "auto" else device.lower()
        if name != "cpu":
            raise DeviceUnavailable(
                f"this package was compiled for cpu and {device!r} was asked for. Open it with device='cpu'."
            )
        _check_tie(self.manifest.requires)
        self._torch = require("torch")
        self._loader: Any = load_package(engine)
        _check_outputs(self._torch, self._loader, self._output_names, engine)
        return name

    def _run(self, images: FloatArray) -> list[FloatArray]:
        torch = self._torch
        if not images.flags.writeable:
            images = images.copy()  # torch warns at memory that it may not write
        with torch.inference_mode():
            outputs = self._loader.run([torch.from_numpy(images)])
        return [np.ascontiguousarray(output.numpy()) for output in outputs]

    def _close(self) -> None:
        self._loader = None

    @classmethod
    def devices(cls) -> tuple[str, ...]:
        """``cpu``: packages are compiled for the CPU only."""
        require("torch")
        return ("cpu",)


def machine_tie() -> dict[str, str]:
    """What machine code compiled here is tied to: the architecture and its vector instructions.

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


def load_package(engine: Path) -> Any:
    """The package's loader; its ``run`` takes and gives flat lists of tensors.

    Raises:
        BundleError: it is no package, or one that cannot be read.
    """
    if not zipfile.is_zipfile(engine):
        raise BundleError(
            f"{engine.name} is missing or is not an AOTInductor package (a ZIP archive). "
            "Export the bundle again, or copy it again."
        )
    try:
        # What aoti_load_package() makes, without importing the compiler, which takes longer than to load.
        return require("torch")._C._aoti.AOTIModelPackageLoader(str(engine), "model", False, 1, -1)
    except (RuntimeError, OSError, ValueError) as error:
        raise BundleError(
            f"{engine.name} is not a readable AOTInductor package ({error}). Export the bundle again, or copy it again."
        ) from error


def _check_outputs(torch: Any, loader: Any, expected: tuple[str, ...], engine: Path) -> None:
    """Compare the number of outputs: a package gives them by position, without names."""
    found = torch.utils._pytree.treespec_loads(loader.get_call_spec()[1]).num_leaves
    if found != len(expected):
        raise BundleError(
            f"{engine.name} has {found} outputs; the manifest names {len(expected)}: {', '.join(expected)}. "
            "The engine is not the one that the manifest describes: export the bundle again."
        )
