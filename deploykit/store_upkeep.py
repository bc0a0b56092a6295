"""What the store holds, and keeping it small: the limit, damaged entries, and what ended processes left."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deploykit.errors import SpecError
from deploykit.store_entry import DamagedEntry, check, read_record
from deploykit.store_folder import litter_of, remove_entry, sweep

LIMIT = "DEPLOYKIT_CACHE_LIMIT"
DEFAULT_LIMIT = 20_000_000_000
"""Bytes: some two hundred engines of the size of a ResNet-50 in FP32."""

_UNITS = {"": 1, "B": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SIZE = re.compile(r"(?P<number>\d+(\.\d*)?|\.\d+)\s*(?P<unit>[KMGT]?)(?P<binary>I?)B?", re.IGNORECASE)
_KEY = re.compile(r"[0-9a-f]{64}")

_OLD_NAME = re.compile(
    r"[0-9a-f]{64}\.(lock|jsonl?|recipes\.json|statistics(\.partial)?)"
    r"|[0-9a-f]{24}\.(json|\d+)|(plan-|tmp)\w{8}|\w+-timing\.cache"
)
"""What version 0.1.0 kept beside folders without a record, and no version reads any more."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StoreEntry:
    """An entry as it was found.

    ``bytes`` are those of its files; ``used`` is when it was last made or read, in seconds since 1970; ``problem``
    is why it would not be used, and None where none is known.
    """

    kind: str
    key: str
    title: str
    bytes: int
    used: float
    path: str
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What was removed, and the bytes that are left."""

    entries: tuple[StoreEntry, ...] = ()
    litter: int = 0
    freed: int = 0
    left: int = 0


def size_limit() -> int | None:
    """Return the limit of the store in bytes, from ``DEPLOYKIT_CACHE_LIMIT``; None: no limit.

    Raises:
        SpecError: the variable is not a size.
    """
    text = os.environ.get(LIMIT, "").strip()
    return parse_size(text, LIMIT) if text else DEFAULT_LIMIT


def parse_size(text: str, name: str) -> int | None:
    """Parse ``"500MB"``, ``"20 GB"``, ``"1.5GiB"``, a number of bytes, or ``"none"``: no limit.

    Raises:
        SpecError: it is none of them; ``name`` is what the message calls it.
    """
    if text.lower() in ("none", "unlimited"):
        return None
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise SpecError(f"{name} is {text!r}; expected a size such as '20GB', '500MB', '1.5GiB', or 'none'.")
    factor = _UNITS[match["unit"].upper()]
    if match["binary"]:
        factor = 1024 ** "KMGT".index(match["unit"].upper()) * 1024 if match["unit"] else 1
    return int(float(match["number"]) * factor)


def entries(root: Path, *, verify: bool = False) -> Iterator[StoreEntry]:
    """Yield every entry of a store, by kind and key.

    Args:
        root: the store's folder.
        verify: read every byte of each; else only whether its record is whole.
    """
    for path in _places(root):
        yield _entry(path, verify=verify)


def leftovers(root: Path) -> list[Path]:
    """Return what ended processes and version 0.1.0 left in a store."""
    found = []
    for kind in _folders(root):
        found += litter_of(kind)
        with suppress(OSError):
            found += sorted(path for path in kind.iterdir() if _OLD_NAME.fullmatch(path.name))
    return found


def prune(root: Path, limit: int | None) -> Pruned:
    """Remove damaged entries, what was left behind, and the least recently used entries above a limit in bytes."""
    before = {path: _bytes_below(path) for path in leftovers(root)}
    for path in before:
        if not path.name.startswith("."):
            _discard(path)
    for kind in _folders(root):
        sweep(kind)
    gone = [path for path in before if not os.path.lexists(path)]
    damaged = [entry for entry in entries(root, verify=True) if entry.problem and remove_entry(Path(entry.path))]
    evicted = evict(root, limit)
    removed = (*damaged, *evicted)
    freed = sum(entry.bytes for entry in removed) + sum(before[path] for path in gone)
    left = sum(entry.bytes for entry in entries(root))
    return Pruned(entries=removed, litter=len(gone), freed=freed, left=left)


def evict(root: Path, limit: int | None, *, keep: Path | None = None) -> tuple[StoreEntry, ...]:
    """Remove the least recently used entries until a store is within a limit; those in use stay, and ``keep``."""
    if limit is None:
        return ()
    sizes = {path: _bytes_below(path) for path in _places(root)}
    total, removed = sum(sizes.values()), []
    for path in sorted(sizes, key=_used):
        if total <= limit:
            break
        entry = _entry(path, verify=False)
        if path != keep and remove_entry(path):
            total -= sizes[path]
            removed.append(entry)
            logger.info("Removed the entry %s/%s to keep the cache within its limit", entry.kind, entry.key[:12])
    return tuple(removed)


def clear(root: Path) -> Pruned:
    """Remove every entry that is not in use, and what was left behind."""
    pruned = prune(root, None)
    removed = [entry for entry in entries(root) if remove_entry(Path(entry.path))]
    for kind in _folders(root):
        with suppress(OSError):
            kind.rmdir()
    return Pruned(
        entries=(*pruned.entries, *removed),
        litter=pruned.litter,
        freed=pruned.freed + sum(entry.bytes for entry in removed),
        left=sum(entry.bytes for entry in entries(root)),
    )


def _entry(path: Path, *, verify: bool) -> StoreEntry:
    kind, key, title, problem = path.parent.name, path.name, "", None
    try:
        record = check(path, kind, key) if verify else read_record(path)
        title = record.title
    except (DamagedEntry, OSError) as error:
        problem = str(error)
    return StoreEntry(
        kind=kind, key=key, title=title, bytes=_bytes_below(path), used=_used(path), path=str(path), problem=problem
    )


def _places(root: Path) -> list[Path]:
    return [path for kind in _folders(root) for path in _folders(kind) if _KEY.fullmatch(path.name)]


def _used(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _folders(folder: Path) -> list[Path]:
    """Return the folders in a folder whose names do not begin with a dot, sorted; none where it cannot be read."""
    try:
        found = [entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [folder / name for name in sorted(found) if not name.startswith(".")]


def _bytes_below(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    total = 0
    with suppress(OSError):
        if not path.is_dir() or path.is_symlink():
            return path.lstat().st_size
        for parent, _, names in os.walk(path):
            for name in names:
                with suppress(OSError):
                    total += os.lstat(os.path.join(parent, name)).st_size  # noqa: PTH118  (thousands of files)
    return total


def _discard(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
