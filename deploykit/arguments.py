"""Check what the public functions and settings are given against their annotations, before any work."""

from __future__ import annotations

import builtins
import collections.abc
import contextlib
import functools
import numbers
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Literal, Union

from deploykit.errors import SpecError, nearest
from deploykit.unset import UNSET, Unset

_SHOWN = 80
_SCALARS: dict[object, tuple[type, str]] = {
    bool: (bool, "True or False"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "a text"),
    bytes: (bytes, "bytes"),
    type(None): (type(None), "None"),
}
_KINDS: dict[object, str] = {
    os.PathLike: "a path",
    Mapping: "a dict",
    dict: "a dict",
    **dict.fromkeys((collections.abc.Sequence, tuple, list), "a list or tuple"),
}


class _Open:
    """Stands for a name that is not imported here, such as a type of an optional package: it is never compared."""

    def __or__(self, other: object) -> _Open:
        return self

    __ror__ = __or__

    def __getitem__(self, key: object) -> _Open:
        return self

    def __getattr__(self, name: str) -> _Open:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self) -> None:
        """Pass for a type where `typing` asks for one."""


_OPEN = _Open()


class _Names(dict[str, object]):
    """The names of a module, in which every name stands for something."""

    def __missing__(self, name: str) -> object:
        return vars(builtins).get(name, _OPEN)


def check_arguments(function: Callable[..., object], given: Mapping[str, object]) -> None:
    """Refuse arguments of another type than the annotation says.

    Types that are not imported here, protocols and element types are left to whoever uses the value.

    Args:
        function: what was called, or whose ``__init__`` it was.
        given: its arguments by name, as ``locals()`` holds them in its first line; other names are passed over.

    Raises:
        SpecError: names each such argument, what it is and what was expected.
    """
    _refuse({name: (given[name], hint) for name, hint in _hints(function).items() if name in given})


def check_fields(settings: object) -> None:
    """Refuse fields of a dataclass that have another type than the annotation says.

    Raises:
        SpecError: names each such field, what it is and what was expected.
    """
    kind: Callable[..., object] = type(settings)
    hints = _hints(kind)
    _refuse({name: (getattr(settings, name), hint) for name, hint in hints.items() if hasattr(settings, name)})


def _refuse(values: Mapping[str, tuple[object, object]]) -> None:
    wrong = [
        f"{name} is {shown(value)}; expected {_expected(hint)}"
        for name, (value, hint) in values.items()
        if not _fits(value, hint)
    ]
    if wrong:
        raise SpecError(f"{'. '.join(wrong)}.")


def shown(value: object) -> str:
    """Return a value and its type on one short line."""
    kind = type(value).__name__
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"{kind} of shape {tuple(shape)}"
    try:
        text = repr(value)
    except Exception:  # a stranger's __repr__
        return f"a {kind}"
    return f"{text if len(text) <= _SHOWN else text[:_SHOWN] + '...'} ({kind})"


@functools.cache
def _hints(function: Callable[..., object]) -> dict[str, object]:
    """Return the annotation of each argument or field; none for those that cannot be read here."""
    names = _Names(vars(sys.modules[function.__module__]))
    annotations = dict(getattr(function, "__annotations__", {}))
    hints: dict[str, object] = {}
    for name, text in annotations.items():
        if name == "return" or "ClassVar" in str(text):
            continue
        with contextlib.suppress(Exception):  # what `typing` cannot read is not compared
            holder = types.SimpleNamespace(__annotations__={name: text})
            hints[name] = typing.get_type_hints(holder, globalns={}, localns=names)[name]
    return hints


def _fits(value: object, hint: object) -> bool:
    """Return whether a value may be of a type; True where that cannot be told, and for what was not given."""
    hint = _bound(hint)
    if hint in (typing.Any, object, None) or isinstance(hint, _Open) or isinstance(value, Unset):
        return True
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is Literal:  # which of its texts it is, whoever takes it says, with the nearest spelling
        return any(value is each or (isinstance(value, str) and isinstance(each, str)) for each in arguments)
    return _is_instance(value, origin or hint) and _holds(value, arguments)


def _holds(value: object, arguments: tuple[object, ...]) -> bool:
    """Return whether a list holds what it should, where that is a class of ours; its reader checks the rest."""
    if not _is_ours(arguments) or not _is_sequence(value):
        return True
    return all(_fits(each, arguments[0]) for each in typing.cast("collections.abc.Sequence[object]", value))


def _is_ours(arguments: tuple[object, ...]) -> bool:
    """Return whether a type holds objects of one of deploykit's classes."""
    return bool(arguments) and str(getattr(arguments[0], "__module__", "")).startswith("deploykit.")


def _bound(hint: object) -> object:
    """Return what a type variable stands for; None: anything."""
    return hint.__bound__ if isinstance(hint, typing.TypeVar) else hint


def _is_instance(value: object, base: object) -> bool:
    if base in _SCALARS:
        kind = _SCALARS[base][0]
        return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if base in (collections.abc.Sequence, tuple, list):
        return _is_sequence(value)
    return not isinstance(base, type) or bool(getattr(base, "_is_protocol", False)) or isinstance(value, base)


def _is_sequence(value: object) -> bool:
    """Return whether a value holds others in order: a list, a tuple, a range, or an array of one dimension."""
    if isinstance(value, (str, bytes, Mapping)):
        return False
    return isinstance(value, collections.abc.Sequence) or getattr(value, "ndim", 0) == 1


def _expected(hint: object) -> str:
    """Say what a type means for whoever passes a value."""
    hint = _bound(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        named = dict.fromkeys(_expected(each) for each in arguments if each != Literal[UNSET])
        return " or ".join(named)
    if origin is Literal:
        return " or ".join(repr(each) for each in arguments if each is not UNSET)
    base = origin or hint
    if _is_ours(arguments) and base in _KINDS:
        return f"{_KINDS[base]} of {getattr(arguments[0], '__name__', arguments[0])}"
    return _SCALARS[base][1] if base in _SCALARS else _KINDS.get(base, f"a {getattr(base, '__name__', str(base))}")


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        SpecError: it is not; with the nearest valid spellings.
    """
    if value not in choices:
        raise SpecError(f"{field} is {value!r}. {nearest(str(value), choices)}")


def check_only(settings: object, only: Mapping[str, object], *, beside: str) -> None:
    """Refuse settings that do not combine with another one.

    Args:
        settings: a dataclass whose fields may be `UNSET`.
        only: the value that each field may have.
        beside: the other setting, for people.

    Raises:
        SpecError: a field is neither unset nor that value.
    """
    for name, value in only.items():
        if getattr(settings, name) not in (UNSET, value):
            raise SpecError(
                f"{name} is {getattr(settings, name)!r}, which does not go with {beside}: expected {value!r}. Fix: "
                f"leave {name} out, or choose another recipe."
            )
