"""Bundles as they are shipped: as links, with other tools' files beside them, in archives, in odd places."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

import deploykit.bundle as bundle_module
from deploykit import bundle_files
from deploykit.bundle import MANIFEST, MANIFEST_DIGEST, open_bundle, read_manifest
from deploykit.errors import BundleError, StorageError
from tests.test_bundle import leftovers, make


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    make(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture(autouse=True)
def at_once():
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < 10


# ---- links


def hub_cache(bundle: Path, root: Path) -> Path:
    """As huggingface_hub lays out a snapshot: every file a relative link to a blob."""
    snapshot = root / "snapshots" / "0123abcd"
    (root / "blobs").mkdir(parents=True)
    for file in [path for path in bundle.rglob("*") if path.is_file()]:
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def config_map(bundle: Path, root: Path) -> Path:
    """As Kubernetes mounts one: links through ``..data``, itself a link to a folder with a time."""
    mount, held = root / "mount", "..2026_11_28_12_00_00.123456789"
    shutil.copytree(bundle, mount / held)
    (mount / "..data").symlink_to(held)
    for path in bundle.iterdir():
        (mount / path.name).symlink_to(Path("..data") / path.name)
    return mount


def data_version_control(bundle: Path, root: Path) -> Path:
    """As DVC checks files out with ``cache.type symlink``, its own files beside them."""
    shutil.copytree(bundle, root / "repo")
    cache = root / "repo" / ".dvc" / "cache"
    cache.mkdir(parents=True)
    for file in [path for path in bundle.rglob("*") if path.is_file()]:
        name = file.relative_to(bundle)
        (cache / str(name).replace("/", "-")).write_bytes(file.read_bytes())
        (root / "repo" / name).unlink()
        (root / "repo" / name).symlink_to(cache / str(name).replace("/", "-"))
    (root / "repo" / "engine.onnx.dvc").write_text("outs:\n")
    (root / "repo" / ".dvcignore").write_text("")
    return root / "repo"


@pytest.mark.parametrize("layout", [hub_cache, config_map, data_version_control])
def test_a_bundle_of_links_with_the_right_bytes_opens(bundle, tmp_path, layout):
    folder = layout(bundle, tmp_path / "shipped")
    assert open_bundle(folder) == read_manifest(folder) == open_bundle(bundle)


@pytest.mark.parametrize("layout", [hub_cache, config_map, data_version_control])
@pytest.mark.parametrize("name", ["engine.onnx", "weights/engine.bin", MANIFEST, MANIFEST_DIGEST])
def test_a_link_to_other_bytes_is_damage(bundle, tmp_path, layout, name):
    folder = layout(bundle, tmp_path / "shipped")
    target = (folder / name).resolve()
    target.write_bytes(target.read_bytes()[:-1] + b"!")
    with pytest.raises(BundleError, match="damaged"):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("/absent/file", "leads to nothing"),
        ("engine.onnx", "leads to nothing"),  # itself
        ("/dev/zero", "a device"),
        ("/proc/self/mem", "bytes; expected 6"),
        ("weights", "a symbolic link to a folder"),
        ("/", "a symbolic link to a folder"),
    ],
)
def test_a_link_elsewhere_is_named_and_not_waited_for(bundle, target, said):
    (bundle / "engine.onnx").unlink()
    (bundle / "engine.onnx").symlink_to(target)
    with pytest.raises(BundleError, match=rf"engine\.onnx: .*{said}"):
        open_bundle(bundle)


def test_links_in_a_circle_end(bundle):
    (bundle / "weights" / "again").symlink_to("..")
    with pytest.raises(BundleError, match=r"weights/again: a link that leads in a circle.*not recorded"):
        open_bundle(bundle)
    (bundle / "weights" / "again").unlink()
    (bundle / "more").symlink_to("/")
    with pytest.raises(BundleError, match=r"more: a symbolic link to a folder, not recorded"):
        open_bundle(bundle)


# ---- other tools' files


@pytest.mark.parametrize(
    "name",
    [
        ".DS_Store",
        "weights/.DS_Store",
        "._engine.onnx",
        "Thumbs.db",
        "desktop.ini",
        ".gitattributes",
        ".gitignore",
        ".git/objects/ab/cdef",
        ".cache/huggingface/download/engine.onnx.metadata",
        "README.md",
        "lost+found/#1234",
        ".dvc/config",
        "engine.onnx.dvc",
        "@eaDir/engine.onnx@SynoEAStream",
        ".nfs000000000123",
    ],
)
def test_what_tools_put_beside_a_bundle_is_ignored(bundle, name):
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_text("x")
    open_bundle(bundle)


@pytest.mark.parametrize("name", ["notes.txt", "engine.so", "weights/more.bin", "__pycache__/x.pyc", ".hidden", "..x"])
def test_other_files_are_named_with_the_remedy_to_remove_them(bundle, name):
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_text("x")
    with pytest.raises(BundleError, match=rf"(?s){name}: not recorded.*Remove them, and nothing else") as caught:
        open_bundle(bundle)
    assert "damaged" not in str(caught.value)
    assert "export" not in str(caught.value)


def test_a_recorded_file_counts_whatever_its_name(tmp_path):
    from tests.test_bundle import manifest

    with bundle_module.writing(tmp_path / "bundle") as staging:
        (staging / "engine.onnx").write_bytes(b"engine")
        bundle_module.write_manifest(staging, manifest())
    text = (tmp_path / "bundle" / MANIFEST).read_text()
    record = '"README.md": {"size": 1, "sha256": "' + "0" * 64 + '"}, "engine.onnx":'
    text = text.replace('"engine.onnx":', record, 1)
    (tmp_path / "bundle" / MANIFEST).write_text(text)
    (tmp_path / "bundle" / MANIFEST_DIGEST).write_bytes(bundle_files.digest_line(text.encode()))
    with pytest.raises(BundleError, match=r"README\.md: missing"):
        open_bundle(tmp_path / "bundle")
    (tmp_path / "bundle" / "README.md").write_text("x")
    with pytest.raises(BundleError, match=r"README\.md: SHA-256"):
        open_bundle(tmp_path / "bundle")


@pytest.mark.parametrize(
    "name", ["notes.txt", "README.md", ".git/config", "weights/labels.csv", ".gitattributes", "link", "link-to-folder"]
)
def test_overwriting_never_deletes_what_deploykit_did_not_write(bundle, tmp_path, name):
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    if name.startswith("link"):
        (bundle / name).symlink_to(tmp_path if "folder" in name else bundle / "engine.onnx")
    else:
        (bundle / name).write_text("mine")
    with pytest.raises(BundleError, match=rf"(?s)did not write.*{name}.*Move them away"):
        make(bundle, b"newer", overwrite=True)
    assert os.path.lexists(bundle / name)
    assert (bundle / "engine.onnx").read_bytes() == b"engine"
    assert leftovers(tmp_path) == []


def test_a_file_that_comes_while_an_export_runs_is_not_deleted_either(bundle, tmp_path):
    def late() -> None:
        with bundle_module.writing(bundle, overwrite=True) as staging:
            shutil.copytree(bundle, staging, dirs_exist_ok=True)
            (bundle / "notes.txt").write_text("mine")

    with pytest.raises(BundleError, match=r"notes\.txt"):
        late()
    assert (bundle / "notes.txt").read_text() == "mine"


def test_a_bundle_whose_manifest_is_not_readable_is_not_replaced(bundle):
    (bundle / MANIFEST).write_text("{")
    with pytest.raises(BundleError, match=r"nobody can tell which of its files deploykit wrote.*Remove the folder"):
        make(bundle, overwrite=True)


def test_a_damaged_bundle_is_replaced(bundle):
    (bundle / "engine.onnx").write_bytes(b"broken")
    (bundle / "weights" / "engine.bin").unlink()
    make(bundle, b"newer", overwrite=True)
    open_bundle(bundle)


# ---- archives


def zipped(bundle: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in bundle.rglob("*"):
            archive.write(file, file.relative_to(bundle))
    return path


@pytest.mark.parametrize("name", ["b.zip", "b.deploykit"])
def test_a_bundle_in_a_zip_is_told_how_to_unpack(bundle, tmp_path, name):
    archive = zipped(bundle, tmp_path / name)
    with pytest.raises(BundleError, match="is a ZIP archive; a bundle is a folder") as caught:
        open_bundle(archive)
    command = str(caught.value).split("`")[1].split()
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    open_bundle(tmp_path / command[-1])


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_bundle_in_a_tar_is_told_how_to_unpack(bundle, tmp_path, mode):
    path = tmp_path / f"b.tar{mode[1:].replace(':', '.')}"
    with tarfile.open(path, mode) as archive:
        archive.add(bundle, ".")
    with pytest.raises(BundleError, match="is a tar archive; a bundle is a folder") as caught:
        open_bundle(path)
    if shutil.which("tar"):
        subprocess.run(["sh", "-c", str(caught.value).split("`")[1]], cwd=tmp_path, check=True)
        open_bundle(tmp_path / "b")


def test_a_folder_around_a_bundle_points_to_it(bundle, tmp_path):
    with pytest.raises(BundleError, match=rf"{bundle} in it is one. Give that folder"):
        open_bundle(tmp_path)


# ---- what is no plain file, and what is too large


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket may have a hundred characters
        server.bind(path.name)
        os.chdir(here)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("kind", [fifo, unix_socket, device, folder])
@pytest.mark.parametrize("name", ["engine.onnx", "weights/engine.bin", MANIFEST, MANIFEST_DIGEST, "beside"])
def test_what_is_no_plain_file_is_refused_at_once(bundle, kind, name):
    (bundle / name).unlink(missing_ok=True)
    kind(bundle / name)
    if (kind, name) == (folder, "beside"):
        open_bundle(bundle)  # an empty folder harms nobody
        return
    with pytest.raises(BundleError, match=name.rpartition("/")[2]):
        open_bundle(bundle)


@pytest.mark.parametrize("kind", [fifo, unix_socket, device])
def test_neighbours_of_odd_kinds_do_not_stop_an_export(bundle, tmp_path, kind):
    kind(tmp_path / ".bundle.0123abcd.partial")
    kind(tmp_path / ".bundle.0123abcd.aside")
    make(bundle, b"newer", overwrite=True)
    open_bundle(bundle)


@pytest.mark.parametrize("name", [MANIFEST, MANIFEST_DIGEST, "engine.onnx"])
def test_a_file_of_six_gigabytes_is_not_read(bundle, name):
    with (bundle / name).open("r+b") as file:
        file.truncate(6 << 30)
    with pytest.raises(BundleError, match=name if name != MANIFEST_DIGEST else MANIFEST):
        open_bundle(bundle)


# ---- places


def test_a_foreign_lock_on_the_folder_above_is_waited_for_and_then_an_error(tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(bundle_module, "LOCK_SECONDS", 0.4)
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match=rf"{tmp_path} is locked by .*to write the bundle bundle"):
            make(tmp_path / "bundle")
    finally:
        os.close(handle)
    assert "Waiting to write the bundle bundle" in caplog.text
    make(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EMFILE, "too many open files.*ulimit -n"),
        (errno.EACCES, "this user may not"),
        (errno.EIO, "the disk reports an error"),
        (errno.ENOMEM, "not enough memory"),
    ],
)
@pytest.mark.parametrize("name", ["engine.onnx", MANIFEST, MANIFEST_DIGEST])
def test_an_error_of_the_machine_is_no_damage(bundle, monkeypatch, number, said, name):
    real = os.open

    def refuse(path, *arguments, **options):
        if str(path).endswith(name):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match=rf"{name} cannot be read: .*{said}") as caught:
        open_bundle(bundle)
    assert not {"damaged", "export", "copy it again"} & set(str(caught.value).lower().split())


def test_a_folder_that_cannot_be_listed_is_no_damage(bundle):
    if os.geteuid() == 0:
        pytest.skip("root may list every folder")
    (bundle / "weights").chmod(0)
    with pytest.raises(StorageError, match="this user may not"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "/proc/1/cwd/bundle" * 300])
def test_a_name_that_no_file_can_have_is_a_bundle_error(name):
    with pytest.raises(BundleError):
        open_bundle(Path(name))


def loop(path: Path) -> Path:
    """A link to itself, which no machine can follow."""
    path.symlink_to(path.name)
    return path


def test_a_digest_file_that_leads_in_a_circle_is_damage(bundle):
    (bundle / MANIFEST_DIGEST).unlink()
    loop(bundle / MANIFEST_DIGEST)
    with pytest.raises(BundleError, match=rf"(?s)damaged.*{MANIFEST_DIGEST}: .*[Ll]evels of symbolic links"):
        open_bundle(bundle)


def test_what_is_said_of_a_path_that_cannot_be_looked_at(tmp_path):
    said = bundle_files.why_no_bundle(loop(tmp_path / "bundle"))
    assert f"{tmp_path / 'bundle'} is a file that cannot be read; a bundle is a folder with a {MANIFEST}." in said
    assert said.endswith("Give the folder.")


def test_a_folder_of_too_many_files_is_no_bundle(bundle, monkeypatch):
    """A home folder, say, which is not looked through to its end."""
    monkeypatch.setattr(bundle_files, "_MOST_NAMES", 3)
    for index in range(6):
        (bundle / f"file{index}").write_text("x")
    with pytest.raises(BundleError, match=r"holds more than 3 files\. Give the folder of a bundle"):
        open_bundle(bundle)
