"""Folders of the store: whose they are, who uses them, and what ended processes left in them."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import time
from contextlib import suppress
from pathlib import Path

from deploykit.locks import remove_free_lock, try_lock

PARTIAL, ASIDE, LOCK = ".partial", ".aside", ".lock"

_LITTER = re.compile(rf"\.(?P<key>[0-9a-f]{{64}})\.[0-9a-f]{{8}}({PARTIAL}|{ASIDE})")
_LOCK_NAME = re.compile(rf"\.(?P<key>[0-9a-f]{{64}}){re.escape(LOCK)}")
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_IN_USE_SECONDS = 3600.0
"""On a file system without locks: an entry that was used so lately counts as in use."""


def own_root(chosen: Path) -> Path:
    """Return the store's folder: the one chosen, or this user's own below it where others could write there."""
    try:
        status = chosen.stat()
    except OSError:
        return chosen
    shared = status.st_uid != os.geteuid() or status.st_mode & _OTHERS_WRITE
    return chosen / f"user-{os.geteuid()}" if shared else chosen


def own_folder(folder: Path) -> Path:
    """Make a folder of this user alone, and return it.

    Raises:
        OSError: it cannot be made, or is another user's.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(f"{folder} is not a folder of user {os.geteuid()}")
    if stat.S_IMODE(status.st_mode) != 0o700:
        folder.chmod(0o700)
    return folder


def hold(folder: Path, *, shared: bool) -> int | None:
    """Open a folder and take its lock without waiting.

    Args:
        folder: an entry of the store.
        shared: to read it; else to remove it.

    Returns:
        The open handle, which holds the lock until it is closed; None where there is no such folder, or another
        process has it.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    taken = try_lock(handle, shared=shared)
    if taken is None:
        taken = shared or time.time() - os.fstat(handle).st_mtime > _IN_USE_SECONDS
    if taken and _is_still(handle, folder):
        return handle
    os.close(handle)
    return None


def put_in_place(partial: Path, entry: Path) -> None:
    """Rename a whole entry to its place; one that is there goes, whether or not it is whole."""
    aside = _aside(entry)
    with suppress(FileNotFoundError):
        entry.rename(aside)
    partial.rename(entry)
    _remove(aside)


def remove_entry(entry: Path) -> bool:
    """Remove what has an entry's name and is not in use; returns whether it is gone."""
    handle = hold(entry, shared=False)
    if handle is None and entry.is_dir() and not entry.is_symlink():
        return False
    try:
        aside = _aside(entry)
        with suppress(OSError):
            entry.rename(aside)
            _remove(aside)
    finally:
        if handle is not None:
            os.close(handle)
    return not entry.exists()


def litter_of(folder: Path) -> list[Path]:
    """Return what ended processes left in a folder of entries: half-made entries and locks that nobody holds."""
    return [path for path, _ in _litter(folder)]


def sweep(folder: Path, *, but: str = "") -> int:
    """Remove what ended processes left in a folder of entries; returns how many.

    ``but`` is the key whose lock the caller holds: only what others left of it goes.
    """
    removed = 0
    for path, key in _litter(folder):
        lock = folder / f".{key}{LOCK}"
        if path == lock:
            removed += key != but and remove_free_lock(path)
        elif key == but or remove_free_lock(lock) or not lock.exists():  # its maker holds the lock all the while
            _remove(path)
            removed += not path.exists()
    return removed


def _litter(folder: Path) -> list[tuple[Path, str]]:
    try:
        names = sorted((path.name for path in folder.iterdir()), key=lambda name: name.endswith(LOCK))
    except OSError:
        return []
    matches = [(name, _LITTER.fullmatch(name) or _LOCK_NAME.fullmatch(name)) for name in names]
    return [(folder / name, match["key"]) for name, match in matches if match]


def _aside(entry: Path) -> Path:
    return entry.with_name(f".{entry.name}.{secrets.token_hex(4)}{ASIDE}")


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_still(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except OSError:
        return False
