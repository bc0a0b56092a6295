"""The files of a bundle that are shipped: those of its manifest, the manifest with its digest, and the signature."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from deploykit.bundle import open_bundle, sha256_of
from deploykit.bundle_files import MOST_NAMED, SIGNATURE, digest_line, is_manifest, read_manifest_text
from deploykit.errors import BundleError
from deploykit.manifest import (
    MANIFEST,
    MANIFEST_DIGEST,
    MOST_MANIFEST_BYTES,
    FileRecord,
    Manifest,
    decode_manifest,
)
from deploykit.plain_files import FileTooLarge, NotPlainFile, digest_of, open_plain, read_plain

OWN = (MANIFEST, MANIFEST_DIGEST, SIGNATURE)
"""The files of a bundle that its manifest does not record."""


@dataclass(frozen=True, kw_only=True)
class Shipment:
    """A whole bundle: its manifest, and the size and digest of each file that is shipped, by its name."""

    folder: Path
    manifest: Manifest
    files: Mapping[str, FileRecord]

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(record.size for record in self.files.values())


def make_shipment(folder: Path) -> Shipment:
    """Verify a bundle and list what is shipped of it; files of other tools beside it are not.

    Raises:
        BundleError: the bundle is damaged, or was replaced while it was read.
    """
    manifest = open_bundle(folder)
    text = read_manifest_text(folder)
    if decode_manifest(text, folder / MANIFEST) != manifest:
        raise BundleError(f"the bundle {folder} was replaced while it was read. Fix: try again.")
    files = dict(manifest.files)
    files[MANIFEST] = _record_of(text)
    files[MANIFEST_DIGEST] = _record_of(digest_line(text))
    signature = folder / SIGNATURE
    if is_manifest(signature):
        files[SIGNATURE] = FileRecord(size=signature.stat().st_size, sha256=sha256_of(signature))
    return Shipment(folder=folder, manifest=manifest, files=files)


def _record_of(content: bytes) -> FileRecord:
    return FileRecord(size=len(content), sha256=hashlib.sha256(content).hexdigest())


def arrived_manifest(files: Mapping[str, Path], origin: str) -> Manifest:
    """Return the manifest of a bundle that arrived, checked against its digest file.

    Args:
        files: where each file of the bundle is on this machine, by its name in the bundle.
        origin: where it comes from, for messages.

    Raises:
        BundleError: it is missing, damaged or from a newer schema.
    """
    absent = [name for name in (MANIFEST, MANIFEST_DIGEST) if name not in files]
    if absent:
        raise BundleError(f"{origin} is not a bundle: {' and '.join(absent)} missing. Give the address of a bundle.")
    try:
        text, digest = (
            read_plain(files[name], MOST_MANIFEST_BYTES, follow=True) for name in (MANIFEST, MANIFEST_DIGEST)
        )
    except (NotPlainFile, FileTooLarge) as error:
        raise damaged(origin, [f"{MANIFEST} and {MANIFEST_DIGEST}: {error}"]) from error
    if digest != digest_line(text):
        raise damaged(origin, [f"{MANIFEST}: does not match {MANIFEST_DIGEST}"])
    return decode_manifest(text, Path(f"{origin}/{MANIFEST}"))


def check_arrived(
    files: Mapping[str, Path],
    manifest: Manifest,
    origin: str,
    proved: Mapping[str, FileRecord] = MappingProxyType({}),
) -> None:
    """Compare every file of a bundle that arrived with its manifest.

    Args:
        files: where each lies, by its name.
        manifest: the bundle's.
        origin: where it came from, for the message.
        proved: what files were found to be already, which are not read again.

    Raises:
        BundleError: names each that is missing, or not of its size and SHA-256.
    """
    problems = [f"{manifest.engine}: named as the engine and not recorded"] * (manifest.engine not in manifest.files)
    for name, record in manifest.files.items():
        if name not in files:
            problems.append(f"{name}: missing")
        elif proved.get(name) != record:
            problems += file_problem(files[name], name, record)
    if problems:
        raise damaged(origin, problems)


def file_problem(path: Path, name: str, record: FileRecord) -> list[str]:
    """Say what is wrong with a file; nothing where it has the size and the SHA-256 that are recorded."""
    try:
        with open_plain(path, follow=True) as file:
            size, seen = path.stat().st_size, digest_of(file)
    except FileNotFoundError:
        return [f"{name}: missing"]
    except NotPlainFile as error:
        return [f"{name}: {error}"]
    if size != record.size:
        return [f"{name}: {size} bytes; expected {record.size}"]
    return [] if seen == record.sha256 else [f"{name}: SHA-256 {seen[:12]}...; expected {record.sha256[:12]}..."]


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files into a folder, each under its name in the bundle."""
    for name, path in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_plain(path, follow=True) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)


def damaged(origin: str, problems: list[str]) -> BundleError:
    """Return the error of a bundle that did not arrive as it was made."""
    shown = problems[:MOST_NAMED] + [f"and {len(problems) - MOST_NAMED} more"] * (len(problems) > MOST_NAMED)
    lines = "".join(f"\n  {problem}" for problem in shown)
    return BundleError(f"the bundle at {origin} is damaged, and nothing of it was written:{lines}\nPush it again.")
