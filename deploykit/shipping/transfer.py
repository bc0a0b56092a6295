"""Push a bundle to where others get it, and pull one: what arrives is what was verified, byte for byte."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from deploykit.arguments import check_arguments
from deploykit.bundle import open_bundle, writing
from deploykit.bundle_files import SIGNATURE, SOURCE_FILE
from deploykit.errors import BundleError, SpecError
from deploykit.plain_files import read_plain
from deploykit.shipping.address import Address, HubAddress, parse_address
from deploykit.shipping.hub import fetch_again, pull_from_hub, push_to_hub
from deploykit.shipping.oci_layout import read_layout, write_layout
from deploykit.shipping.shipment import arrived_manifest, check_arrived, copy_files, file_problem, make_shipment
from deploykit.signatures import check_signature

_MOST_SOURCE_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A bundle that was pushed or pulled.

    ``revision`` is the commit's hash or the manifest's digest, which names these very bytes for ever; ``pinned`` is the
    address that has it. ``size`` is the bytes of all ``files``. ``signed``: a signature travelled with it.
    """

    bundle: str
    address: str
    revision: str
    pinned: str
    files: int
    size: int
    signed: bool


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a bundle was pulled from: what was asked for, and what that was then."""

    address: str
    revision: str


def push_bundle(
    bundle: str | os.PathLike[str], destination: str, *, message: str | None = None, private: bool = False
) -> Transfer:
    """Push a bundle to a model hub repository, in one commit, or into an OCI image layout, under a tag.

    Every file is verified first; the digests and the signature travel as they are.

    Args:
        bundle: the folder.
        destination: ``hf://owner/name[@branch][/folder]`` or ``oci:PATH[:tag]``.
        message: of the commit in a repository.
        private: make the repository private, where it is made now.

    Raises:
        BundleError: the bundle is damaged.
        SpecError: no such form of address, or other files are in the place.
        TransferError: the hub cannot be reached, or refuses.
        StorageError: the folder cannot be written.
        MissingDependency: the package huggingface_hub is not installed.
    """
    check_arguments(push_bundle, locals())
    address = parse_address(destination)
    shipment = make_shipment(Path(bundle))
    if isinstance(address, HubAddress):
        revision = push_to_hub(shipment, address, message=message, private=private)
    else:
        if message is not None or private:
            raise SpecError(f"message and private are for repositories of the model hub, and {address} is a folder.")
        if address.digest is not None:
            raise SpecError(f"{address} names a digest, which follows from the bundle. Fix: give a tag, or none.")
        revision = write_layout(shipment, address)
    return Transfer(
        bundle=os.fspath(bundle),
        address=str(address),
        revision=revision,
        pinned=_pinned(address, revision),
        files=len(shipment.files),
        size=shipment.size,
        signed=SIGNATURE in shipment.files,
    )


def pull_bundle(
    source: str,
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    signed_by: str | os.PathLike[str] | None = None,
) -> Transfer:
    """Pull a bundle from a model hub repository or an OCI image layout, and keep in it which revision it is.

    Every file is compared with the manifest before anything is written at ``output``, where the bundle then appears in
    one step.

    Args:
        source: ``hf://owner/name[@revision][/folder]``, ``oci:PATH[:tag]`` or ``oci:PATH@sha256:...``.
        output: the folder to write; taken only when it is a bundle and ``overwrite`` is on.
        overwrite: replace an existing bundle, once the new one is whole.
        signed_by: the public key (PEM) of who must have signed it, or the certificate of an authority.

    Raises:
        SpecError: no such address, repository, revision or tag.
        BundleError: it is no bundle, or is damaged, and nothing was written; or ``output`` is taken.
        UntrustedEngine: it is not signed by ``signed_by``.
        TransferError: the hub cannot be reached, or refuses.
        StorageError: the folder cannot be written.
        MissingDependency: the package huggingface_hub, or model-signing for ``signed_by``, is not installed.
    """
    check_arguments(pull_bundle, locals())
    address, folder = parse_address(source), Path(output)
    if isinstance(address, HubAddress):
        revision, files = pull_from_hub(address)
        _check_from_hub(address, revision, files)
    else:
        revision, files, proved = read_layout(address)
        check_arrived(files, arrived_manifest(files, str(address)), str(address), proved)
    with writing(folder, overwrite=overwrite) as staging:
        copy_files(files, staging)
        if signed_by is not None:
            check_signature(staging, open_bundle(staging), signed_by)
        _keep_source(staging, Source(address=str(address), revision=revision))
    return Transfer(
        bundle=os.fspath(output),
        address=str(address),
        revision=revision,
        pinned=_pinned(address, revision),
        files=len(files),
        size=sum(path.stat().st_size for path in files.values()),
        signed=SIGNATURE in files,
    )


def pulled_from(folder: Path) -> Source | None:
    """Return where a bundle was pulled from; None where that is not recorded."""
    try:
        return msgspec.json.decode(read_plain(folder / SOURCE_FILE, _MOST_SOURCE_BYTES), type=Source)
    except (OSError, ValueError, msgspec.MsgspecError):
        return None


def _keep_source(staging: Path, source: Source) -> None:
    target = staging / SOURCE_FILE
    target.parent.mkdir(parents=True)
    target.write_bytes(msgspec.json.format(msgspec.json.encode(source), indent=2) + b"\n")


def _check_from_hub(address: HubAddress, commit: str, files: dict[str, Path]) -> None:
    """Compare files of the hub's cache with the manifest; what the cache holds damaged is downloaded once more.

    Raises:
        BundleError: the bundle is damaged there too.
    """
    manifest = arrived_manifest(files, str(address))
    try:
        check_arrived(files, manifest, str(address))
    except BundleError:
        records = {name: record for name, record in manifest.files.items() if name in files}
        wrong = [name for name, record in records.items() if file_problem(files[name], name, record)]
        files |= fetch_again(address, commit, wrong)
        check_arrived(files, manifest, str(address))


def _pinned(address: Address, revision: str) -> str:
    """Return the address that always gives the same bytes."""
    if isinstance(address, HubAddress):
        return str(HubAddress(repository=address.repository, revision=revision, folder=address.folder))
    return f"oci:{address.path}@{revision}"
