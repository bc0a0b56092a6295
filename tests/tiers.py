"""How far a tier of the tests searches: ``make test-all`` tries more examples than ``make test``, and new ones."""

from __future__ import annotations

import os

WHOLE = os.environ.get("HYPOTHESIS_PROFILE") == "default"
"""Whether these are all tests."""


def examples(quick: int, whole: int) -> int:
    """How many examples a search tries in this tier."""
    return whole if WHOLE else quick
