"""The engine of a bundle, read once: the bytes that a runtime opens are the bytes that were verified."""

from __future__ import annotations

import hashlib
import os
import weakref
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

from deploykit.errors import BundleError, EngineMismatch
from deploykit.manifest import FileRecord, Manifest, engine_parts
from deploykit.places import is_environment, read_error, scratch_folder
from deploykit.plain_files import open_plain

_AGAIN = "Copy the bundle again from its source, or export it again."


class EngineFile(os.PathLike[str]):
    """An engine and the files that belong to it, in memory, each of the size and the SHA-256 that the manifest says.

    A runtime that opens memory calls `read`. One that opens only files takes the path of a private copy, by
    ``os.fspath(engine)`` or ``str(engine)``: in a folder of this user alone, removed by `close` and when the process
    ends. Nothing reads the bundle's own files a second time, so whoever replaces them meanwhile changes nothing.

    Args:
        manifest: of the bundle; without digests, as before it is written, the files are taken as they are.
        folder: where the files are.

    Raises:
        BundleError: a file is missing or not the one that the manifest describes.
        StorageError: it cannot be read for a reason of this machine.
    """

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        self.name = PurePosixPath(manifest.engine).name
        self.records: dict[str, FileRecord] = {}
        self._manifest, self._folder = manifest, folder
        self._file = manifest.engine
        self._contents: dict[str, bytes] = {}
        self._copy: Path | None = None
        self._remove_copy: weakref.finalize[..., EngineFile] | None = None
        base = PurePosixPath(manifest.engine).parent
        for name in engine_parts(manifest.engine, manifest.files or _plain_files(folder)):
            self.include(PurePosixPath(name).relative_to(base).as_posix())

    def read(self) -> bytes:
        """Return the engine."""
        return self._contents[self._file]

    def parts(self) -> dict[str, bytes]:
        """Return the other files of the engine, such as external weights, by their path relative to it."""
        base = PurePosixPath(self._file).parent
        return {
            PurePosixPath(name).relative_to(base).as_posix(): content
            for name, content in self._contents.items()
            if name != self._file
        }

    def include(self, location: str) -> None:
        """Take another file of the bundle into the engine, by its path relative to the engine."""
        name = (PurePosixPath(self._file).parent / location).as_posix()
        if name not in self._contents:
            content = self._contents[name] = self.read_beside(name)
            self.records[name] = self._manifest.files.get(name) or _record_of(content)

    def read_beside(self, name: str) -> bytes:
        """Return another file of the bundle, verified."""
        return read_verified(self._manifest, self._folder, name)

    def __fspath__(self) -> str:
        if self._copy is None:
            self._copy = self._write_copy()
        return str(self._copy)

    __str__ = __fspath__

    def release(self) -> None:
        """Give the memory back: the runtime has opened what it needs."""
        self._contents.clear()

    def close(self) -> None:
        """Give the memory back, and remove the private copy."""
        self.release()
        self._copy = None
        if self._remove_copy is not None:
            self._remove_copy()

    def _write_copy(self) -> Path:
        with ExitStack() as scratch:
            folder = scratch.enter_context(scratch_folder("engine"))
            for name, content in self._contents.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self._remove_copy = weakref.finalize(self, scratch.pop_all().close)
        return folder / self._file


def read_verified(manifest: Manifest, folder: Path, name: str) -> bytes:
    """Read one file of a bundle; what is returned is what the manifest describes.

    Raises:
        BundleError: it is missing, or not of the recorded size and SHA-256.
        StorageError: it cannot be read for a reason of this machine.
    """
    record = manifest.files.get(name)
    if record is None and manifest.files:
        raise BundleError(f"{name} is not recorded in the manifest of {folder}. {_AGAIN}")
    try:
        with open_plain(folder / name, follow=True) as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(size) if record is None or size == record.size else b""
    except (OSError, ValueError) as error:
        raise _unreadable(folder / name, error) from error
    if record is not None and (size != record.size or hashlib.sha256(content).hexdigest() != record.sha256):
        raise EngineMismatch(
            f"{folder / name} is not the file that the manifest describes: its SHA-256 differs from "
            f"{record.sha256[:12]}... ({size} bytes; expected {record.size}). It was damaged, or replaced while it was "
            f"read, and is not opened. {_AGAIN}"
        )
    return content


def _plain_files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _record_of(content: bytes) -> FileRecord:
    return FileRecord(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def _unreadable(path: Path, error: Exception) -> BundleError:
    if isinstance(error, OSError) and is_environment(error):
        return read_error(path, error)
    reason = "it is missing" if isinstance(error, FileNotFoundError) else str(error)
    return BundleError(f"{path.name} cannot be read: {reason}. {_AGAIN}")
