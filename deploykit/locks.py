"""Advisory locks on open files and folders: waited for a bounded time, with a word on what is waited for."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deploykit.errors import StorageError

LOCKS = Path("/proc/locks")

_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_QUIET_SECONDS = 1.0
_LONGEST_PAUSE = 0.25

logger = logging.getLogger(__name__)


class LockTimeout(StorageError):
    """Another process kept a lock for longer than was waited."""


def try_lock(handle: int, *, shared: bool = False) -> bool | None:
    """Take the lock of an open file, without waiting; a lock that this handle holds is changed to this kind.

    Returns:
        Whether it was taken; None on a file system without locks.
    """
    import fcntl  # POSIX only, and a bundle opens elsewhere too

    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _BUSY else None
    return True


def wait_for_lock(handle: int, path: Path, purpose: str, *, seconds: float, shared: bool = False) -> None:
    """Take the lock of an open file, or go on without one on a file system that has none.

    Args:
        handle: the open file or folder.
        path: its name, for messages.
        purpose: what the lock is for, such as ``"to write the bundle x"``.
        seconds: how long to wait.
        shared: together with others that only read.

    Raises:
        LockTimeout: another process has held it all the time.
    """
    begun = time.monotonic()
    pause, told = 0.002, False
    while try_lock(handle, shared=shared) is False:
        waited = time.monotonic() - begun
        if waited >= seconds:
            raise LockTimeout(
                f"{path} is locked by {_holder(handle)}, and was waited for {seconds:.3g} s {purpose}. "
                "Fix: let that process finish, or end it, and try again."
            )
        if not told and waited >= min(_QUIET_SECONDS, seconds / 2):
            told = True
            logger.warning("Waiting %s: %s is locked by %s", purpose, path, _holder(handle))
        time.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE)


@contextmanager
def locked_folder(folder: Path, purpose: str, *, seconds: float) -> Iterator[None]:
    """Hold the lock of a folder; see `wait_for_lock`."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        wait_for_lock(handle, folder, purpose, seconds=seconds)
        yield
    finally:
        os.close(handle)


@contextmanager
def locked_file(path: Path, purpose: str, *, seconds: float) -> Iterator[None]:
    """Hold the lock of a file that is made for it, and removed at the end.

    Raises:
        LockTimeout: another process has held it all the time.
        OSError: the file cannot be made.
    """
    end = time.monotonic() + seconds
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            wait_for_lock(handle, path, purpose, seconds=max(0.0, end - time.monotonic()))
            if _is_still(handle, path):
                break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder has removed it, so that it locks nothing any more
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: whoever waits for it sees that it is gone, and makes a new one
        os.close(handle)


def remove_free_lock(path: Path) -> bool:
    """Remove a lock file that no process holds; returns whether it did."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if try_lock(handle) is True and _is_still(handle, path):
                path.unlink()
                return True
        finally:
            os.close(handle)
    return False


def _is_still(handle: int, path: Path) -> bool:
    """Return whether a name still stands for an open file."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except OSError:
        return False


def _holder(handle: int) -> str:
    """Name the process that holds a lock, where Linux tells."""
    with suppress(OSError, ValueError, IndexError):
        status = os.fstat(handle)
        wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        for line in LOCKS.read_text().splitlines():
            fields = line.split()
            if fields[1] != "->" and fields[5] == wanted:
                return f"process {fields[4]}{_name_of(fields[4])}"
    return "another process"


def _name_of(pid: str) -> str:
    with suppress(OSError):
        words = (Path("/proc") / pid / "cmdline").read_bytes().split(b"\0")
        text = " ".join(word.decode(errors="replace") for word in words if word)
        return f" ({ascii(text[:80])[1:-1]})" if text else ""
    return ""
