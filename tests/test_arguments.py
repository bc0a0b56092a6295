"""Arguments are compared with their annotations, as far as these can be read without optional packages."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pytest

import deploykit
from deploykit.arguments import _hints, _Open, check_arguments, check_fields
from deploykit.errors import SpecError
from deploykit.unset import UNSET, UnsetType

if TYPE_CHECKING:
    from nowhere import Stranger  # type: ignore[import-not-found]


def taking(
    count: int = 1,
    share: float | None = None,
    name: str | os.PathLike[str] = "",
    flag: bool = False,
    kind: Literal["one", "two"] = "one",
    sides: Sequence[int] = (),
    table: Mapping[str, int] | UnsetType = UNSET,
    stranger: Stranger | None = None,
    anything: Any = None,
) -> None:
    check_arguments(taking, locals())


CHECKED_WHERE_USED = {"name", "model", "module", "images", "calibration", "plan", "labels", "against", "backbone"}
"""Unions with types of optional packages: whoever takes the value compares it."""

RIGHT = {
    "count": [0, -3, np.int64(4), np.uint8(1)],
    "share": [None, 1, 0.5, np.float32(2), float("nan")],
    "name": ["", "text", Path("here")],
    "flag": [True, False],
    "kind": ["one", "another"],  # which choice it is, whoever takes it says, with the nearest spelling
    "sides": [(), [1, 2], range(3), np.arange(3), ["text"]],
    "table": [{}, {"a": 1}, UNSET],
    "stranger": [None, 3, object()],
    "anything": [object(), None],
}
WRONG = {
    "count": [True, 1.5, "1", None, np.arange(3), [], 1j],
    "share": ["0.5", True, [], np.zeros((2, 2)), Path("here")],
    "name": [None, 3, b"bytes", ["a"]],
    "flag": [1, None, "yes", np.zeros(2)],
    "kind": [3, None, np.zeros(3)],
    "sides": ["text", 3, None, {1: 2}, np.zeros((2, 2)), {1, 2}],
    "table": [[], "a", 3, None],
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_fits_passes(name):
    for value in RIGHT[name]:
        taking(**{name: value})


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name):
    for value in WRONG[name]:
        with pytest.raises(SpecError, match=rf"^{name} is .*; expected "):
            taking(**{name: value})


def test_every_wrong_argument_is_named_with_what_was_expected():
    with pytest.raises(SpecError) as caught:
        taking(count="two", sides=3, table=np.zeros((2, 3)))
    assert str(caught.value) == (
        "count is 'two' (str); expected a whole number. sides is 3 (int); expected a list or tuple. "
        "table is ndarray of shape (2, 3); expected a dict."
    )


def test_the_fields_of_a_dataclass_are_checked():
    @dataclass(frozen=True)
    class Settings:
        kind: ClassVar[str] = "settings"
        count: int = 1
        share: float | None = None

        def __post_init__(self) -> None:
            check_fields(self)

    assert Settings(count=3, share=0.5).count == 3
    with pytest.raises(SpecError, match="share is 'x'"):
        Settings(share="x")


@pytest.mark.parametrize("name", sorted(name for name in deploykit.__all__ if name.islower() and name[0] != "_"))
def test_no_argument_of_a_public_function_is_left_out(name):
    function = getattr(deploykit, name)
    hints = _hints(function)
    unread = {each for each in inspect.signature(function).parameters if isinstance(hints.get(each), _Open)}
    assert not unread - CHECKED_WHERE_USED
