"""The master graphs and plans of tests/calibration, for the tests of dialects."""

from __future__ import annotations

from tests.calibration.conftest import case, gated, lite0, residual, tokens, windows

__all__ = ["case", "gated", "lite0", "residual", "tokens", "windows"]
