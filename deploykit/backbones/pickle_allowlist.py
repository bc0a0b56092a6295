"""What a torch file may hold beside tensors: a visible table of names, each with what stands in for it.

``torch.load(weights_only=True)`` knows tensors and plain containers. Training scripts also save their
arguments, paths and NumPy scalars. Each name below is replaced by something inert, so that reading a file
runs no constructor but torch's and these; every other name is refused.
"""

from __future__ import annotations

import argparse
import pathlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from deploykit.arrays import Array

_NUMPY_KINDS = "biufc?SU"
"""The kinds of NumPy values that are read: numbers and strings; no objects, no structures."""


class Inert:
    """A value that nobody needs: keeps what it was made of, does nothing."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.arguments = (*self.arguments, state)


class PlainDtype:
    """A NumPy dtype of numbers or strings, by its code."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = str(code)
        self.order = "="

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.order = str(state[1])

    def dtype(self) -> np.dtype[np.generic]:
        """Return the dtype; raises ValueError where it is not one of numbers or strings."""
        found: np.dtype[np.generic] = np.dtype(f"{self.order}{self.code}")
        if found.kind not in _NUMPY_KINDS or found.hasobject:
            raise ValueError(f"a NumPy array of {found}")
        return found


class PlainArray:
    """A NumPy array of numbers or strings."""

    def __init__(self, *_: object) -> None:
        self.value: Array = np.zeros(0)

    def __setstate__(self, state: tuple[object, Iterable[int], PlainDtype, bool, bytes]) -> None:
        _, shape, kind, fortran, data = state
        flat = np.frombuffer(bytes(data), kind.dtype())
        self.value = flat.reshape(tuple(shape), order="F" if fortran else "C")


def _scalar(kind: PlainDtype, data: bytes) -> np.generic:
    value: np.generic = np.frombuffer(bytes(data), kind.dtype(), count=1)[0]
    return value


def _empty_dict(*_: object) -> dict[str, object]:
    return {}


_STAND_INS: dict[str, Callable[..., object]] = {
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": argparse.Namespace,
    "collections.defaultdict": _empty_dict,
    "builtins.frozenset": frozenset,
    "numpy.dtype": PlainDtype,
    "numpy.ndarray": PlainArray,
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": PlainArray for core in ("core", "_core")},
    **{f"builtins.{name}": Inert for name in ("bool", "dict", "float", "int", "list", "range", "slice", "str")},
    **{f"datetime.{name}": Inert for name in ("date", "datetime", "time", "timedelta", "timezone")},
    **{
        f"{module}.{name}": pathlib.PureWindowsPath if "Windows" in name else pathlib.PurePosixPath
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath")
    },
}

ALLOWED = tuple(_STAND_INS)
"""The names that a torch file may hold beside those that torch itself allows."""

_lock = threading.Lock()


@contextmanager
def allowed_globals() -> Iterator[None]:
    """Allow the table's names within; one thread at a time, since torch's list is the process's."""
    with _lock, torch.serialization.safe_globals([(stand_in, name) for name, stand_in in _STAND_INS.items()]):
        yield
