"""Every error that deploykit raises on purpose.

::

    DeployKitError
    ├── SpecError            unknown name, bad option, bad input to a model
    │   ├── UnknownLevel     a feature level that is not there; also a KeyError
    │   └── ImageError       an image is missing, damaged or not of a kind that is read; also a CalibrationError
    ├── WeightsError         a checkpoint is missing, unreadable or does not fit
    ├── MissingDependency    an optional package is not installed
    ├── FusionError          a fusion pass broke its numeric contract
    ├── CalibrationError     images or settings from which no INT8 ranges can be had
    ├── ExportError          a graph could not be exported or lowered
    │   └── QuantizedModelError  another quantizer's model holds something that a plan has no place for
    ├── BundleError          a bundle is corrupt, tampered, partial or from a newer schema
    │   ├── StorageError     a folder cannot be read or written here: disk, permissions, open files, a lock
    │   └── UntrustedEngine  machine code from elsewhere (trust=False), or not signed by whom it should be
    ├── TransferError        a bundle could not be pushed to or pulled from a model hub
    ├── IncompatibleEngine   an engine was built for another runtime version or device
    │   └── EngineMismatch   a file is not the one that its bundle's manifest describes (a BundleError too)
    ├── DeviceUnavailable    the device asked for is not here
    └── ParityError          an engine's numbers are outside their budget

    DeployKitWarning
    ├── WeightsWarning       a checkpoint holds more than was taken, or leaves something unsaid
    ├── CalibrationWarning   images that calibrate badly: few, identical, constant or not normalised
    ├── TrustWarning         an engine is machine code that this user did not make here
    ├── TargetWarning        an engine was made for another machine than this one
    └── SaturationWarning    an INT8 engine on a processor whose products of 8-bit weights saturate

A message says what was observed, what was expected, and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from deploykit.printable import printable


class DeployKitError(Exception):
    """Root of the tree: catch it to catch everything that deploykit raises on purpose."""

    def __str__(self) -> str:
        # A message names files and quotes manifests, which anybody may have written.
        return printable(super().__str__())


class SpecError(DeployKitError, ValueError):
    """An unknown name, an option out of range, or images that the model cannot take."""


class UnknownLevel(SpecError, KeyError):
    """A level that features do not have, by name or index; a KeyError too, as of any dict."""

    def __str__(self) -> str:
        return Exception.__str__(self)  # KeyError's own would quote the message


class WeightsError(DeployKitError):
    """A checkpoint is missing, unreadable, or does not fit the backbone."""


class MissingDependency(DeployKitError, ImportError):
    """An optional package is not installed.

    Attributes:
        package: the name to import.
        command: the pip command that installs it.
    """

    def __init__(self, message: str, *, package: str, command: str) -> None:
        super().__init__(message)
        self.package = package
        self.command = command


class FusionError(DeployKitError):
    """A fusion pass failed, or changed the numbers by more than it promised."""


class CalibrationError(DeployKitError):
    """Images or settings from which no INT8 ranges can be had."""


class ImageError(SpecError, CalibrationError):
    """An image that cannot be read: missing, damaged, not an image, or in a mode without a known white.

    A SpecError where it is a model's input, and a CalibrationError where a model is calibrated with it.
    """


class DeployKitWarning(UserWarning):
    """Root of the warnings: something that deploykit did, or saw, and that the caller should know."""


class WeightsWarning(DeployKitWarning):
    """A checkpoint holds more than was taken, or does not say something that was then assumed."""


class CalibrationWarning(DeployKitWarning):
    """Images that give ranges, but bad ones: few, identical, constant or not normalised."""


class SaturationWarning(DeployKitWarning):
    """An INT8 engine was opened on a processor where its products can saturate, and its numbers differ."""


class TargetWarning(DeployKitWarning):
    """An engine was opened on a machine that is not its target: its speed, and perhaps its numbers, are others."""


class TrustWarning(DeployKitWarning):
    """An engine that is machine code was opened, and this user's deploykit did not make it on this machine."""


class ExportError(DeployKitError):
    """A graph could not be exported, quantized or lowered to a runtime's form."""


class QuantizedModelError(ExportError):
    """A model that another tool quantized, of which a quantization plan cannot be made."""


class BundleError(DeployKitError):
    """A bundle is corrupt, tampered with, incomplete, or written by a newer deploykit."""


class StorageError(BundleError):
    """A folder cannot be read or written here: a full disk, permissions, too many open files, or a lock.

    Nothing is known to be wrong with the bundle itself.
    """


class UntrustedEngine(BundleError):
    """An engine that the caller does not trust.

    It is machine code that this user's deploykit did not make here, or not signed by the signer who was asked for.
    """


class TransferError(DeployKitError):
    """A bundle could not be pushed to or pulled from a model hub: the network, the server, or the rights there."""


class IncompatibleEngine(DeployKitError):
    """An engine was built for another runtime version or another device."""


class EngineMismatch(BundleError, IncompatibleEngine):
    """A file of a bundle is not the one that the manifest describes: damaged, or replaced while it was read."""


class DeviceUnavailable(DeployKitError):
    """The device that was asked for is not on this machine."""


class ParityError(DeployKitError):
    """An engine's numbers are outside their budget.

    Attributes:
        levels: the SQNR of each level in dB, where it was measured.
    """

    def __init__(self, message: str, *, levels: Mapping[str, float] | None = None) -> None:
        super().__init__(message)
        self.levels = dict(levels or {})


_TERMINAL_CODES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


def plain_reason(error: BaseException, *, limit: int = 300) -> str:
    """Say in one line why another library failed: the first line of its message, without terminal codes.

    At most ``limit`` characters; the type's name where there is no message.
    """
    lines = [line.strip() for line in _TERMINAL_CODES.sub("", str(error)).splitlines() if line.strip()]
    text = (lines[0] if lines else type(error).__name__).rstrip(".")
    return text if len(text) <= limit else f"{text[:limit].rstrip()} ..."


def nearest(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Say which known spellings are nearest to ``name``, as the end of a message.

    Returns ``"Did you mean 'resnet50', 'resnet101'?"``, or the list of all known
    names when none is near and the list is short.
    """
    names = sorted(set(known))
    import difflib  # only a message needs it, and every start would pay for it

    close = next(filter(None, (difflib.get_close_matches(each, names, limit) for each in (name, name.lower()))), [])
    if not close and len(name) > 2:
        close = [each for each in names if each.startswith(name.lower())][:limit]
    if close:
        return f"Did you mean {', '.join(map(repr, close))}?"
    if len(names) <= 24:
        return f"Known: {', '.join(names)}."
    return f"{len(names)} names are known, from {names[0]!r} to {names[-1]!r}."
