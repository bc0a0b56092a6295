"""An AOTInductor package: a ZIP archive with a library, loaded from verified bytes and leaving no file behind."""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import re
import shutil
import time
import zipfile
from contextlib import suppress
from pathlib import Path

from deploykit.backends.inductor.protocols import PackageRunner
from deploykit.errors import BundleError, StorageError
from deploykit.optional import require
from deploykit.places import SCRATCH, scratch_folder, scratch_root

_MEMBER = re.compile(r"(?:[^/]+/)?data/aotinductor/model/(?P<name>[^/]+)")
_SOURCES = (".cpp", ".h")
_LIBRARY = ".so"
_DESCRIPTION = "_metadata.json"

_LEFT_BEHIND = "aotinductor_"
"""What torch's own loader calls the folder that it unpacks into, which a process that is killed leaves behind."""
_SETTLED_SECONDS = 60.0

_libraries: dict[str, Path] = {}
"""Where the library of each package was when it was loaded, by the package's SHA-256. The linker seldom unloads one:
g++ marks some of its symbols as unique in the process."""


def open_package(content: bytes, name: str) -> PackageRunner:
    """Open a package; its ``run`` takes and gives flat lists of tensors.

    The library is unpacked into a folder of this user alone, loaded, and removed again before this returns, so that
    no way of ending the process leaves it behind.

    Args:
        content: the package.
        name: its file name, for messages.

    Raises:
        BundleError: it is no package, or one that cannot be read.
        StorageError: the folder for temporary files cannot hold it, or lets no code be run from it.
    """
    digest = hashlib.sha256(content).hexdigest()
    if digest in _libraries and _is_loaded(_libraries[digest]):
        return _runner(_libraries[digest])
    members = _members(content, name)
    sweep_left_behind(scratch_root())
    with scratch_folder("inductor") as folder:
        _check_executable(folder)
        for member, data in members.items():
            (folder / member).write_bytes(data)
        library = folder / next(member for member in members if member.endswith(_LIBRARY))
        try:
            runner = _runner(library)
        except (RuntimeError, OSError, ValueError) as error:
            if "failed to map segment" in str(error):
                raise _not_executable(folder, str(error)) from error
            raise _unreadable(name, error) from error
    if all(member.endswith((_LIBRARY, _DESCRIPTION)) for member in members):  # it reads no file of its own again
        _libraries[digest] = library
    return runner


def sweep_left_behind(root: Path) -> None:
    """Remove folders of torch's own loader whose process has ended: those of this user that no process has open."""
    with suppress(OSError):
        left = [Path(entry.path) for entry in os.scandir(root) if entry.name.startswith(_LEFT_BEHIND)]
        for folder in left:
            if _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _members(content: bytes, name: str) -> dict[str, bytes]:
    """Return the files that a package's library is loaded with, by their bare names.

    Raises:
        BundleError: no archive, or one without a library.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = {match["name"]: each for each in archive.namelist() if (match := _MEMBER.fullmatch(each))}
            members = {bare: archive.read(each) for bare, each in names.items() if not bare.endswith(_SOURCES)}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise BundleError(
            f"{name} is missing or is not an AOTInductor package (a ZIP archive): {error}. "
            "Export the bundle again, or copy it again."
        ) from error
    if sum(bare.endswith(_LIBRARY) for bare in members) != 1:
        raise _unreadable(name, f"it holds {', '.join(members) or 'nothing'}; expected one {_LIBRARY} library")
    return members


def _runner(library: Path) -> PackageRunner:
    """What aoti_load_package() makes in the end, without importing the compiler, and without a folder that stays."""
    runner: PackageRunner = require("torch")._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1)
    return runner


def _is_loaded(library: Path) -> bool:
    """Return whether a library is still in this process; it then stays, and its name stands for it and for no file."""
    try:
        ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    return True


def _unreadable(name: str, reason: object) -> BundleError:
    return BundleError(
        f"{name} is not a readable AOTInductor package ({reason}). Export the bundle again, or copy it again."
    )


def _check_executable(folder: Path) -> None:
    """Refuse a file system from which no code may be run.

    Raises:
        StorageError: it is mounted ``noexec``.
    """
    noexec = getattr(os, "ST_NOEXEC", 0)
    if os.statvfs(folder).f_flag & noexec:
        raise _not_executable(folder, "it is mounted noexec")


def _not_executable(folder: Path, reason: str) -> StorageError:
    return StorageError(
        f"the folder for temporary files {folder.parent} lets no machine code be loaded from it ({reason}), and a "
        f"torch_compile engine is machine code. Nothing is wrong with the bundle. Fix: set {SCRATCH} to a folder on a "
        "file system that is not mounted noexec."
    )


def _is_abandoned(folder: Path) -> bool:
    """Whether a folder is this user's, has settled, and no process that can be looked into has a file of it open.

    One with GPU kernels is left alone: torch reads those after the library.
    """
    try:
        status = folder.lstat()
        settled = time.time() - status.st_mtime > _SETTLED_SECONDS
        if status.st_uid != os.geteuid() or not settled or folder.is_symlink():
            return False
        if any(path.suffix == ".cubin" for path in folder.rglob("*")):
            return False
    except OSError:
        return False
    return not any(str(folder) in maps for maps in _mapped_files())


def _mapped_files() -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found.append((process / "maps").read_text(errors="replace"))
    return found
