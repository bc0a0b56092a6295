"""A bundle: a folder with an engine, and all that is needed to trust and open it.

``manifest.json`` names every other file with its size and SHA-256, and ``manifest.sha256`` holds
the digest of the manifest itself. A bundle is written to a temporary neighbour, synced and
renamed, so a killed export leaves nothing that loads.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import hashlib
import importlib.metadata
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias

import msgspec

from deploykit.errors import BundleError
from deploykit.spec import BackboneSpec, InputSpec, TensorSpec

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"

Status: TypeAlias = Literal["built", "executed", "parity_checked"]

_PARTIAL = ".partial"
_ASIDE = ".aside"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """The size in bytes and the SHA-256 of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle says of itself.

    ``engine`` is the file that the runtime opens. ``requires`` is what the engine is tied to
    beyond ``runtime_version`` (a compute capability, an instruction set). ``status`` is what was seen
    of the engine: ``built``, no more; ``executed``, it ran, and its numbers were not all within the
    budget; ``parity_checked``, it ran, and they were. ``seen_on`` is where: machine, device, versions.
    ``compiler`` is what the runtime's compiler chose by measuring, and what each choice cost.
    ``speedup`` is the FP32 engine's time over this one's on the machine that exported it; None: not timed.
    """

    schema_version: int = SCHEMA_VERSION
    backbone: BackboneSpec
    input: InputSpec
    outputs: tuple[TensorSpec, ...]
    runtime: str
    runtime_version: str
    precision: str
    precision_settings: dict[str, Any] = field(default_factory=dict)
    engine: str
    status: Status = "built"
    seen_on: dict[str, str] = field(default_factory=dict)
    target: str | None = None
    requires: dict[str, str] = field(default_factory=dict)
    weights_digest: str
    calibration_digest: str | None = None
    fusions: dict[str, int] = field(default_factory=dict)
    compiler: dict[str, str] = field(default_factory=dict)
    speedup: float | None = None
    tools: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)


@contextmanager
def writing(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary neighbour to write into; renamed to ``folder`` when the block ends well.

    The last thing in the block is `write_manifest`. On any error the neighbour is removed and
    ``folder`` stays as it was; a kill at any moment leaves the old bundle or the new one. With
    ``overwrite`` the old one is replaced in one step where the file system can swap two folders.

    Raises:
        BundleError: ``folder`` exists and is not a bundle, or exists and ``overwrite`` is off;
            the disk is full or not writable; or what the block wrote would not open.
    """
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging, lock = _make_staging(folder, overwrite=overwrite)
    except OSError as error:
        raise BundleError(f"cannot write beside {folder}: {error}. Choose a folder on a writable disk.") from error
    try:
        yield staging
        open_bundle(staging)
        _sync_tree(staging)
        _check_free(folder, overwrite=overwrite)
        _put_in_place(staging, folder)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "Free some space" if full else "Mend the cause"
        raise BundleError(
            f"writing the bundle {folder} failed: {error}. Nothing was left behind. {remedy} and try again."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Record every file of ``folder`` in the manifest and write it; returns what was written.

    Raises:
        BundleError: a link or another special file in ``folder``, or an engine that is not there.
    """
    found, problems = _walk(folder)
    if manifest.engine not in found:
        problems.append(f"{manifest.engine}: named as the engine and missing")
    if problems:
        raise BundleError(_listed(f"{folder} cannot become a bundle", problems, "Write plain files only."))
    files = {name: FileRecord(size=size, sha256=sha256_of(folder / name)) for name, size in found.items()}
    tools = _own_version() | manifest.tools
    manifest = dataclasses.replace(manifest, files=files, tools=tools)
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    (folder / MANIFEST).write_bytes(text)
    (folder / MANIFEST_DIGEST).write_bytes(_digest_line(text))
    return manifest


def sweep_stale(folder: Path) -> None:
    """Remove what killed processes left beside ``folder``, and restore a half-replaced bundle."""
    if folder.parent.is_dir():
        with _locked(folder.parent):
            _sweep(folder.absolute())


def is_bundle(path: Path) -> bool:
    """Whether ``path`` is a folder with a manifest; says nothing of whether it is whole."""
    return (path / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """The manifest, typed and checked, without looking at the other files.

    Raises:
        BundleError: no bundle there, a newer schema, or a manifest that does not decode.
    """
    return _decode(_read_text(folder), folder / MANIFEST)


def open_bundle(folder: Path) -> Manifest:
    """Verify every byte of a bundle and return its manifest; nothing is executed or unpickled.

    Raises:
        BundleError: no bundle there, a newer schema, or any file that is missing, extra, a link,
            or not of the recorded size and SHA-256. Every such file is named.
    """
    text = _read_text(folder)
    problems = _digest_problems(folder, text)
    try:
        manifest = _decode(text, folder / MANIFEST)
    except BundleError as error:
        if problems and (folder / MANIFEST_DIGEST).exists():
            raise BundleError(_damaged(folder, problems)) from error
        raise
    problems += _file_problems(folder, manifest)
    if problems:
        raise BundleError(_damaged(folder, problems))
    return manifest


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hex, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _check_free(folder: Path, *, overwrite: bool) -> None:
    if folder.is_symlink():
        raise BundleError(f"{folder} is a symbolic link; give the folder that it points to, or another.")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BundleError(f"{folder} is a file; a bundle is a folder. Choose another name.")
    if not (is_bundle(folder) and (folder / MANIFEST_DIGEST).is_file()):
        raise BundleError(
            f"{folder} exists and is not a bundle, so it will not be replaced. Choose a folder that does not exist yet."
        )
    if not overwrite:
        raise BundleError(f"{folder} holds a bundle already. Choose another folder, or allow it with overwrite=True.")


def _make_staging(folder: Path, *, overwrite: bool) -> tuple[Path, int]:
    """A new neighbour, and the open handle whose lock says that its writer is alive."""
    import fcntl

    with _locked(folder.parent):
        _sweep(folder)
        _check_free(folder, overwrite=overwrite)
        staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{_PARTIAL}")
        staging.mkdir()
        handle = os.open(staging, os.O_RDONLY)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
    return staging, handle


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time makes or sweeps the temporary neighbours in ``folder``."""
    import fcntl  # POSIX only, and a bundle opens elsewhere too

    handle = os.open(folder, os.O_RDONLY)
    try:
        # A file system without locks: then `_sweep` gets no lock either, and removes nothing.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sweep(folder: Path) -> None:
    import fcntl

    for neighbour in sorted(folder.parent.iterdir()):
        if not _left_behind(folder).fullmatch(neighbour.name) or neighbour.is_symlink():
            continue
        with suppress(OSError):
            handle = os.open(neighbour, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if neighbour.name.endswith(_ASIDE) and not folder.exists():
                    neighbour.rename(folder)
                else:
                    shutil.rmtree(neighbour, ignore_errors=True)
            finally:
                os.close(handle)


def _left_behind(folder: Path) -> re.Pattern[str]:
    return re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}({_PARTIAL}|{_ASIDE})")


def _put_in_place(staging: Path, folder: Path) -> None:
    if not folder.exists():
        staging.rename(folder)
    elif not _exchange(staging, folder):
        aside = staging.with_suffix(_ASIDE)
        folder.rename(aside)
        try:
            staging.rename(folder)
        except OSError:
            aside.rename(folder)
            raise
        _sync_folder(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)
    _sync_folder(folder.parent)


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


def _own_version() -> dict[str, str]:
    try:
        return {"deploykit": importlib.metadata.version("deploykit")}
    except importlib.metadata.PackageNotFoundError:
        return {}


def _digest_line(text: bytes) -> bytes:
    """In the form that ``sha256sum --check`` reads."""
    return f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode()


def _read_text(folder: Path) -> bytes:
    path = folder / MANIFEST
    try:
        if stat.S_ISREG(path.lstat().st_mode):
            return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(_why_no_bundle(folder)) from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}. Check its permissions.") from error
    raise BundleError(f"{path} is a link or a special file; expected a plain file. Export the bundle again.")


def _why_no_bundle(folder: Path) -> str:
    if folder.is_dir():
        inside = ", ".join(sorted(entry.name for entry in folder.iterdir())[:6]) or "nothing"
        return (
            f"{folder} is not a bundle: expected a {MANIFEST}, and the folder holds {inside}. "
            "Give the folder that `deploykit export` wrote."
        )
    if folder.exists():
        return f"{folder} is a file; a bundle is a folder with a {MANIFEST}. Give the folder."
    neighbours = folder.parent.iterdir() if folder.parent.is_dir() else ()
    asides = [path for path in neighbours if _left_behind(folder).fullmatch(path.name) and path.suffix == _ASIDE]
    hint = f" An interrupted overwrite left the earlier bundle at {asides[0]}: rename it back." if asides else ""
    return f"there is no bundle at {folder}: nothing has that name.{hint} Check the path."


def _decode(text: bytes, path: Path) -> Manifest:
    try:
        raw = msgspec.json.decode(text)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON ({error}). The bundle is damaged: copy or export it again.") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if type(version) is not int or version < 1:
        raise BundleError(
            f"{path} is not a bundle's manifest: its schema_version is {version!r}; expected 1 to {SCHEMA_VERSION}. "
            "Give the folder that `deploykit export` wrote."
        )
    if version > SCHEMA_VERSION:
        raise BundleError(_newer(path, version, raw))
    try:
        manifest = msgspec.convert(raw, Manifest)
    except msgspec.ValidationError as error:
        raise BundleError(f"{path} does not fit schema {version}: {error}. Export the bundle again.") from error
    bad = [name for name in (manifest.engine, *manifest.files) if not _is_inside(name)]
    if bad:
        raise BundleError(
            f"{path} names files outside the bundle: {', '.join(map(repr, bad))}; expected relative paths below it. "
            "Do not open this bundle: it was not written by deploykit."
        )
    return manifest


def _newer(path: Path, version: int, raw: dict[str, Any]) -> str:
    tools = raw.get("tools")
    writer = tools.get("deploykit") if isinstance(tools, dict) else None
    here = _own_version().get("deploykit")
    wanted = f"deploykit>={writer}" if isinstance(writer, str) else "--upgrade deploykit"
    return (
        f"{path} has schema version {version}; this deploykit{f' ({here})' if here else ''} reads up to "
        f"{SCHEMA_VERSION}. Upgrade: pip install '{wanted}', or export the bundle with this version."
    )


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = bool(name) and "\\" not in name and "\0" not in name and str(path) == name
    return plain and not path.is_absolute() and ".." not in path.parts and name not in (".", MANIFEST, MANIFEST_DIGEST)


def _walk(folder: Path) -> tuple[dict[str, int], list[str]]:
    """The size in bytes of every plain file but the manifest's two, and what is not a plain file."""
    sizes: dict[str, int] = {}
    problems: list[str] = []
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted([*names, *folders]):
            path = Path(parent) / name
            relative = path.relative_to(folder).as_posix()
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                sizes[relative] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "a special file"
                problems.append(f"{relative}: {kind}; expected a plain file")
    for own in (MANIFEST, MANIFEST_DIGEST):
        sizes.pop(own, None)
    return dict(sorted(sizes.items())), problems


def _digest_problems(folder: Path, text: bytes) -> list[str]:
    path = folder / MANIFEST_DIGEST
    try:
        written = path.read_bytes()
    except FileNotFoundError:
        return [f"{MANIFEST_DIGEST}: missing"]
    except OSError as error:
        return [f"{MANIFEST_DIGEST}: {error}"]
    return [] if written == _digest_line(text) else [f"{MANIFEST}: does not match {MANIFEST_DIGEST}"]


def _file_problems(folder: Path, manifest: Manifest) -> list[str]:
    try:
        found, problems = _walk(folder)
    except OSError as error:
        return [str(error)]
    if manifest.engine not in manifest.files:
        problems.append(f"{manifest.engine}: named as the engine and not recorded in {MANIFEST}")
    for name, record in manifest.files.items():
        if name not in found:
            if not (folder / name).is_symlink():
                problems.append(f"{name}: missing")
        elif found[name] != record.size:
            problems.append(f"{name}: {found[name]} bytes; expected {record.size}")
        else:
            try:
                seen = sha256_of(folder / name)
            except OSError as error:
                problems.append(f"{name}: {error}")
                continue
            if seen != record.sha256:
                problems.append(f"{name}: SHA-256 {seen[:12]}...; expected {record.sha256[:12]}...")
    problems += [f"{name}: not recorded in {MANIFEST}" for name in found if name not in manifest.files]
    return problems


def _damaged(folder: Path, problems: list[str]) -> str:
    return _listed(f"the bundle {folder} is damaged", problems, "Copy it again from its source, or export it again.")


def _listed(what: str, problems: list[str], remedy: str) -> str:
    lines = "".join(f"\n  {problem}" for problem in problems)
    return f"{what}:{lines}\n{remedy}"
