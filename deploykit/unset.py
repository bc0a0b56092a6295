"""UNSET: the value of an option that was not given, where its default could also be asked for by name."""

from __future__ import annotations

from enum import Enum
from typing import Final, Literal


class Unset(Enum):
    """The type of `UNSET`; compare with ``is``, which mypy narrows."""

    UNSET = "unset"

    def __repr__(self) -> str:
        return "UNSET"

    __str__ = __repr__


UNSET: Final[Literal[Unset.UNSET]] = Unset.UNSET
"""Not given. It is true, equal to itself alone, and survives copying and pickling."""
