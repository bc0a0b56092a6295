"""What deploykit calls of torch's loader of AOTInductor packages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class PackageRunner(Protocol):
    """``torch._C._aoti.AOTIModelContainerRunnerCpu``."""

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Compute flat outputs from flat inputs."""
        ...

    def get_call_spec(self) -> Sequence[str]:
        """Return how inputs and outputs were nested, as torch's pytree writes it."""
        ...
