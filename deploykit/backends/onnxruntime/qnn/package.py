"""The package onnxruntime-qnn: an execution provider that onnxruntime loads as a plugin, with Qualcomm's libraries."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from deploykit.backends.onnxruntime.package import load_onnxruntime
from deploykit.backends.onnxruntime.protocols import EpDevice
from deploykit.optional import OptionalPackage, require
from deploykit.processor import this_machine

DEVICE = "qnn"
SIMULATOR = "qnn-simulator"
"""The NPU (Hexagon Tensor Processor, HTP), and the simulator of it that the package has on x86-64."""

PROVIDER = "QNNExecutionProvider"

PLUGIN = OptionalPackage(
    module="onnxruntime_qnn",
    distribution="onnxruntime-qnn",
    extra="qnn",
    feature="Qualcomm's NPU in onnxruntime",
)

_registering = threading.Lock()


class _BuildInfo(Protocol):
    qnn_version: str


class Plugin(Protocol):
    """The module onnxruntime_qnn."""

    __version__: str
    build_and_package_info: _BuildInfo

    def get_library_path(self) -> str:
        """Return the library that onnxruntime loads."""
        ...

    def get_qnn_htp_path(self) -> str:
        """Return Qualcomm's library of the NPU; on x86-64 it has the simulator."""
        ...


def load_plugin() -> Plugin:
    """Import the package; see `deploykit.optional.require`."""
    return require("onnxruntime_qnn", PLUGIN)


def sdk_version() -> str:
    """Return the version of Qualcomm's SDK in the package, ``2.51.0``."""
    return load_plugin().build_and_package_info.qnn_version


def machine_tie() -> dict[str, str]:
    """Return what an engine that is built here is tied to beside its SoC: an older SDK does not read it."""
    return {"qnn_sdk": sdk_version()}


def provider_devices() -> Sequence[EpDevice]:
    """Return the plugin's devices here; it is loaded the first time, and stays loaded."""
    ort, plugin = load_onnxruntime(), load_plugin()
    with _registering:
        found = [each for each in ort.get_ep_devices() if each.ep_name == PROVIDER]
        if not found:
            ort.register_execution_provider_library(PROVIDER, plugin.get_library_path())
            found = [each for each in ort.get_ep_devices() if each.ep_name == PROVIDER]
    return found


def devices() -> tuple[str, ...]:
    """Return `DEVICE` where there is an NPU, `SIMULATOR` on x86-64, and else nothing."""
    found, kinds = provider_devices(), load_onnxruntime().OrtHardwareDeviceType
    if any(each.device.type == kinds.NPU for each in found):
        return (DEVICE,)
    return (SIMULATOR,) if found and this_machine() == "x86_64" else ()
