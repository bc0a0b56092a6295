"""The files of a bundle: which there are, and whether they are those of its manifest."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import stat
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath

from deploykit.errors import BundleError, StorageError
from deploykit.manifest import MANIFEST, MANIFEST_DIGEST, MOST_MANIFEST_BYTES, Manifest, recorded_names
from deploykit.places import is_environment, read_error
from deploykit.plain_files import FileTooLarge, NotPlainFile, digest_of, kind_of, open_plain, read_plain

DROPPINGS = (".DS_Store", "._*", "Thumbs.db", "ehthumbs.db", "[Dd]esktop.ini", ".directory", ".nfs*")
"""What file managers and network file systems put into a folder by themselves."""

LITTER = (
    *DROPPINGS,
    *(".gitattributes", ".gitignore", ".gitkeep", ".git", ".dvcignore", ".dvc", "*.dvc"),
    *(".cache", ".huggingface", "README.md", "README", "LICENSE", "LICENSE.*", "lost+found", ".snapshot"),
    *("__MACOSX", ".ipynb_checkpoints", ".Trash-*", ".fseventsd", ".Spotlight-V100", "@eaDir", "$RECYCLE.BIN"),
    "System Volume Information",
)
"""What people and their tools put beside the files that they ship; no runtime reads it."""

_VOLUME = re.compile(r"\.\.data(_tmp)?|\.\.\d{4}(_\d\d){5}\.\d+")
"""Where a mounted config map or secret keeps the files that its links point to."""

PARTIAL, ASIDE = ".partial", ".aside"
"""How the temporary neighbours of a bundle end: the new one while it is written, and the old one while it goes."""

PLAN_FILE = "quantization-plan.json"
SHIFT_FILE = "quantization-plan.npz"
PLAN_FILES = (PLAN_FILE, SHIFT_FILE)
"""A quantization plan, and its arrays."""

SIGNATURE = "model.sig"
"""The signature of a bundle's files, which its manifest cannot record, because it covers the manifest."""

SOURCE_FILE = ".cache/deploykit/source.json"
"""Where a bundle was pulled from: beside its files, where every version leaves it alone."""

_DEEPEST = 32
_MOST_NAMES = 100_000

MOST_NAMED = 20
"""How many files a message names."""


@dataclass(kw_only=True)
class Found:
    """What a folder holds.

    ``sizes`` are the bytes of each plain file, by its name below the folder, and of each that a link leads to.
    ``links`` are the names that are links or lie behind one; ``odd`` says what each other name stands for.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    links: set[str] = field(default_factory=set)
    odd: dict[str, str] = field(default_factory=dict)


def look_through(folder: Path, recorded: Collection[str] = ()) -> Found:
    """Look at every name below a folder but known litter, without opening a file.

    Args:
        folder: the bundle.
        recorded: the names that its manifest has; a link to a folder is followed only where some lie behind it.

    Raises:
        OSError: a folder cannot be read.
        BundleError: there are more names than a bundle has.
    """
    own = (MANIFEST, MANIFEST_DIGEST, SIGNATURE)
    wanted = _Wanted(
        files=frozenset((*recorded, *own)),
        folders=frozenset(parent.as_posix() for name in recorded for parent in PurePosixPath(name).parents),
    )
    found = Found()
    _look(folder, "", found, wanted, seen=(_identity(folder.stat()),), linked=False)
    for name in own:
        found.sizes.pop(name, None)
    return found


def is_litter(name: str) -> bool:
    """Return whether a name below a bundle is, or lies in, something that people's tools put beside files."""
    parts = name.split("/")
    if _VOLUME.fullmatch(parts[0]):
        return True
    return any(_litter().fullmatch(part) for part in parts)


@cache
def _litter() -> re.Pattern[str]:
    return re.compile("|".join(fnmatch.translate(pattern) for pattern in LITTER))


def is_dropping(name: str) -> bool:
    """Return whether a name below a bundle is that of a file that no person made."""
    return any(fnmatch.fnmatchcase(name.rpartition("/")[2], pattern) for pattern in DROPPINGS)


def read_manifest_text(folder: Path) -> bytes:
    """Read the manifest's bytes, also through a link.

    Raises:
        StorageError: this machine cannot read it now.
        BundleError: there is none, or it is no plain file.
    """
    path = folder / MANIFEST
    try:
        return read_plain(path, MOST_MANIFEST_BYTES, follow=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(why_no_bundle(folder)) from error
    except OSError as error:
        if is_environment(error):
            raise read_error(path, error) from error
        raise BundleError(f"{path} cannot be read: {error}. Check the path.") from error
    except NotPlainFile as error:
        raise BundleError(f"{path} is {error}. Copy the bundle again from its source.") from error
    except ValueError as error:  # too large, or a name with a null character
        raise BundleError(
            f"{path} cannot be a manifest: {error}. Give the folder that `deploykit export` wrote."
        ) from error


def digest_line(text: bytes) -> bytes:
    """Return the content of the manifest's digest file, in the form that ``sha256sum --check`` reads."""
    return f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode()


def digest_problems(folder: Path, text: bytes) -> list[str]:
    """Compare a manifest's bytes with its digest file.

    Raises:
        StorageError: this machine cannot read it now.
    """
    path = folder / MANIFEST_DIGEST
    expected = digest_line(text)
    try:
        written = read_plain(path, len(expected), follow=True)
    except FileNotFoundError:
        return [f"{MANIFEST_DIGEST}: missing"]
    except OSError as error:
        _raise_environment(path, error)
        return [f"{MANIFEST_DIGEST}: {error}"]
    except NotPlainFile as error:
        return [f"{MANIFEST_DIGEST}: {error}"]
    except FileTooLarge:
        written = b""
    return [] if written == expected else [f"{MANIFEST}: does not match {MANIFEST_DIGEST}"]


def file_problems(folder: Path, manifest: Manifest, left: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """Compare every file of a bundle with its manifest.

    Args:
        folder: the bundle.
        manifest: its manifest.
        left: the files whose digests somebody else compares.

    Returns:
        What is wrong with recorded files, and which other names are there that are not known litter.

    Raises:
        StorageError: this machine cannot read one now.
    """
    try:
        found = look_through(folder, manifest.files)
    except OSError as error:
        _raise_environment(folder, error)
        return [str(error)], []
    wrong = []
    if manifest.engine not in manifest.files:
        wrong.append(f"{manifest.engine}: named as the engine and not recorded in {MANIFEST}")
    for name, record in manifest.files.items():
        if name in found.odd:
            wrong.append(f"{name}: {found.odd[name]}; expected a plain file")
        elif name not in found.sizes:
            wrong.append(f"{name}: missing")
        elif found.sizes[name] != record.size:
            wrong.append(f"{name}: {found.sizes[name]} bytes; expected {record.size}")
        elif name not in left:
            wrong += _digest_problem(folder / name, name, record.sha256)
    return wrong, unrecorded(found, manifest.files)


def unrecorded(found: Found, recorded: Collection[str]) -> list[str]:
    """Name what a folder holds beside recorded files and known litter, and what each is."""
    kinds = dict.fromkeys(found.links, "a symbolic link, ") | {name: f"{odd}, " for name, odd in found.odd.items()}
    names = sorted(name for name in (*found.sizes, *found.odd) if name not in recorded)
    return [f"{name}: {kinds.get(name, '')}not recorded in {MANIFEST}" for name in names]


def strangers(folder: Path) -> tuple[list[str], list[str]]:
    """Name the files of a bundle's folder that deploykit did not write.

    Returns:
        Those that people or their tools made, and those that no person made (`DROPPINGS`), which are plain files.

    Raises:
        BundleError: the manifest is not readable, so that nobody can tell.
    """
    try:
        own = recorded_names(read_manifest_text(folder), folder / MANIFEST)
    except BundleError as error:
        raise BundleError(
            f"{folder} will not be replaced, because nobody can tell which of its files deploykit wrote: {error} "
            "Remove the folder yourself, or choose another."
        ) from error
    own |= {MANIFEST, MANIFEST_DIGEST, SIGNATURE, SOURCE_FILE}
    others: list[str] = []
    droppings: list[str] = []
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for path in sorted(Path(parent) / name for name in (*names, *links)):
            name = path.relative_to(folder).as_posix()
            if name not in own:
                plain = is_dropping(name) and stat.S_ISREG(path.lstat().st_mode)
                (droppings if plain else others).append(name)
    more = [f"and {len(others) - MOST_NAMED} more"] if len(others) > MOST_NAMED else []
    return others[:MOST_NAMED] + more, droppings


def left_behind(folder: Path) -> re.Pattern[str]:
    """Return what the names of a bundle's temporary neighbours look like."""
    return re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}({PARTIAL}|{ASIDE})")


def why_no_bundle(folder: Path) -> str:
    """Say what is at a path that is not a bundle, and what to give instead."""
    if os.path.isdir(folder):  # noqa: PTH112  (pathlib raises where that cannot be told)
        try:
            names = sorted(entry.name for entry in folder.iterdir())
        except OSError as error:
            return f"{folder} is a folder that cannot be read ({error}). Give a folder that this user can read."
        inner = [name for name in names if is_manifest(folder / name / MANIFEST)]
        if len(inner) == 1:
            return f"{folder} is not a bundle, and {folder / inner[0]} in it is one. Give that folder."
        held = ", ".join(names[:6]) or "nothing"
        return (
            f"{folder} is not a bundle: expected a {MANIFEST}, and the folder holds {held}. "
            "Give the folder that `deploykit export` wrote."
        )
    if not os.path.lexists(folder):
        return f"there is no bundle at {folder}: nothing has that name.{_aside_hint(folder)} Check the path."
    return f"{folder} is {_file_kind(folder)}; a bundle is a folder with a {MANIFEST}. {_unpack(folder)}"


def _aside_hint(folder: Path) -> str:
    """Say where an interrupted overwrite left the bundle."""
    try:
        asides = [path for path in folder.parent.iterdir() if left_behind(folder).fullmatch(path.name)]
    except OSError:
        return ""
    found = next((path for path in asides if path.suffix == ASIDE), None)
    return f" An interrupted overwrite left the earlier bundle at {found}: rename it back." if found else ""


def is_manifest(path: Path) -> bool:
    """Return whether a path stands for a file; False also where that cannot be told."""
    try:
        return path.is_file()
    except OSError:
        return False


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """The files that a manifest records, and the folders that they are in."""

    files: frozenset[str]
    folders: frozenset[str]


def _look(
    folder: Path, prefix: str, found: Found, wanted: _Wanted, *, seen: tuple[tuple[int, int], ...], linked: bool
) -> None:
    for entry in sorted(os.scandir(folder), key=lambda each: each.name):
        name = f"{prefix}{entry.name}"
        if name not in wanted.files and name not in wanted.folders and is_litter(name):
            continue
        if len(found.sizes) + len(found.odd) > _MOST_NAMES:
            raise BundleError(f"{folder} holds more than {_MOST_NAMES} files. Give the folder of a bundle.")
        behind_link = linked or entry.is_symlink()
        if behind_link:
            found.links.add(name)
        status = _status(entry)
        if status is None:
            found.odd[name] = "a link that leads to nothing"
        elif stat.S_ISDIR(status.st_mode):
            problem = _folder_problem(name, _identity(status), wanted, seen, linked=behind_link)
            if problem is not None:
                found.odd[name] = problem
            else:
                inner = (*seen, _identity(status))
                _look(folder / entry.name, f"{name}/", found, wanted, seen=inner, linked=behind_link)
        elif (kind := kind_of(status.st_mode)) is not None:
            found.odd[name] = kind
        else:
            found.sizes[name] = status.st_size


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Return what a name, or the link that it is, stands for; None for a link to nothing."""
    try:
        return entry.stat()
    except OSError as error:
        if is_environment(error) or not entry.is_symlink():
            raise
        return None


def _folder_problem(
    name: str, identity: tuple[int, int], wanted: _Wanted, seen: tuple[tuple[int, int], ...], *, linked: bool
) -> str | None:
    """Say why a folder is not looked into; None where it is."""
    if identity in seen or len(seen) > _DEEPEST:
        return "a link that leads in a circle, or folders too deep"
    if linked and name not in wanted.folders:
        return "a symbolic link to a folder"
    return "a folder" if name in wanted.files else None


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _digest_problem(path: Path, name: str, expected: str) -> list[str]:
    try:
        with open_plain(path, follow=True) as file:
            seen = digest_of(file)
    except OSError as error:
        _raise_environment(path, error)
        return [f"{name}: {error}"]
    except NotPlainFile as error:
        return [f"{name}: {error}"]
    return [] if seen == expected else [f"{name}: SHA-256 {seen[:12]}...; expected {expected[:12]}..."]


def _raise_environment(path: Path, error: OSError) -> None:
    """Raise an error that says something of this machine, and nothing of the bundle.

    Raises:
        StorageError: it does.
    """
    if is_environment(error):
        raise read_error(path, error) from error


def _file_kind(path: Path) -> str:
    try:
        kind = kind_of(path.stat().st_mode)
        return kind or {"zip": "a ZIP archive", "tar": "a tar archive"}.get(_archive(path), "a file")
    except (OSError, ValueError, StorageError):
        return "a file that cannot be read"


def _archive(path: Path) -> str:
    """Return ``zip``, ``tar``, or nothing: what the first bytes say."""
    with open_plain(path, follow=True) as file:
        head = file.read(512)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    packed = head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"))
    return "tar" if head[257:262] == b"ustar" or (packed and ".t" in path.name) else ""


def _unpack(path: Path) -> str:
    try:
        archive = _archive(path)
    except (OSError, ValueError):
        archive = ""
    target = path.name.split(".")[0] or "bundle"
    if archive == "zip":
        return f"Unpack it, `python -m zipfile -e {path} {target}`, and give the folder."
    if archive == "tar":
        return f"Unpack it, `mkdir {target} && tar -xf {path} -C {target}`, and give the folder."
    return "Give the folder."
