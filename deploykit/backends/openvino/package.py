"""The package openvino, imported without the module that reports its use to the vendor."""

from __future__ import annotations

from deploykit.backends.openvino.protocols import OpenVINOPackage
from deploykit.optional import OptionalPackage, require
from deploykit.privacy import block_modules

PACKAGE = OptionalPackage(
    module="openvino",
    distribution="openvino",
    extra="openvino",
    feature="the openvino runtime",
    distributions=("openvino-nightly",),
    prepare="deploykit.backends.openvino.package:block_reports",
)


def load_openvino() -> OpenVINOPackage:
    """Import the package; see `deploykit.optional.require`."""
    return require("openvino", PACKAGE)


def block_reports() -> None:
    """Let openvino do without its reporter: it asks for an analytics host and writes into the home folder on import."""
    block_modules(("openvino_telemetry",))
