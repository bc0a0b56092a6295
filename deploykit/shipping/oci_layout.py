"""An OCI image layout, a folder that holds artifacts by their digests: written, and read with every digest checked.

https://github.com/opencontainers/image-spec, version 1.1: ``oci-layout``, ``index.json`` and ``blobs/sha256``. A bundle
is one image manifest of the artifact type `ARTIFACT_TYPE`, with a layer for each file and the file's name in the
annotation `TITLE`, as ORAS lays artifacts out. Equal bundles have equal manifests, and so equal digests.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from deploykit.errors import BundleError, SpecError
from deploykit.locks import locked_folder
from deploykit.manifest import FileRecord, is_inside
from deploykit.output_places import check_outside_bundles
from deploykit.places import is_environment, read_error, storage_error
from deploykit.plain_files import FileTooLarge, NotPlainFile, digest_of, open_plain, read_plain
from deploykit.shipping.address import OciAddress
from deploykit.shipping.shipment import OWN, Shipment, damaged, file_problem

ARTIFACT_TYPE = "application/vnd.deploykit.bundle.v1"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
FILE_TYPE = "application/octet-stream"
TITLE = "org.opencontainers.image.title"
REF_NAME = "org.opencontainers.image.ref.name"

LAYOUT, INDEX, BLOBS = "oci-layout", "index.json", "blobs/sha256"
VERSION = b'{"imageLayoutVersion":"1.0.0"}'

_EMPTY = b"{}"
_MOST_JSON_BYTES = 4 << 20
_PARTIAL = ".deploykit-partial"
_LOCK_SECONDS = 60.0


class Descriptor(msgspec.Struct, rename="camel", omit_defaults=True, kw_only=True):
    """A blob: its type, digest and size in bytes."""

    media_type: str
    digest: str
    size: int
    artifact_type: str | None = None
    annotations: dict[str, str] = {}


class ImageManifest(msgspec.Struct, rename="camel", kw_only=True):
    """An image manifest of an artifact."""

    schema_version: int
    media_type: str = MANIFEST_TYPE
    artifact_type: str = ""
    config: Descriptor
    layers: list[Descriptor]
    annotations: dict[str, str] = {}


def write_layout(shipment: Shipment, address: OciAddress) -> str:
    """Put a bundle into an image layout, which is made where there is none, and let the tag name it.

    What had the tag before stays under its digest. The index, which is replaced in one step at the end, is what makes
    a bundle visible; blobs that were added are removed where that fails.

    Returns:
        The digest of its manifest.

    Raises:
        SpecError: the folder is something else than an image layout or lies in a bundle, or its index cannot be read.
        BundleError: the bundle was replaced while it was read.
        StorageError: the folder cannot be written.
    """
    path = address.path.absolute()
    check_outside_bundles(path)
    try:
        if path.exists() and any(path.iterdir()):
            _check_layout(path)
            with locked_folder(path, f"to push to {address}", seconds=_LOCK_SECONDS):
                _sweep(path)
                return _add(shipment, path, address.tag)
        with _new_layout(path) as staging:
            return _add(shipment, staging, address.tag)
    except NotADirectoryError as error:
        raise SpecError(f"{path} is not a folder; an OCI image layout is one. Choose another name.") from error
    except OSError as error:
        raise storage_error(f"the OCI image layout {path} cannot be written", error) from error


def read_layout(address: OciAddress) -> tuple[str, dict[str, Path], dict[str, FileRecord]]:
    """Find a bundle in an image layout, and compare every blob of it with its digest.

    Returns:
        The digest of its manifest, the blob of each file by the file's name in the bundle, and what each was proved to
        be.

    Raises:
        SpecError: there is no image layout, or nothing in it has the tag or the digest.
        BundleError: blobs are missing, or not of their size and digest; or it is no bundle.
        StorageError: this machine cannot read it.
    """
    path = address.path.absolute()
    try:
        _check_layout(path)
        descriptor = _found(address, _index_of(path))
        content = _checked_manifest(path, descriptor, address)
        files: dict[str, Path] = {}
        records: dict[str, FileRecord] = {}
        problems: list[str] = []
        for layer in content.layers:
            name = layer.annotations.get(TITLE, "")
            if not (is_inside(name) or name in OWN) or name in files:
                raise _no_bundle(address, f"a layer is called {name!r:.60}")
            files[name] = _blob(path, layer.digest, address)
            records[name] = FileRecord(size=layer.size, sha256=layer.digest.removeprefix("sha256:"))
            problems += file_problem(files[name], name, records[name])
    except OSError as error:
        if is_environment(error):
            raise read_error(path, error) from error
        raise BundleError(f"{address} cannot be read: {error}. Check the path.") from error
    if problems:
        raise damaged(str(address), problems)
    return descriptor.digest, files, records


def _check_layout(path: Path) -> None:
    """Refuse a folder that is not an image layout of a known version.

    Raises:
        SpecError: it is not.
    """
    try:
        text = read_plain(path / LAYOUT, 1024, follow=True)
        version = msgspec.json.decode(text, type=dict[str, Any]).get("imageLayoutVersion")
    except (FileNotFoundError, NotADirectoryError) as error:
        what = f"has no file {LAYOUT}" if path.is_dir() else "is no folder" if path.exists() else "does not exist"
        raise SpecError(
            f"{path} {what}, so it is not an OCI image layout. Check the path, or push to a new one."
        ) from error
    except (NotPlainFile, ValueError, msgspec.MsgspecError) as error:
        raise SpecError(f"{path / LAYOUT} cannot be read as that of an OCI image layout: {error}.") from error
    if not isinstance(version, str) or version.partition(".")[0] != "1":
        raise SpecError(f"{path} is an OCI image layout of version {version!r:.20}; this deploykit reads version 1.")


def _index_of(path: Path) -> list[Descriptor]:
    return _decoded_index(_index_text(path), path)


def _index_text(path: Path) -> bytes:
    try:
        return read_plain(path / INDEX, _MOST_JSON_BYTES, follow=True)
    except FileNotFoundError:
        return b'{"schemaVersion":2,"manifests":[]}'
    except (NotPlainFile, ValueError) as error:
        raise SpecError(f"{path / INDEX} cannot be read: {error}. Give a whole OCI image layout.") from error


def _decoded_index(text: bytes, path: Path) -> list[Descriptor]:
    class Index(msgspec.Struct):
        manifests: list[Descriptor]

    try:
        return msgspec.json.decode(text, type=Index).manifests
    except msgspec.MsgspecError as error:
        raise SpecError(f"{path / INDEX} is not an index ({error}). Give a whole OCI image layout.") from error


def _found(address: OciAddress, manifests: list[Descriptor]) -> Descriptor:
    for each in manifests:
        if each.digest == address.digest or (address.digest is None and each.annotations.get(REF_NAME) == address.tag):
            return each
    tags = sorted({each.annotations[REF_NAME] for each in manifests if REF_NAME in each.annotations})
    wanted = f"the digest {address.digest}" if address.digest else f"the tag {address.tag!r}"
    raise SpecError(f"nothing in {address.path} has {wanted}; its tags: {', '.join(tags) or 'none'}.")


def _checked_manifest(path: Path, descriptor: Descriptor, address: OciAddress) -> ImageManifest:
    """Read the manifest of a bundle, of which the digest is checked."""
    if descriptor.media_type != MANIFEST_TYPE:
        raise _no_bundle(address, f"its type is {descriptor.media_type!r:.80}")
    try:
        text = read_plain(_blob(path, descriptor.digest, address), _MOST_JSON_BYTES, follow=True)
    except FileNotFoundError as error:
        raise damaged(str(address), [f"its manifest {descriptor.digest}: missing"]) from error
    except (NotPlainFile, FileTooLarge) as error:
        raise damaged(str(address), [f"its manifest {descriptor.digest}: {error}"]) from error
    if digest_name(text) != descriptor.digest or len(text) != descriptor.size:
        raise damaged(str(address), [f"its manifest does not have the digest {descriptor.digest}"])
    try:
        content = msgspec.json.decode(text, type=ImageManifest)
    except msgspec.MsgspecError as error:
        raise _no_bundle(address, f"its manifest does not decode: {error}") from error
    if content.artifact_type != ARTIFACT_TYPE:
        raise _no_bundle(address, f"its artifact type is {content.artifact_type!r:.80}")
    return content


def _no_bundle(address: OciAddress, reason: str) -> BundleError:
    return BundleError(f"{address} is not a bundle: {reason}. Give what `deploykit push` wrote.")


def _blob(path: Path, digest: str, address: OciAddress) -> Path:
    algorithm, _, value = digest.partition(":")
    if algorithm != "sha256" or len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise _no_bundle(address, f"it names a blob {digest!r:.80}")
    return path / BLOBS / value


def digest_name(content: bytes) -> str:
    """Return the digest of a blob as OCI writes it."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@contextmanager
def _new_layout(path: Path) -> Iterator[Path]:
    """Give a neighbour with an empty layout in it, which is renamed to its place at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
    try:
        (staging / BLOBS).mkdir(parents=True)
        (staging / LAYOUT).write_bytes(VERSION)
        yield staging
        with suppress(FileNotFoundError):
            path.rmdir()  # an empty folder
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Remove what a killed push left; the caller holds the lock."""
    for left in path.glob(f".*{_PARTIAL}"):
        with suppress(OSError):
            left.unlink()


def _add(shipment: Shipment, root: Path, tag: str) -> str:
    """Add a bundle's blobs, its manifest and its entry in the index."""
    raw = msgspec.json.decode(_index_text(root))
    _decoded_index(msgspec.json.encode(raw), root)
    added: list[Path] = []
    try:
        for name, record in shipment.files.items():
            _add_blob(root, record, shipment.folder / name, added)
        manifest = _manifest_of(shipment)
        for content in (_EMPTY, manifest):
            _add_bytes(root, content, added)
        digest = digest_name(manifest)
        raw |= {"schemaVersion": 2, "mediaType": INDEX_TYPE}
        raw["manifests"] = _with_entry(raw["manifests"], digest, len(manifest), tag)
        _replace(root / INDEX, msgspec.json.encode(raw))
    except BaseException:
        for path in added:
            path.unlink(missing_ok=True)
        raise
    return digest


def _manifest_of(shipment: Shipment) -> bytes:
    layers = [
        Descriptor(
            media_type="application/json" if name.endswith(".json") else FILE_TYPE,
            digest=f"sha256:{record.sha256}",
            size=record.size,
            annotations={TITLE: name},
        )
        for name, record in sorted(shipment.files.items())
    ]
    backbone, runtime = shipment.manifest.backbone.name, shipment.manifest.runtime
    return msgspec.json.encode(
        ImageManifest(
            schema_version=2,
            artifact_type=ARTIFACT_TYPE,
            config=Descriptor(media_type=EMPTY_TYPE, digest=digest_name(_EMPTY), size=len(_EMPTY)),
            layers=layers,
            annotations={TITLE: f"{backbone} {runtime} {shipment.manifest.precision}"},
        )
    )


def _with_entry(manifests: list[dict[str, Any]], digest: str, size: int, tag: str) -> list[dict[str, Any]]:
    """Return an index's entries with a tag on one digest, and on no other; an entry that lost its tag stays."""
    kept = []
    for entry in manifests:
        names = dict(entry.get("annotations") or {})
        if names.get(REF_NAME) == tag:
            del names[REF_NAME]
            entry = {**entry, "annotations": names}  # noqa: PLW2901
        if entry["digest"] != digest or REF_NAME in names:
            kept.append(entry)
    descriptor = Descriptor(
        media_type=MANIFEST_TYPE, digest=digest, size=size, artifact_type=ARTIFACT_TYPE, annotations={REF_NAME: tag}
    )
    return [*kept, msgspec.to_builtins(descriptor)]


def _add_blob(root: Path, record: FileRecord, source: Path, added: list[Path]) -> None:
    """Copy a file into the blobs, unless it is there and whole."""
    target = root / BLOBS / record.sha256
    if not file_problem(target, record.sha256, record):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = root / f".{secrets.token_hex(8)}{_PARTIAL}"
    try:
        with open_plain(source, follow=True) as file, partial.open("xb") as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
        with partial.open("rb") as file:
            if digest_of(file) != record.sha256:
                raise BundleError(f"{source} was replaced while it was pushed. Fix: push the bundle again.")
        new = not target.exists()
        partial.rename(target)
        added += [target] * new
    finally:
        partial.unlink(missing_ok=True)


def _add_bytes(root: Path, content: bytes, added: list[Path]) -> None:
    target = root / BLOBS / hashlib.sha256(content).hexdigest()
    record = FileRecord(size=len(content), sha256=target.name)
    if file_problem(target, target.name, record):
        new = not target.exists()
        _replace(target, content, root)
        added += [target] * new


def _replace(path: Path, content: bytes, root: Path | None = None) -> None:
    """Write a file in one step."""
    partial = (root or path.parent) / f".{secrets.token_hex(8)}{_PARTIAL}"
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
