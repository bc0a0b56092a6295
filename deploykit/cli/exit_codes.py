"""Exit codes, so that a pipeline can tell a drift from a damaged file, and both from what this machine lacks."""

from __future__ import annotations

from deploykit.errors import (
    BundleError,
    CalibrationError,
    DeployKitError,
    DeviceUnavailable,
    IncompatibleEngine,
    MissingDependency,
    ParityError,
    SpecError,
    StorageError,
)

DRIFT = 1
"""An engine's numbers, or a bundle's changes, are outside what is allowed."""
BAD_USAGE = 2
DAMAGED = 3
MISSING_PACKAGE = 4
NO_DEVICE = 5
FAILED = 6

_BY_ERROR: tuple[tuple[type[DeployKitError], int], ...] = (
    (ParityError, DRIFT),
    (SpecError, BAD_USAGE),
    (CalibrationError, BAD_USAGE),
    (StorageError, FAILED),  # a bundle error, and the disk's fault
    (BundleError, DAMAGED),
    (MissingDependency, MISSING_PACKAGE),
    (DeviceUnavailable, NO_DEVICE),
    (IncompatibleEngine, NO_DEVICE),
)


def failure(error: BaseException, message: str) -> dict[str, object]:
    """Return what ``--json`` says of an error."""
    return {"error": type(error).__name__, "message": message, "exit_code": exit_code_of(error)}


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a command that an error ended."""
    return next((code for kind, code in _BY_ERROR if isinstance(error, kind)), FAILED)
