"""Standard streams that are closed, full, or take only ASCII: the command still ends with the right exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PIPE_CLOSED = 141
"""What a shell says of a program that wrote to a pipe that nobody reads any more."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OutputLost(Exception):
    """Standard output could not be written: the message says why."""


@contextmanager
def standard_streams() -> Iterator[None]:
    """Make standard output usable, and see at the end that all of it was written.

    Closed streams lead nowhere, characters that a stream cannot write are written as escapes.

    Raises:
        BrokenPipeError: nobody reads standard output any more.
        OutputLost: it cannot be written, to a full disk, say.
    """
    _open_closed()
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if not _is_of_output(error):
            raise
        _lead_nowhere()
        if error.errno == errno.EPIPE:
            raise
        raise OutputLost(f"standard output cannot be written: {error}") from error


def _open_closed() -> None:
    """Open the null device in place of each standard stream that is closed, so that no other file takes its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def _is_of_output(error: OSError) -> bool:
    """Return whether an error comes from writing to a stream: it names no file, and the stream fails again."""
    if error.filename is not None:
        return False
    if error.errno == errno.EPIPE:
        return True
    try:
        if error.errno in _FULL:
            sys.stdout.write("\n")  # of a write above the buffer's size nothing is left that a flush would try again
        sys.stdout.flush()
    except (OSError, ValueError):
        return True
    return False


def _lead_nowhere() -> None:
    """Let the interpreter's own flush at its end succeed."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
