"""The packages ai-edge-litert, which runs engines, and litert-torch, which writes them."""

from __future__ import annotations

from types import ModuleType

from deploykit.optional import OptionalPackage, require

PACKAGE = OptionalPackage(
    module="ai_edge_litert",
    distribution="ai-edge-litert",
    extra="litert",
    feature="the litert runtime",
    distributions=("ai-edge-litert-nightly",),
)

CONVERTER = OptionalPackage(
    module="litert_torch",
    distribution="litert-torch",
    extra="litert-export",
    feature="writing LiteRT engines",
    distributions=("litert-torch-nightly",),
)


def load_interpreter() -> ModuleType:
    """Import the module of the interpreter; see `deploykit.optional.require`."""
    return require("ai_edge_litert.interpreter", PACKAGE)
