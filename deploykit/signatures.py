"""Signatures of bundles in the OpenSSF model-signing format, by its library: who made a bundle, beside what it holds.

https://github.com/ossf/model-signing-spec. The signature covers the digest of every file, the manifest's among them.
It is kept in the bundle as ``model.sig``, where ``model_signing verify`` reads it too.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from deploykit.arguments import check_arguments
from deploykit.bundle import open_bundle
from deploykit.bundle_files import PARTIAL, SIGNATURE, read_manifest_text
from deploykit.errors import BundleError, SpecError, UntrustedEngine
from deploykit.manifest import MANIFEST, MANIFEST_DIGEST, Manifest, decode_manifest
from deploykit.optional import require
from deploykit.places import is_environment, read_error, scratch_folder, storage_error
from deploykit.plain_files import NotPlainFile, read_plain

_MOST_SIGNATURE_BYTES = 64 << 20
_MOST_KEY_BYTES = 1 << 20
_FIX = "Fix: sign the bundle again with deploykit sign, or get it again from its signer."


class _Resource(msgspec.Struct):
    name: str
    digest: str
    algorithm: str


class _Predicate(msgspec.Struct):
    resources: list[_Resource]


class _Statement(msgspec.Struct):
    predicate: _Predicate


class _Envelope(msgspec.Struct):
    payload: str


class _SigstoreBundle(msgspec.Struct):
    dsse_envelope: _Envelope = msgspec.field(name="dsseEnvelope")


def sign_bundle(
    folder: str | os.PathLike[str],
    key: str | os.PathLike[str],
    *,
    password: str | None = None,
    certificate: str | os.PathLike[str] | None = None,
    chain: Sequence[str | os.PathLike[str]] = (),
) -> Path:
    """Sign every file of a bundle, and keep the signature in it; an earlier one is replaced.

    Args:
        folder: the bundle, whose files are verified first.
        key: the signer's private key, PEM, on the curve P-256, P-384 or P-521.
        password: the key's, where it is encrypted.
        certificate: of the key, PEM, so that it is checked by its authority's certificate and not by the public key.
        chain: certificates between that one and the authority's, PEM.

    Returns:
        The signature's file.

    Raises:
        BundleError: the bundle is damaged.
        SpecError: the key or a certificate cannot be read, or is of another kind.
        StorageError: the signature cannot be written.
        MissingDependency: the package model-signing is not installed.
    """
    check_arguments(sign_bundle, locals())
    folder, library = Path(folder), require("model_signing")
    manifest = open_bundle(folder)
    ignored = _beside(folder, manifest)
    hashing = library.hashing.Config().set_ignored_paths(paths=ignored, ignore_git_paths=False).set_allow_symlinks(True)
    config = library.signing.Config().set_hashing_config(hashing)
    _check_readable(key, *([certificate] if certificate else []), *chain)
    try:
        if certificate is None:
            config.use_elliptic_key_signer(private_key=key, password=password)
        else:
            config.use_certificate_signer(private_key=key, signing_certificate=certificate, certificate_chain=chain)
    except (ValueError, TypeError) as error:
        raise SpecError(
            f"{key} cannot sign: {error}. Fix: give a private key in PEM on the curve P-256, P-384 or P-521, such as "
            "openssl ecparam -genkey -name prime256v1 -noout writes, and its password where it has one."
        ) from error
    with scratch_folder("sign") as scratch:
        try:
            config.sign(folder, scratch / SIGNATURE)
            _put_in_place(scratch / SIGNATURE, folder.absolute())
        except OSError as error:
            raise storage_error(f"the signature of {folder} cannot be written", error) from error
    return folder / SIGNATURE


def _check_readable(*files: str | os.PathLike[str]) -> None:
    for file in files:
        _read_key(Path(file))


def _beside(folder: Path, manifest: Manifest) -> list[Path]:
    """Return what lies in a bundle's folder and is none of its files."""
    tops = {name.partition("/")[0] for name in (MANIFEST, MANIFEST_DIGEST, *manifest.files)}
    return [path for path in folder.iterdir() if path.name not in tops]


def check_signature(folder: Path, manifest: Manifest, signer: str | os.PathLike[str]) -> None:
    """Refuse a bundle that a signer did not sign, or that is not the one that was signed.

    The signature is checked first, and then the manifest that was opened against the digests in it: what is opened
    is what was signed, also where somebody replaces files meanwhile.

    Args:
        folder: the bundle.
        manifest: the one that was read from it and that its engine is opened by.
        signer: the signer's public key, or the certificate of the authority that certified it, PEM.

    Raises:
        UntrustedEngine: there is no signature, it is another signer's, or the bundle was changed after it.
        SpecError: the signer's file cannot be read.
        MissingDependency: the package model-signing is not installed.
    """
    content = _read_signature(folder)
    with scratch_folder("verify-signature") as scratch:
        kept = scratch / SIGNATURE
        kept.write_bytes(content)
        _verify(folder, kept, Path(signer))
    text = read_manifest_text(folder)
    digests = {name: record.sha256 for name, record in manifest.files.items()}
    digests |= {MANIFEST: hashlib.sha256(text).hexdigest()}
    signed = _signed_digests(content, folder)
    wrong = sorted(name for name, digest in digests.items() if signed.get(name) != digest)
    if wrong or decode_manifest(text, folder / MANIFEST) != manifest:
        what = ", ".join(wrong) or MANIFEST
        raise UntrustedEngine(f"{folder} was changed after it was signed ({what}). {_FIX}")


def _put_in_place(signature: Path, folder: Path) -> None:
    """Let a signature appear in its bundle in one step; what a kill leaves is swept at the next export."""
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{PARTIAL}")
    partial.mkdir()
    try:
        shutil.copyfile(signature, partial / SIGNATURE)
        (partial / SIGNATURE).replace(folder / SIGNATURE)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _verify(folder: Path, signature: Path, signer: Path) -> None:
    """Let the library check a signature and every signed file."""
    library = require("model_signing")
    config = library.verifying.Config().set_ignore_unsigned_files(True)
    try:
        if b"CERTIFICATE" in _read_key(signer):
            config.use_certificate_verifier(certificate_chain=[signer])
        else:
            config.use_elliptic_key_verifier(public_key=signer)
    except (ValueError, TypeError) as error:
        raise SpecError(
            f"{signer} is no public key or certificate: {error}. Fix: give the signer's public key in PEM, such as "
            "openssl ec -pubout writes, or the certificate of its authority."
        ) from error
    with _library_errors(folder, signer):
        config.verify(folder, signature)


@contextmanager
def _library_errors(folder: Path, signer: Path) -> Iterator[None]:
    """Turn what the library raises into a typed error: it has no class of its own for a wrong signature."""
    try:
        yield
    except OSError as error:
        if is_environment(error):
            raise read_error(folder, error) from error
        raise UntrustedEngine(f"{folder} is not as it was signed: {error}. {_FIX}") from error
    except Exception as error:
        raise UntrustedEngine(
            f"{folder} is not signed by {signer}, or was changed after it was signed "
            f"({str(error) or type(error).__name__}). It is not opened. {_FIX}"
        ) from error


def _read_signature(folder: Path) -> bytes:
    path = folder / SIGNATURE
    try:
        return read_plain(path, _MOST_SIGNATURE_BYTES, follow=True)
    except FileNotFoundError as error:
        raise UntrustedEngine(f"{folder} carries no signature ({SIGNATURE}), and one was asked for. {_FIX}") from error
    except (OSError, NotPlainFile, ValueError) as error:
        raise UntrustedEngine(f"the signature {path} cannot be read: {error}. {_FIX}") from error


def _read_key(path: Path) -> bytes:
    try:
        return read_plain(path, _MOST_KEY_BYTES, follow=True)
    except (OSError, NotPlainFile, ValueError) as error:
        raise SpecError(f"the key or certificate {path} cannot be read: {error}. Fix: give a PEM file.") from error


def _signed_digests(content: bytes, folder: Path) -> Mapping[str, str]:
    """Return the SHA-256 of each file that a verified signature covers."""
    try:
        envelope = msgspec.json.decode(content, type=_SigstoreBundle).dsse_envelope
        statement = msgspec.json.decode(base64.b64decode(envelope.payload), type=_Statement)
    except (msgspec.MsgspecError, ValueError) as error:
        raise BundleError(f"the signature of {folder} is not of a known version ({error}). {_FIX}") from error
    return {each.name: each.digest for each in statement.predicate.resources if each.algorithm == "sha256"}
