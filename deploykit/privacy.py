"""Keeps the runtimes from phoning home, before any of them is imported; see docs/security.md."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

_SWITCHES = {"ORT_DISABLE_TELEMETRY": "1", "RAY_USAGE_STATS_ENABLED": "0"}
"""Variables that runtimes read when they are imported. A value that the user has set stands."""


def silence_runtimes() -> None:
    """Switch usage reports off where a variable does it, in this process and in those that it starts.

    A runtime that is imported already keeps its own setting.
    """
    for name, value in _SWITCHES.items():
        os.environ.setdefault(name, value)


def block_modules(names: Iterable[str]) -> None:
    """Let nothing import some modules from now on, which report to their vendor; those imported already stay."""
    for name in names:
        # None is how Python says that a module cannot be imported: whoever tries gets ImportError.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
