"""One content-addressed store for engines, plans, measurements, and work that was stopped.

::

    <root>/<kind>/<key>/entry.json         what the entry is, and the digest of each of its files
    <root>/<kind>/<key>/...                its files
    <root>/<kind>/.<key>.lock              while it is made
    <root>/<kind>/.<key>.<hex>.partial/    what is being made, renamed when it is whole

The key is the digest of all that decides an entry. An entry is used only when it proves its key and every byte of
its files, and when this user owns it and no other can write it; any other is made again, with a warning. Where the
folder cannot be used, everything is made as if there were no store, with a warning.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from deploykit.errors import SpecError, StorageError
from deploykit.locks import LockTimeout, locked_file, try_lock
from deploykit.places import CACHE, cache_root, is_environment, scratch_folder, storage_error, tell_once
from deploykit.plain_files import read_plain
from deploykit.store_entry import DamagedEntry, Record, canonical, check, key_of, seal
from deploykit.store_folder import LOCK, PARTIAL, hold, own_folder, own_root, put_in_place, remove_entry, sweep
from deploykit.store_upkeep import evict, size_limit

BUILD_WAIT_SECONDS = 600.0
"""How long to wait for another process that makes the same entry, before making one that is not kept."""

SAVE_WAIT_SECONDS = 10.0
"""How long to wait for another process that keeps the same value, before not keeping it."""

VALUE = "value"
"""The one file of an entry that holds a small value."""

MOST_VALUE_BYTES = 64 << 20

_KIND = re.compile(r"[a-z][a-z0-9-]*")

logger = logging.getLogger(__name__)
_swept: set[Path] = set()

Builder = Callable[[Path], None]
Checker = Callable[[Path], str | None]


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where an entry is: its kind, its key, and what the key is the digest of. ``title`` is for people."""

    kind: str
    key: str
    parts: str
    title: str = ""

    @property
    def name(self) -> str:
        """The kind and the beginning of the key, for messages."""
        return f"{self.kind}/{self.key[:12]}"


def address(kind: str, parts: Mapping[str, object], *, title: str = "") -> Address:
    """Return the address of an entry.

    Args:
        kind: what entries of its sort are called: small letters, digits and hyphens.
        parts: all that decides the entry; see `deploykit.store_entry.canonical`.
        title: what people call it.

    Raises:
        SpecError: a part that has no stable text, or another form of kind.
    """
    if not _KIND.fullmatch(kind):
        raise SpecError(f"the kind of a store's entry is {kind!r}; expected small letters, digits and hyphens.")
    text = canonical(parts)
    return Address(kind=kind, key=key_of(kind, text), parts=text, title=title)


def _fits(folder: Path) -> str | None:
    return None


class Store:
    """A folder of entries; safe to use from several processes and threads at once.

    ``root`` is None where nothing can be kept.

    Args:
        root: the folder; None: `deploykit.places.cache_root`.
    """

    def __init__(self, root: Path | None = None) -> None:
        chosen = root.expanduser().absolute() if root is not None else cache_root()
        self.root = own_root(chosen) if chosen is not None else None

    @contextmanager
    def opened(self, where: Address, build: Builder, check_fits: Checker = _fits) -> Iterator[Path]:
        """Give the folder of an entry, made where it is absent or damaged; it stays until the block ends.

        Args:
            where: the entry.
            build: writes its files into an empty folder; what it raises passes through and leaves no entry.
            check_fits: says what is wrong with the files of an entry that was found; None: nothing.

        Raises:
            StorageError: the entry could not be written, because the disk is full, say.
        """
        with ExitStack() as stack:
            folder = self._found(where, stack, check_fits)
            yield self._made(where, stack, build, check_fits) if folder is None else folder

    @contextmanager
    def found(self, where: Address, check_fits: Checker = _fits) -> Iterator[Path | None]:
        """Give the folder of an entry, which stays until the block ends; None where there is none that is whole."""
        with ExitStack() as stack:
            yield self._found(where, stack, check_fits)

    def put(self, where: Address, build: Builder) -> None:
        """Make an entry, in place of one that is there; where it cannot be kept, a log line says so."""
        with ExitStack() as stack:
            partial = self._partial(where, stack, SAVE_WAIT_SECONDS)
            if partial is None:
                return
            try:
                build(partial)
            except OSError as error:
                self._tell_unusable(error)
                return
            self._commit(where, stack, partial)

    def load(self, where: Address) -> bytes | None:
        """Return a small value; None where there is none that is whole."""
        with self.found(where) as folder:
            try:
                return None if folder is None else read_plain(folder / VALUE, MOST_VALUE_BYTES)
            except (OSError, ValueError):
                return None

    def save(self, where: Address, value: bytes) -> None:
        """Keep a small value, in place of one that is there."""

        def write(folder: Path) -> None:
            (folder / VALUE).write_bytes(value)

        self.put(where, write)

    def remove(self, where: Address) -> None:
        """Forget an entry; harmless where there is none."""
        if self.root is not None:
            remove_entry(self.root / where.kind / where.key)

    def _found(self, where: Address, stack: ExitStack, check_fits: Checker, *, tell: bool = True) -> Path | None:
        """Return the folder of a whole entry, held by the stack; ``tell``: warn of one that is not whole."""
        if self.root is None:
            return None
        _sweep_once(self.root)
        folder = self.root / where.kind / where.key
        handle = hold(folder, shared=True)
        if handle is None:
            return None
        with ExitStack() as held:
            held.callback(os.close, handle)
            try:
                check(folder, where.kind, where.key)
                problem = check_fits(folder)
            except DamagedEntry as error:
                problem = str(error)
            except OSError as error:
                self._tell_unusable(error)
                return None
            if problem is not None:
                log = logger.warning if tell else logger.debug
                log("The cached entry %s is not used and made again, because %s", folder, problem)
                return None
            with suppress(OSError):
                os.utime(folder)  # the least recently used go first
            stack.push(held.pop_all())
        return folder

    def _made(self, where: Address, stack: ExitStack, build: Builder, check_fits: Checker) -> Path:
        """Return the folder of an entry that is made now, or just was by the process that held the lock."""
        with ExitStack() as making:
            partial = self._partial(where, making, BUILD_WAIT_SECONDS)
            if partial is not None:
                folder = self._found(where, stack, check_fits, tell=False)
                if folder is not None:
                    return folder
                logger.info("Making the entry %s", where.name)
                self._build(build, partial)
                folder = self._commit(where, stack, partial)
                if folder is not None:
                    return folder
                stack.push(making.pop_all())  # it stays, with its lock, until the caller has done with it
                return partial
        folder = stack.enter_context(scratch_folder(where.kind))
        build(folder)
        return folder

    def _partial(self, where: Address, stack: ExitStack, seconds: float) -> Path | None:
        """An empty folder to make an entry in, removed with the stack, which holds the entry's lock; None: unusable."""
        if self.root is None:
            return None
        _sweep_once(self.root)
        try:
            kind = own_folder(self.root / where.kind)
            lock = kind / f".{where.key}{LOCK}"
            stack.enter_context(locked_file(lock, f"to make the entry {where.name} of the cache", seconds=seconds))
            sweep(kind, but=where.key)
            partial = kind / f".{where.key}.{secrets.token_hex(4)}{PARTIAL}"
            partial.mkdir(mode=0o700)
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
        except LockTimeout as error:
            logger.warning("The entry %s is not kept: %s", where.name, error)
            return None
        except OSError as error:
            self._tell_unusable(error)
            return None
        return partial

    def _build(self, build: Builder, folder: Path) -> None:
        """Call a builder; where the disk is full, the error says which folder is meant and how to choose another."""
        remedy = f"set {CACHE} to a folder on another disk, or go without it: cache=False"
        try:
            build(folder)
        except StorageError as error:
            raise StorageError(f"{error} It is below the cache {self.root}: {remedy}.") from error
        except OSError as error:
            if not is_environment(error):
                raise
            raise storage_error(f"an entry of the cache {self.root} cannot be made", error, remedy) from error

    def _commit(self, where: Address, stack: ExitStack, partial: Path) -> Path | None:
        """Put a made entry in its place, held by the stack; None where that cannot be done."""
        entry = partial.parent / where.key
        handle = None
        try:
            seal(partial, Record(kind=where.kind, key=where.key, title=where.title, parts=where.parts))
            handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, handle)
            try_lock(handle, shared=True)  # before it has its name, so that nobody removes it at once
            put_in_place(partial, entry)
        except (OSError, DamagedEntry) as error:
            self._tell_unusable(error)
            return None
        evict(partial.parent.parent, size_limit(), keep=entry)
        return entry

    def _tell_unusable(self, error: Exception) -> None:
        tell_once(
            f"The cache {self.root} cannot be used, and nothing is kept in it: {error}. "
            f"Set {CACHE} to a folder that this user can write."
        )


def _sweep_once(root: Path) -> None:
    """Remove what ended processes left, the first time that this process uses a store."""
    if root not in _swept:
        _swept.add(root)
        with suppress(OSError):
            for entry in os.scandir(root):
                if entry.is_dir(follow_symlinks=False):
                    sweep(Path(entry.path))
