"""A bundle: a folder with an engine, and all that is needed to trust and open it.

``manifest.json`` names every other file with its size and SHA-256, and ``manifest.sha256`` holds
the digest of the manifest itself. A bundle is written to a temporary neighbour, synced and
renamed, so a killed export leaves nothing that loads.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from deploykit.bundle_files import (
    ASIDE,
    PARTIAL,
    digest_line,
    digest_problems,
    file_problems,
    is_manifest,
    left_behind,
    look_through,
    read_manifest_text,
    strangers,
)
from deploykit.errors import BundleError
from deploykit.locks import locked_folder, try_lock
from deploykit.manifest import (
    MANIFEST,
    MANIFEST_DIGEST,
    SCHEMA_VERSION,
    FileRecord,
    Manifest,
    Status,
    decode_manifest,
    engine_parts,
    own_version,
)
from deploykit.output_places import check_outside_bundles
from deploykit.places import remove_folder, storage_error
from deploykit.plain_files import digest_of, open_plain

__all__ = [
    "MANIFEST",
    "MANIFEST_DIGEST",
    "SCHEMA_VERSION",
    "FileRecord",
    "Manifest",
    "Status",
    "is_bundle",
    "open_bundle",
    "read_manifest",
    "sha256_of",
    "write_manifest",
    "writing",
]

LOCK_SECONDS = 10.0
"""How long to wait for another process that begins to write beside the same folder, which takes milliseconds."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def writing(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary neighbour to write into, which is renamed to ``folder`` when the block ends well.

    The last thing in the block is `write_manifest`. On any error the neighbour is removed and
    ``folder`` stays as it was; a kill at any moment leaves the old bundle or the new one. With
    ``overwrite`` the old one is replaced in one step where the file system can swap two folders.

    Raises:
        SpecError: ``folder`` lies in another bundle.
        BundleError: ``folder`` exists and is not a bundle, or exists and ``overwrite`` is off, or holds files that
            deploykit did not write; or what the block wrote would not open.
        StorageError: the disk is full or not writable, or another process keeps the lock of the folder above.
    """
    folder = folder.absolute()
    check_outside_bundles(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging, lock = _make_staging(folder, overwrite=overwrite)
    except OSError as error:
        raise storage_error(f"cannot write beside {folder}", error, "choose a folder on a writable disk") from error
    try:
        yield staging
        open_bundle(staging)
        _sync_tree(staging)
        _check_free(folder, overwrite=overwrite)
        _put_in_place(staging, folder)
    except OSError as error:
        what = f"writing the bundle {folder} failed, and nothing was left behind"
        raise storage_error(what, error, "mend the cause and try again") from error
    finally:
        remove_folder(staging)
        os.close(lock)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Record every file of ``folder`` in the manifest and write it; returns what was written.

    Raises:
        BundleError: a link or another special file in ``folder``, or an engine that is not there.
    """
    found = look_through(folder)
    problems = [f"{name}: a symbolic link; expected a plain file" for name in sorted(found.links - found.odd.keys())]
    problems += [f"{name}: {kind}; expected a plain file" for name, kind in found.odd.items()]
    if manifest.engine not in found.sizes:
        problems.append(f"{manifest.engine}: named as the engine and missing")
    if problems:
        raise BundleError(_listed(f"{folder} cannot become a bundle", problems, "Write plain files only."))
    sizes = dict(sorted(found.sizes.items()))
    files = {name: FileRecord(size=size, sha256=sha256_of(folder / name)) for name, size in sizes.items()}
    tools = own_version() | manifest.tools
    manifest = dataclasses.replace(manifest, files=files, tools=tools)
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    (folder / MANIFEST).write_bytes(text)
    (folder / MANIFEST_DIGEST).write_bytes(digest_line(text))
    return manifest


def is_bundle(path: Path) -> bool:
    """Return whether ``path`` is a folder with a manifest; says nothing of whether it is whole."""
    return is_manifest(path / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest, typed and checked, without looking at the other files.

    Raises:
        BundleError: no bundle there, a newer schema, or a manifest that does not decode.
    """
    return decode_manifest(read_manifest_text(folder), folder / MANIFEST)


def open_bundle(folder: Path, *, leave_engine: bool = False) -> Manifest:
    """Verify every byte of a bundle and return its manifest; nothing is executed or unpickled.

    Links are followed, so that a bundle can be laid out as links to files elsewhere: what counts are the bytes.

    Args:
        folder: the bundle.
        leave_engine: leave the digests of the `engine_parts` to the caller, who verifies what it reads.

    Raises:
        BundleError: no bundle there, a newer schema, or any file that is missing, extra, special,
            or not of the recorded size and SHA-256. Every such file is named.
        StorageError: this machine cannot read it now.
    """
    text = read_manifest_text(folder)
    problems = digest_problems(folder, text)
    try:
        manifest = decode_manifest(text, folder / MANIFEST)
    except BundleError as error:
        if problems and os.path.lexists(folder / MANIFEST_DIGEST):
            raise BundleError(_damaged(folder, problems)) from error
        raise
    left = engine_parts(manifest.engine, manifest.files) if leave_engine else ()
    wrong, extra = file_problems(folder, manifest, left)
    if problems or wrong:
        raise BundleError(_damaged(folder, [*problems, *wrong, *extra]))
    if extra:
        what = f"the bundle {folder} holds files that do not belong to it"
        raise BundleError(_listed(what, extra, "Remove them, and nothing else: every file of the bundle is whole."))
    return manifest


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex, read in pieces of 1 MiB."""
    with open_plain(path, follow=True) as file:
        return digest_of(file)


def _check_free(folder: Path, *, overwrite: bool) -> None:
    if folder.is_symlink():
        raise BundleError(f"{folder} is a symbolic link; give the folder that it points to, or another.")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BundleError(f"{folder} is a file; a bundle is a folder. Choose another name.")
    if not (is_bundle(folder) and os.path.lexists(folder / MANIFEST_DIGEST)):
        raise BundleError(
            f"{folder} exists and is not a bundle, so it will not be replaced. Choose a folder that does not exist yet."
        )
    if not overwrite:
        raise BundleError(f"{folder} holds a bundle already. Choose another folder, or allow it with overwrite=True.")
    others, _ = strangers(folder)
    if others:
        what = f"{folder} will not be replaced, because it holds files that deploykit did not write"
        raise BundleError(_listed(what, others, "Move them away, or choose another folder."))


def _make_staging(folder: Path, *, overwrite: bool) -> tuple[Path, int]:
    """Return a new neighbour, and the open handle whose lock says that its writer is alive."""
    with _locked(folder):
        _sweep(folder)
        _check_free(folder, overwrite=overwrite)
        staging = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}{PARTIAL}")
        staging.mkdir()
        handle = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try_lock(handle)
    return staging, handle


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time makes or sweeps the temporary neighbours of a bundle.

    On a file system without locks `_sweep` gets no lock either, and removes nothing.
    """
    with locked_folder(folder.parent, f"to write the bundle {folder.name}", seconds=LOCK_SECONDS):
        yield


def _sweep(folder: Path) -> None:
    for neighbour in sorted(folder.parent.iterdir()):
        if not left_behind(folder).fullmatch(neighbour.name):
            continue
        with suppress(OSError):
            handle = os.open(neighbour, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if try_lock(handle) is not True:
                    continue
                if neighbour.name.endswith(ASIDE) and not folder.exists():
                    neighbour.rename(folder)
                else:
                    remove_folder(neighbour)
            finally:
                os.close(handle)


def _put_in_place(staging: Path, folder: Path) -> None:
    _carry_over_droppings(folder, staging)
    if not folder.exists():
        staging.rename(folder)
    elif not _exchange(staging, folder):
        aside = staging.with_suffix(ASIDE)
        folder.rename(aside)
        try:
            staging.rename(folder)
        except OSError:
            aside.rename(folder)
            raise
        _sync_folder(folder.parent)
        remove_folder(aside)
    _sync_folder(folder.parent)


def _carry_over_droppings(folder: Path, staging: Path) -> None:
    """Copy what file managers have put into the old bundle: it is nobody's work, and not ours to delete."""
    if folder.exists():
        import shutil  # a device that opens bundles never needs it

        for name in strangers(folder)[1]:
            if (staging / name).parent.is_dir():
                shutil.copy2(folder / name, staging / name, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, by Linux's renameat2; False where that cannot be done."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            with (Path(parent) / name).open("rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync a folder, and need not.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _damaged(folder: Path, problems: list[str]) -> str:
    return _listed(f"the bundle {folder} is damaged", problems, "Copy it again from its source, or export it again.")


def _listed(what: str, problems: list[str], remedy: str) -> str:
    lines = "".join(f"\n  {problem}" for problem in problems)
    return f"{what}:{lines}\n{remedy}"
