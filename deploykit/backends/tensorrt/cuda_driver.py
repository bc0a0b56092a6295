"""What NVIDIA's driver says of the GPUs here, asked through ctypes: no package, and no TensorRT, is touched."""

from __future__ import annotations

import ctypes
import re
from contextlib import suppress
from pathlib import Path

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # cuda.h: CUdevice_attribute
_NAME_BYTES = 256
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def cuda_capabilities() -> tuple[str, ...]:
    """Return the compute capability of each CUDA device, as ``sm86``; empty without a GPU or a driver.

    Asks the driver only: TensorRT's runtime can end the process where there is no GPU.
    """
    driver = _driver()
    count = ctypes.c_int(0)
    if driver is None or driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    found = []
    for ordinal in range(count.value):
        device, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
        driver.cuDeviceGet(ctypes.byref(device), ordinal)
        driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
        found.append(f"sm{major.value}{minor.value}")
    return tuple(found)


def gpu_identity(ordinal: int) -> dict[str, str]:
    """Return what a plan built here is tied to: the GPU's name and compute capability, and the driver.

    ``{"gpu": "NVIDIA ...", "compute_capability": "sm86", "driver": "550.54.14", "cuda": "12040"}``
    """
    driver = _driver()
    version, device = ctypes.c_int(0), ctypes.c_int(0)
    name = ctypes.create_string_buffer(_NAME_BYTES)
    if driver is not None:
        driver.cuDriverGetVersion(ctypes.byref(version))
        driver.cuDeviceGet(ctypes.byref(device), ordinal)
        driver.cuDeviceGetName(name, _NAME_BYTES, device)
    return {
        "gpu": name.value.decode(errors="replace"),
        "compute_capability": cuda_capabilities()[ordinal],
        "driver": _driver_version(),
        "cuda": str(version.value),
    }


def machine_tie() -> dict[str, str]:
    """Return what a plan for this machine's own GPU is tied to; empty without a GPU."""
    return gpu_identity(0) if cuda_capabilities() else {}


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _driver_version() -> str:
    """Return the kernel module's version; empty where the file is not there (Jetson, Windows)."""
    with suppress(OSError):
        found = re.search(r"\d+\.\d+(\.\d+)?", _DRIVER_FILE.read_text())
        return found.group() if found else ""
    return ""
