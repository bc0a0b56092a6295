"""The value of an option that was not given, which differs from every value that can be given."""

from __future__ import annotations

import enum
from typing import Final, Literal, TypeAlias, TypeVar


class Unset(enum.Enum):
    """The type of `UNSET`; an enum of one member, so that type checkers narrow it by ``is``."""

    UNSET = "UNSET"

    def __repr__(self) -> str:
        return "UNSET"

    __str__ = __repr__


UNSET: Final[Literal[Unset.UNSET]] = Unset.UNSET
"""Not given. It is true, equal to itself alone, and survives copying and pickling."""

UnsetType: TypeAlias = Literal[Unset.UNSET]

Value = TypeVar("Value")
Default = TypeVar("Default")


def or_unset(value: Value | None) -> Value | UnsetType:
    """Return the value, or `UNSET` for None, where None stands for "not given", as on a command line."""
    return UNSET if value is None else value


def given(value: Value | UnsetType, default: Default) -> Value | Default:
    """Return the value, or the default where none was given."""
    return default if isinstance(value, Unset) else value
