"""The package executorch, which writes engines and runs them beside torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from deploykit.optional import OptionalPackage, require

if TYPE_CHECKING:
    from deploykit.backends.executorch.protocols import Library

PACKAGE = OptionalPackage(
    module="executorch", distribution="executorch", extra="executorch", feature="the executorch runtime"
)


def load_library() -> Library:
    """Import the bindings of the C++ runtime, which need torch's libraries; see `deploykit.optional.require`.

    The package's own Python interface imports its exporter first, for ten seconds.
    """
    require("torch")
    return cast("Library", require("executorch.extension.pybindings._C", PACKAGE))
