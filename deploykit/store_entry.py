"""One entry of the store: a folder with its files, and a record that proves which entry it is and that it is whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from deploykit.errors import SpecError
from deploykit.places import is_environment
from deploykit.plain_files import FileTooLarge, NotPlainFile, digest_of, kind_of, open_plain, read_plain
from deploykit.unset import UNSET

SCHEMA = 1
RECORD = "entry.json"
RECORD_DIGEST = "entry.sha256"
MOST_RECORD_BYTES = 8 << 20

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class DamagedEntry(Exception):
    """An entry is not what its place says, or is not whole; the message says why."""


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """The size in bytes and the SHA-256 of one file of an entry."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """What an entry says of itself.

    ``key`` is the digest of ``kind`` and ``parts``, the canonical text of all that decides the entry. ``title`` is
    for people.
    """

    schema: int = SCHEMA
    kind: str
    key: str
    title: str = ""
    parts: str
    files: dict[str, StoredFile] = field(default_factory=dict)


def canonical(parts: Mapping[str, object]) -> str:
    """Return the text of what decides an entry: equal parts have equal texts, in every process.

    Args:
        parts: str, int, float, bool, None, `UNSET`, lists, tuples, str-keyed mappings and dataclasses (whose type's
            name counts too), nested at will. A large input is named by its own digest.

    Raises:
        SpecError: a value of another type, which has no stable text.
    """
    return json.dumps(_plain(parts, "parts"), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _plain(value: object, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if value is UNSET:
        return {"type": "UNSET"}
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise SpecError(f"{where} has the key {name!r}; a cache key's parts are named by str.")
        return {name: _plain(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
        return {"type": type(value).__qualname__, "fields": _plain(fields, where)}
    raise SpecError(
        f"{where} is a {type(value).__name__}, which has no stable text. "
        "Give str, numbers, lists, mappings or dataclasses; name arrays and files by their digest."
    )


def key_of(kind: str, parts: str) -> str:
    """Return the SHA-256 in hex of a kind and of the canonical text of parts."""
    return hashlib.sha256(f"{SCHEMA}\n{kind}\n{parts}".encode()).hexdigest()


def seal(folder: Path, record: Record) -> Record:
    """Write the record of a folder's files, and give the folder to this user alone; returns what was written.

    Raises:
        DamagedEntry: something in the folder is no plain file.
        OSError: it cannot be written.
    """
    _close_to_others(folder)
    files = {}
    for name, path, status in _walk(folder):
        with open_plain(path) as file:
            files[name] = StoredFile(size=status.st_size, sha256=digest_of(file))
    record = dataclasses.replace(record, files=dict(sorted(files.items())))
    text = msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"
    (folder / RECORD).write_bytes(text)
    (folder / RECORD_DIGEST).write_bytes(_digest_line(text))
    for name in (RECORD, RECORD_DIGEST):
        (folder / name).chmod(0o600)
    return record


def read_record(folder: Path) -> Record:
    """Read the record of an entry and check it by its digest; the other files are not looked at.

    Raises:
        DamagedEntry: there is none, or it is not whole.
        OSError: this machine cannot read it now (open files, permissions, a disk error).
    """
    try:
        _check_own(folder.lstat(), folder.name)
        text = _read_own(folder, RECORD)
        if _read_own(folder, RECORD_DIGEST) != _digest_line(text):
            raise DamagedEntry(f"{RECORD} does not match {RECORD_DIGEST}")
        record = msgspec.json.decode(text, type=Record)
    except FileNotFoundError as error:
        raise DamagedEntry(f"{Path(error.filename).name} is missing") from error
    except OSError as error:
        _raise_environment(error)
    except (NotPlainFile, FileTooLarge) as error:
        raise DamagedEntry(f"{RECORD}: {error}") from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DamagedEntry(f"{RECORD} is not readable: {error}") from error
    if record.schema != SCHEMA or key_of(record.kind, record.parts) != record.key:
        raise DamagedEntry(f"{RECORD} does not prove its key")
    return record


def check(folder: Path, kind: str, key: str) -> Record:
    """Verify an entry: that it is the one of its place, of this user alone, and every byte of it.

    Raises:
        DamagedEntry: it is not; the message says what was seen.
        OSError: this machine cannot read it now (open files, a disk error).
    """
    record = read_record(folder)
    if (record.kind, record.key) != (kind, key):
        raise DamagedEntry(f"it is the entry {record.kind}/{record.key[:12]} under another name")
    try:
        found = {name: (path, status) for name, path, status in _walk(folder) if name not in (RECORD, RECORD_DIGEST)}
        odd = sorted(found.keys() ^ record.files.keys())
        if odd:
            raise DamagedEntry(f"{odd[0]!r} is {'not recorded' if odd[0] in found else 'missing'}")
        for name, expected in record.files.items():
            _check_file(name, *found[name], expected)
    except NotPlainFile as error:
        raise DamagedEntry(str(error)) from error
    except OSError as error:
        _raise_environment(error)
    return record


def _check_file(name: str, path: Path, status: os.stat_result, expected: StoredFile) -> None:
    _check_own(status, name)
    if status.st_size != expected.size:
        raise DamagedEntry(f"{name!r} has {status.st_size} bytes; expected {expected.size}")
    with open_plain(path) as file:
        if digest_of(file) != expected.sha256:
            raise DamagedEntry(f"{name!r} has another SHA-256 than was recorded")


def _walk(folder: Path) -> Iterator[tuple[str, Path, os.stat_result]]:
    """Yield every file below a folder: its name in the entry, path and status.

    Raises:
        DamagedEntry: a link or another special file, or a folder of another owner.
    """
    for parent, folders, names in os.walk(folder):
        for name in sorted([*names, *folders]):
            path = Path(parent) / name
            status = path.lstat()
            relative = path.relative_to(folder).as_posix()
            if stat.S_ISDIR(status.st_mode):
                _check_own(status, relative)
                continue
            kind = kind_of(status.st_mode)
            if kind is not None:
                raise DamagedEntry(f"{relative!r} is {kind}")
            yield relative, path, status


def _close_to_others(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        Path(parent).chmod(0o700)
        for path in (Path(parent) / name for name in names):
            if not path.is_symlink():
                path.chmod(0o600)


def _read_own(folder: Path, name: str) -> bytes:
    path = folder / name
    _check_own(path.lstat(), name)
    return read_plain(path, MOST_RECORD_BYTES)


def _check_own(status: os.stat_result, name: str) -> None:
    """Refuse what another user owns or could write."""
    if status.st_uid != os.geteuid():
        raise DamagedEntry(f"{name!r} belongs to user {status.st_uid}, and this process is of user {os.geteuid()}")
    if status.st_mode & _OTHERS_WRITE:
        raise DamagedEntry(f"{name!r} can be written by other users (mode {stat.S_IMODE(status.st_mode):04o})")


def _raise_environment(error: OSError) -> NoReturn:
    """Raise an error again that says nothing of the entry; any other is damage."""
    if is_environment(error):
        raise error
    raise DamagedEntry(str(error)) from error


def _digest_line(text: bytes) -> bytes:
    """In the form that ``sha256sum --check`` reads."""
    return f"{hashlib.sha256(text).hexdigest()}  {RECORD}\n".encode()
