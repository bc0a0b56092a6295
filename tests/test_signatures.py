"""Signed bundles: the signer's opens, and no other, changed or unsigned one."""

from __future__ import annotations

import datetime
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import deploykit
from deploykit.bundle import MANIFEST, MANIFEST_DIGEST, read_manifest, write_manifest
from deploykit.cli.main import main
from deploykit.errors import BundleError, SpecError, StorageError, UntrustedEngine
from deploykit.signatures import _library_errors, _signed_digests, check_signature, sign_bundle
from tests.backends.bundles import write_bundle

pytest.importorskip("model_signing", reason="model-signing is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


def written_key(folder: Path, name: str) -> Path:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)
    (folder / f"{name}.pem").write_bytes(private)
    return folder / f"{name}.pem"


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    """A folder with the keys of the signer and of somebody else."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("signer", "other"):
        written_key(folder, name)
    return folder


@pytest.fixture(scope="module")
def whole(keys, tmp_path_factory) -> Path:
    bundle = write_bundle(tmp_path_factory.mktemp("signed") / "bundle", "onnxruntime")
    assert sign_bundle(bundle, keys / "signer.pem") == bundle / "model.sig"
    return bundle


@pytest.fixture
def signed(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "bundle")


def test_a_signed_bundle_opens_with_and_without_its_signer(signed, keys):
    images = np.zeros((1, 3, 32, 32), np.float32)
    for options in ({}, {"signed_by": keys / "signer.pub"}):
        with deploykit.load_bundle(signed, **options) as model:
            model(images)
        with deploykit.create_backbone(str(signed), **options) as model:
            model(images)
        assert deploykit.verify_bundle(signed, **options).passed


def test_another_signer_is_refused(signed, keys):
    with pytest.raises(UntrustedEngine, match="is not signed by"):
        deploykit.load_bundle(signed, signed_by=keys / "other.pub")


def test_a_bundle_without_a_signature_is_refused(signed, keys):
    (signed / "model.sig").unlink()
    with pytest.raises(UntrustedEngine, match="carries no signature"):
        deploykit.load_bundle(signed, signed_by=keys / "signer.pub")


def sealed_again(folder: Path) -> None:
    """Let the manifest describe the files as they are now."""
    manifest = read_manifest(folder)
    signature = (folder / "model.sig").read_bytes()
    for name in (MANIFEST, MANIFEST_DIGEST, "model.sig"):
        (folder / name).unlink()
    write_manifest(folder, manifest)
    (folder / "model.sig").write_bytes(signature)


@pytest.mark.parametrize("change", ["another engine", "one more file", "another manifest"])
def test_a_bundle_that_was_changed_and_sealed_again_is_refused(signed, keys, tmp_path, change):
    if change == "another engine":
        other = write_bundle(tmp_path / "other", "onnxruntime", scaled=True)
        shutil.copyfile(other / "model.onnx", signed / "model.onnx")
    elif change == "one more file":
        (signed / "more.bin").write_bytes(b"more")
    else:
        text = json.loads((signed / MANIFEST).read_text())
        text["tools"]["torch"] = "0.0"
        (signed / MANIFEST).write_text(json.dumps(text))
    sealed_again(signed)
    deploykit.load_bundle(signed).close()
    with pytest.raises(UntrustedEngine, match="changed after it was signed"):
        deploykit.load_bundle(signed, signed_by=keys / "signer.pub")


@pytest.mark.parametrize("content", [b"", b"{}", b'{"dsseEnvelope": {}}', b"\x00" * 100], ids=repr)
def test_a_damaged_signature_is_refused(signed, keys, content):
    (signed / "model.sig").write_bytes(content)
    with pytest.raises(UntrustedEngine):
        deploykit.load_bundle(signed, signed_by=keys / "signer.pub")


def test_a_flipped_byte_of_the_signature_is_refused_or_changes_nothing(signed, keys):
    good = (signed / "model.sig").read_bytes()
    refused = 0
    for position in np.linspace(0, len(good) - 1, 40).astype(int):
        (signed / "model.sig").write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        try:
            deploykit.load_bundle(signed, signed_by=keys / "signer.pub").close()
        except UntrustedEngine:
            refused += 1
    assert refused > 30  # the others are in what the format leaves free


def test_a_certificate_is_checked_by_its_authority(signed, tmp_path):
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def certificate(subject: str, key, issuer: str, issuer_key, *, authority: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.timezone.utc)
        usage = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment"), False)
        usage |= dict.fromkeys(("key_agreement", "encipher_only", "decipher_only"), False)
        named = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in (subject, issuer)]
        return (
            x509.CertificateBuilder()
            .subject_name(named[0])
            .issuer_name(named[1])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(digital_signature=True, key_cert_sign=authority, crl_sign=authority, **usage),
                critical=True,
            )
            .add_extension(x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .sign(issuer_key, hashes.SHA256())
        )

    root, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    pem = serialization.Encoding.PEM
    for name, made in {
        "root": certificate("root", root, "root", root, authority=True),
        "own": certificate("signer", own, "root", root, authority=False),
    }.items():
        (tmp_path / f"{name}.crt").write_bytes(made.public_bytes(pem))
    (tmp_path / "own.pem").write_bytes(
        own.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    sign_bundle(signed, tmp_path / "own.pem", certificate=tmp_path / "own.crt", chain=[tmp_path / "root.crt"])
    deploykit.load_bundle(signed, signed_by=tmp_path / "root.crt").close()


@pytest.mark.parametrize("content", [None, b"", b"no key", b"-----BEGIN CERTIFICATE-----\n"], ids=repr)
def test_a_file_that_is_no_key_is_named(signed, keys, tmp_path, content):
    path = tmp_path / "bad.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError, match=r"bad\.pem"):
        deploykit.load_bundle(signed, signed_by=path)
    with pytest.raises(SpecError, match=r"bad\.pem"):
        sign_bundle(signed, path)


def test_a_signer_beside_a_variant_is_refused(keys):
    with pytest.raises(SpecError, match="signed_by is for a bundle"):
        deploykit.create_backbone("resnet18", signed_by=keys / "signer.pub")


def test_a_signed_bundle_may_be_overwritten_and_is_then_unsigned(signed):
    write_bundle(signed, "onnxruntime")
    assert not (signed / "model.sig").exists()


def test_the_commands_sign_and_check(signed, keys, capsys):
    (signed / "model.sig").unlink()
    assert main(["sign", str(signed), "--key", str(keys / "signer.pem")]) == 0
    assert "is signed" in capsys.readouterr().out
    assert main(["verify", str(signed), "--signed-by", str(keys / "signer.pub")]) == 0
    assert main(["verify", str(signed), "--signed-by", str(keys / "other.pub")]) == 3
    assert "is not signed by" in capsys.readouterr().err


def test_the_librarys_own_command_verifies_it(signed, keys):
    words = ["verify", "key", str(signed), "--signature", str(signed / "model.sig")]
    words += ["--public_key", str(keys / "signer.pub"), "--ignore-paths", str(signed / "model.sig")]
    subprocess.run([sys.executable, "-m", "model_signing", *words], check=True, capture_output=True)


def test_a_folder_for_the_signature_is_named(signed, keys):
    (signed / "model.sig").unlink()
    (signed / "model.sig").mkdir()
    with pytest.raises(UntrustedEngine, match=r"the signature .*model\.sig cannot be read"):
        check_signature(signed, read_manifest(signed), keys / "signer.pub")


def test_a_signature_that_cannot_be_written_is_told_and_leaves_nothing(signed, keys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StorageError, match=r"the signature of .* cannot be written: the disk is full"):
        sign_bundle(signed, keys / "signer.pem")
    assert [path.name for path in signed.parent.iterdir()] == [signed.name]


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError(errno.EMFILE, "Too many open files"), StorageError, "Raise the limit"),
        (FileNotFoundError(errno.ENOENT, "No such file", "engine"), UntrustedEngine, "is not as it was signed"),
        (ValueError(""), UntrustedEngine, r"changed after it was signed \(ValueError\)"),
    ],
    ids=["open files", "a missing file", "a wrong signature"],
)
def test_what_the_library_raises_has_a_type(signed, keys, error, kind, said):
    with pytest.raises(kind, match=said), _library_errors(signed, keys / "signer.pub"):
        raise error


@pytest.mark.parametrize("text", [b"{}", b"no JSON", b'{"dsseEnvelope": {"payload": "e30="}}'])
def test_a_signature_of_another_form_is_named(signed, text):
    with pytest.raises(BundleError, match=r"the signature of .* is not of a known version"):
        _signed_digests(text, signed)
