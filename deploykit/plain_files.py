"""Reading files that others may have laid: plain files only, of a bounded size, and never a wait for a writer."""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

_PIECE = 1 << 20

_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotPlainFile(ValueError):
    """A name stands for something else than a plain file: ``kind`` says what."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"{kind}; expected a plain file")
        self.kind = kind


class FileTooLarge(ValueError):
    """A file has more bytes than what it should hold could have."""


def kind_of(mode: int) -> str | None:
    """Say in words what a mode of ``stat`` stands for; None for a plain file."""
    return None if stat.S_ISREG(mode) else next((kind for is_kind, kind in _KINDS if is_kind(mode)), "a special file")


def open_plain(path: Path, *, follow: bool = False) -> BinaryIO:
    """Open a plain file for reading, in binary; a pipe without a writer or a device is refused, not waited for.

    Args:
        path: the file.
        follow: also through a symbolic link, to a plain file.

    Raises:
        NotPlainFile: something else has the name.
        OSError: nothing has it, or it cannot be read.
    """
    status = path.stat() if follow else path.lstat()  # before opening: some devices act when they are opened
    _check_plain(status.st_mode)
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    handle = os.open(path, flags)
    try:
        _check_plain(os.fstat(handle).st_mode)
        return os.fdopen(handle, "rb")
    except BaseException:
        with suppress(OSError):
            os.close(handle)
        raise


def read_plain(path: Path, limit: int, *, follow: bool = False) -> bytes:
    """Read a plain file of at most ``limit`` bytes.

    Raises:
        NotPlainFile: something else has the name.
        FileTooLarge: it has more bytes.
        OSError: nothing has it, or it cannot be read.
    """
    with open_plain(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > limit else file.read(limit + 1)
    if size > limit or len(data) > limit:
        raise FileTooLarge(f"{max(size, len(data))} bytes or more; expected at most {limit}")
    return data


def digest_of(file: BinaryIO) -> str:
    """Return the SHA-256 in hex of what is left in an open file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


def _check_plain(mode: int) -> None:
    kind = kind_of(mode)
    if kind is not None:
        raise NotPlainFile(kind)
