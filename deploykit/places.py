"""Where deploykit keeps things and works, and what to say when a place cannot be used."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deploykit.errors import SpecError, StorageError
from deploykit.locks import try_lock
from deploykit.optional import require

CACHE = "DEPLOYKIT_CACHE"
"""The environment variable that names the cache's folder."""

SCRATCH = "TMPDIR"

_PREFIX, _SUFFIX = "deploykit-", ".scratch"
_SETTLED_SECONDS = 60.0
"""How old a temporary folder is before it may count as left behind: its lock is taken after it is made."""

_ENVIRONMENT = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a limit on the size of files (ulimit -f) was reached",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user may not do that",
    errno.EPERM: "this user may not do that",
    errno.EMFILE: "this process has too many open files (ulimit -n)",
    errno.ENFILE: "this machine has too many open files",
    errno.EIO: "the disk reports an error",
    errno.ESTALE: "the network file system lost it",
    errno.ENOMEM: "there is not enough memory",
    errno.ENODEV: "the file system is gone",
}
"""What an error says of the machine, and nothing of the files."""

_REMEDIES = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some space",
    errno.EFBIG: "Free some space or raise the limit",
    errno.EMFILE: "Raise the limit, or close models that are no longer used",
    errno.ENFILE: "Close programs that are no longer used",
}

_OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "not enough memory: you tried", "CUDA out of memory")

logger = logging.getLogger(__name__)
_told: set[str] = set()


def is_environment(error: BaseException | None) -> bool:
    """Whether an error says something of the machine (disk, permissions, open files) and nothing of the files."""
    return isinstance(error, OSError) and error.errno in _ENVIRONMENT


def check_working_folder() -> None:
    """Refuse to begin in a folder that was removed: relative paths lead nowhere, and MKL ends the process.

    Raises:
        StorageError: it was.
    """
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise StorageError(
            "the folder that the command was called in was removed. Fix: change to one that exists (cd ~), and run it "
            "again."
        ) from error


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out: Python's own, or what torch raises in its place."""
    if isinstance(error, MemoryError):
        return True
    # torch has a class for its accelerators alone.
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def write_whole(path: Path, text: str, *, what: str) -> None:
    """Write a file that a person named, whole or not at all; ``what`` it is goes into the message.

    Raises:
        StorageError: it cannot be written.
    """
    staging = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")
    try:
        staging.write_text(text, encoding="utf-8", newline="\n")
        staging.replace(path)
    except OSError as error:
        with suppress(OSError):  # which may be what cannot be written at all
            staging.unlink()
        raise storage_error(f"the {what} {path} cannot be written", error, "choose another file") from error


def storage_error(what: str, error: OSError, place: str = "") -> StorageError:
    """Return the typed error of a place that cannot be used.

    Args:
        what: what was tried, such as ``"the cache /x cannot be written"``.
        error: what the system said.
        place: another remedy beside the error's own, such as ``"choose another folder"``.
    """
    seen = _ENVIRONMENT.get(error.errno or 0, "")
    remedies = [text for text in (_REMEDIES.get(error.errno or 0), place) if text]
    remedy = f" Fix: {', or '.join(remedies)}." if remedies else ""
    return StorageError(f"{what}: {f'{seen} ' if seen else ''}({error}).{remedy}")


def read_error(path: Path, error: OSError) -> StorageError:
    """Return the typed error of a file or folder that this machine cannot read, of which nothing else is known."""
    forbidden = error.errno in (errno.EACCES, errno.EPERM)
    remedy = "give this user the right to read it" if forbidden else "" if error.errno in _REMEDIES else "try again"
    return storage_error(f"{path} cannot be read", error, remedy)


def cache_root(*, tell: bool = True) -> Path | None:
    """Return ``$DEPLOYKIT_CACHE``, or deploykit's folder in the user's cache; None where there is no home folder.

    Args:
        tell: log a warning where there is none, which is for those who would keep something there.

    Raises:
        SpecError: the variable begins with ``~`` and there is no home folder.
    """
    platformdirs = require("platformdirs")  # not on a device that only opens bundles

    chosen = os.environ.get(CACHE)
    try:
        root = Path(chosen or platformdirs.user_cache_dir("deploykit")).expanduser().absolute()
    except (RuntimeError, KeyError, OSError) as error:
        if chosen:
            raise SpecError(
                f"{CACHE} is {chosen!r}, and there is no home folder: HOME is not set and the user has none "
                f"({error}). Fix: set {CACHE} to an absolute path."
            ) from error
        if tell:
            tell_once(
                "Nothing is kept in a cache, because HOME is not set and user "
                f"{os.getuid()} has no home folder. Set {CACHE} to a writable folder to keep engines and plans."
            )
        return None
    return root


def tell_once(message: str) -> None:
    """Log a warning the first time that this process has it."""
    if message not in _told:
        _told.add(message)
        logger.warning("%s", message)


def scratch_root() -> Path:
    """Return the folder for temporary files, which ``TMPDIR`` names.

    Raises:
        StorageError: there is none that can be written.
    """
    try:
        import tempfile  # only work in files needs it, and every start would pay for it

        return Path(tempfile.gettempdir())
    except OSError as error:
        raise StorageError(
            f"there is no folder for temporary files: {error}. "
            f"Fix: set {SCRATCH} to a folder that this user can write, with some free space."
        ) from error


@contextmanager
def scratch_folder(purpose: str, *, below: Path | None = None) -> Iterator[Path]:
    """Make a folder of this user alone, removed at the end; those of processes that were killed go too.

    Args:
        purpose: a word for its name.
        below: where; None: the folder for temporary files.

    Raises:
        StorageError: it cannot be made, or the disk was full while it was used.
    """
    root, process = below or scratch_root(), os.getpid()
    try:
        folder, handle = make_scratch(purpose, root)
        inner = folder / "files"  # whose own lock is free for those that write below it
        inner.mkdir(mode=0o700)
    except OSError as error:
        raise _scratch_error(root, error) from error
    try:
        yield inner
    except OSError as error:
        if is_environment(error) and _is_below(error, folder):
            raise _scratch_error(root, error) from error
        raise
    finally:
        if os.getpid() == process:  # a forked child ends this block too, and the folder is its parent's
            remove_folder(folder)
        os.close(handle)


def make_scratch(purpose: str, root: Path) -> tuple[Path, int]:
    """Make a temporary folder, and the open handle whose lock says that its process is alive."""
    import tempfile

    sweep_scratch(root)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{purpose}-", suffix=_SUFFIX, dir=root))
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try_lock(handle)
    return folder, handle


def sweep_scratch(root: Path) -> None:
    """Remove temporary folders of this user whose process has ended without removing them."""
    with suppress(OSError):
        for entry in os.scandir(root):
            if entry.name.startswith(_PREFIX) and entry.name.endswith(_SUFFIX):
                _sweep(Path(entry.path))


def remove_folder(folder: Path) -> None:
    """Remove a folder with all that is in it, as far as this user may."""
    import shutil  # only work in files needs it, and every start would pay for it

    shutil.rmtree(folder, ignore_errors=True)


def _sweep(folder: Path) -> None:
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(handle)
            left = status.st_uid == os.geteuid() and time.time() - status.st_mtime > _SETTLED_SECONDS
            if left and try_lock(handle) is True:
                remove_folder(folder)
        finally:
            os.close(handle)


def _is_below(error: OSError, folder: Path) -> bool:
    return error.filename is None or str(error.filename).startswith(str(folder))


def _scratch_error(root: Path, error: OSError) -> StorageError:
    return storage_error(
        f"the folder for temporary files {root} cannot be used", error, f"set {SCRATCH} to another folder"
    )
