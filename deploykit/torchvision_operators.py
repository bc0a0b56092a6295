"""Let timm be imported beside a torchvision whose compiled operators do not load.

timm imports torchvision, whose only wheels on the package index are CUDA builds. Beside a CPU build of
torch their library of operators does not load, and ``import torchvision`` then fails on the first operator
that it describes (``operator torchvision::nms does not exist``). timm's backbones use none of them, so
declaring their signatures is enough; calling one still raises, since it has no kernel.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
import threading
from typing import Any

from deploykit.errors import DeployKitError

SIGNATURES: dict[str, str] = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
"""The operators that torchvision describes to torch without having loaded them."""

_MISSING = re.compile(r"operator torchvision::(\w+) does not exist")
_lock = threading.Lock()
_declared: list[Any] = []
"""A declaration ends with its library object, so these stay."""


def declare_missing_operators() -> None:
    """Make ``import torchvision`` work where only its compiled operators are missing.

    Does nothing where torchvision is absent, or imports as it is.

    Raises:
        ModuleNotFoundError: a package that torchvision imports is not installed.
        DeployKitError: torchvision is installed and does not import for another reason.
    """
    with _lock:
        if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
            return
        for _ in range(len(SIGNATURES) + 1):
            try:
                importlib.import_module("torchvision")
            except ModuleNotFoundError:
                raise  # a package that torchvision needs, which the caller names
            except (ImportError, OSError, RuntimeError) as error:
                missing = _MISSING.search(str(error))
                if missing is None or missing[1] not in SIGNATURES:
                    raise DeployKitError(
                        f"timm needs torchvision, which is installed but does not import ({error}). "
                        f"Fix: install the release that goes with this torch: {install_command()}"
                    ) from error
                _declare(missing[1])
            else:
                return


def _declare(operator: str) -> None:
    import torch

    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(operator + SIGNATURES[operator])
    _declared.append(library)


def install_command() -> str:
    """The pip command for the torchvision of the installed torch (2.13 goes with 0.28), which leaves torch alone."""
    try:
        version = re.match(r"2\.(\d+)", importlib.metadata.version("torch"))
    except importlib.metadata.PackageNotFoundError:
        version = None
    wanted = f"'torchvision==0.{int(version[1]) + 15}.*'" if version else "torchvision"
    return f"pip install --no-deps {wanted}"
