"""The package coremltools, which writes engines everywhere and runs them on macOS."""

from __future__ import annotations

from deploykit.optional import OptionalPackage

PACKAGE = OptionalPackage(
    module="coremltools", distribution="coremltools", extra="coreml", feature="the coreml runtime"
)

PACKAGE_FOLDER = "model.mlpackage"

SYSTEMS = ("Darwin",)
"""Core ML is a part of macOS, iOS and their kin; Python has it on macOS alone."""
