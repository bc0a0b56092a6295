from __future__ import annotations

import ctypes
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import deploykit.bundle as bundle_module
from deploykit.bundle import (
    MANIFEST,
    MANIFEST_DIGEST,
    SCHEMA_VERSION,
    Manifest,
    is_bundle,
    open_bundle,
    read_manifest,
    sha256_of,
    write_manifest,
    writing,
)
from deploykit.bundle_files import PARTIAL
from deploykit.errors import BundleError
from deploykit.spec import BackboneSpec, BatchRange, FeatureLevel, InputSpec, TensorSpec

ROOT = Path(bundle_module.__file__).parents[1]


def manifest(**changes) -> Manifest:
    level = FeatureLevel(name="stage1", index=1, channels=8, stride=4, receptive_field=7)
    fields = {
        "backbone": BackboneSpec(name="tiny", family="resnet", levels=(level,), features_only=True),
        "input": InputSpec(batch=BatchRange(min=1, opt=2, max=4), height=32, width=48),
        "outputs": (TensorSpec(name="stage1", shape=("batch", 8, 8, 12)),),
        "runtime": "onnxruntime",
        "runtime_version": "1.32.0",
        "precision": "int8",
        "precision_settings": {"min_sqnr_db": 12.0, "calibrator": "mse"},
        "engine": "engine.onnx",
        "weights_digest": "ab" * 32,
        "tools": {"deploykit": "0.1.0"},
    }
    return Manifest(**(fields | changes))


def fill(folder: Path, content: bytes = b"engine") -> Manifest:
    (folder / "engine.onnx").write_bytes(content)
    (folder / "weights").mkdir()
    (folder / "weights" / "engine.bin").write_bytes(content * 100)
    return write_manifest(folder, manifest())


def make(folder: Path, content: bytes = b"engine", *, overwrite: bool = False) -> Manifest:
    with writing(folder, overwrite=overwrite) as staging:
        return fill(staging, content)


def tamper(folder: Path, **changes: object) -> None:
    """Change the manifest as an attacker would: with a digest that fits."""
    path = folder / MANIFEST
    text = json.dumps(json.loads(path.read_text()) | changes).encode()
    path.write_bytes(text)
    (folder / MANIFEST_DIGEST).write_text(f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n")


def leftovers(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if path.name.startswith(".")]


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    prelude = "import os, signal, sys\nfrom pathlib import Path\nimport tests.test_bundle as t\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    make(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    written = make(tmp_path / "a" / "b" / "bundle")
    assert set(written.files) == {"engine.onnx", "weights/engine.bin"}
    assert written.files["engine.onnx"].size == 6
    assert open_bundle(tmp_path / "a" / "b" / "bundle") == written == read_manifest(tmp_path / "a" / "b" / "bundle")
    assert dataclasses.replace(written, files={}) == manifest()
    assert leftovers(tmp_path / "a" / "b") == []


def test_a_bundle_moves_and_opens_through_a_link(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "copy")
    assert open_bundle(tmp_path / "link") == open_bundle(bundle)


def test_a_bundle_gets_the_permissions_of_an_ordinary_folder(bundle, tmp_path):
    (tmp_path / "plain").mkdir()
    assert bundle.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_digest_file_is_what_sha256sum_reads(bundle):
    if shutil.which("sha256sum") is None:
        pytest.skip("sha256sum is not installed")
    subprocess.run(["sha256sum", "--check", MANIFEST_DIGEST], cwd=bundle, check=True, capture_output=True)


def test_unknown_fields_of_the_same_schema_are_ignored(bundle):
    written = read_manifest(bundle)
    tamper(bundle, added_later={"x": 1})
    assert open_bundle(bundle) == written


@pytest.mark.parametrize("name", ["engine.onnx", "weights/engine.bin", MANIFEST, MANIFEST_DIGEST])
def test_a_flipped_byte_anywhere_in_a_file_is_found(bundle, name):
    good = (bundle / name).read_bytes()
    for position in range(0, len(good), max(1, len(good) // 40)):
        bad = bytearray(good)
        bad[position] ^= 0x10
        (bundle / name).write_bytes(bad)
        expected = MANIFEST if name == MANIFEST_DIGEST else name
        with pytest.raises(BundleError, match=expected):
            open_bundle(bundle)
    (bundle / name).write_bytes(good)
    open_bundle(bundle)


def test_every_bad_file_is_named_at_once(bundle):
    (bundle / "engine.onnx").unlink()
    (bundle / "weights" / "engine.bin").write_bytes(b"short")
    (bundle / "extra.txt").write_text("extra")
    (bundle / "link").symlink_to("/etc/hostname")
    os.mkfifo(bundle / "pipe")
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    message = str(caught.value)
    for part in (
        "engine.onnx: missing",
        "5 bytes; expected 600",
        "extra.txt: not recorded",
        "link: a symbolic",
        "pipe",
    ):
        assert part in message
    assert "export it again" in message


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a\\b", "", ".", "./engine.onnx", MANIFEST])
def test_names_that_leave_the_bundle_are_refused(bundle, name):
    record = {"size": 1, "sha256": "00"}
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    tamper(bundle, files=files | {name: record})
    with pytest.raises(BundleError, match="outside the bundle"):
        read_manifest(bundle)
    tamper(bundle, files=files, engine=name)
    with pytest.raises(BundleError, match="outside the bundle"):
        open_bundle(bundle)


def test_an_engine_that_is_not_recorded_is_refused(bundle):
    tamper(bundle, engine="other.onnx")
    with pytest.raises(BundleError, match=r"other\.onnx: named as the engine"):
        open_bundle(bundle)


def test_a_newer_schema_is_refused_before_it_is_decoded(bundle):
    tamper(bundle, schema_version=SCHEMA_VERSION + 1, backbone="another form", tools={"deploykit": "9.1.0"})
    for read in (read_manifest, open_bundle):
        with pytest.raises(BundleError, match=r"schema version 2.*deploykit-vision>=9\.1\.0"):
            read(bundle)
    tamper(bundle, tools=None)
    with pytest.raises(BundleError, match="--upgrade deploykit"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schema_version": True}, "schema_version is True"),
        ({"schema_version": 0}, "schema_version is 0"),
        ({"schema_version": None}, "schema_version is None"),
        ({"status": "perfect"}, "status"),
        ({"precision": 8}, "precision"),
        ({"input": {"batch": {"min": 4, "opt": 1, "max": 2}}}, "batch range"),
    ],
)
def test_a_manifest_of_wrong_values_is_a_bundle_error(bundle, changes, said):
    tamper(bundle, **changes)
    with pytest.raises(BundleError, match=said):
        open_bundle(bundle)


@pytest.mark.parametrize("text", [b"", b"[1, 2]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"name": "a web app"}'])
def test_a_manifest_of_something_else_is_a_bundle_error(bundle, text):
    (bundle / MANIFEST).write_bytes(text)
    for read in (read_manifest, open_bundle):
        with pytest.raises(BundleError, match=MANIFEST):
            read(bundle)


def test_paths_that_are_no_bundle_are_told_apart(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    cases = {"absent": "nothing has that name", "file": "is a file", "empty": "holds nothing", "photos": "cat.jpg"}
    for name, said in cases.items():
        assert not is_bundle(tmp_path / name)
        for read in (read_manifest, open_bundle):
            with pytest.raises(BundleError, match=said):
                read(tmp_path / name)


def test_writing_never_replaces_what_is_not_a_bundle(bundle, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / MANIFEST).write_text("{}")
    (tmp_path / "link").symlink_to(bundle)
    for name, said in {"file": "is a file", "web": "not a bundle", "link": "symbolic link"}.items():
        with pytest.raises(BundleError, match=said):
            make(tmp_path / name, overwrite=True)
    with pytest.raises(BundleError, match="overwrite=True"):
        make(bundle)
    assert (tmp_path / "web" / MANIFEST).read_text() == "{}"
    open_bundle(bundle)


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_replaces_the_whole_bundle(bundle, tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(bundle_module, "_exchange", lambda *_: False)
    (bundle / ".DS_Store").write_text("of a file manager")
    new = make(bundle, b"newer", overwrite=True)
    assert open_bundle(bundle) == new
    assert (bundle / "engine.onnx").read_bytes() == b"newer"
    assert (bundle / ".DS_Store").read_text() == "of a file manager"
    assert leftovers(tmp_path) == []


def test_an_error_in_the_block_leaves_everything_as_it_was(bundle, tmp_path):
    before = open_bundle(bundle)

    def failing(folder: Path) -> None:
        with writing(folder, overwrite=True) as staging:
            fill(staging)
            raise RuntimeError("the exporter failed")

    for folder in (bundle, tmp_path / "fresh"):
        with pytest.raises(RuntimeError, match="the exporter failed"):
            failing(folder)
    assert open_bundle(bundle) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_what_would_not_open_is_never_put_in_place(tmp_path):
    def without_manifest() -> None:
        with writing(tmp_path / "one") as staging:
            (staging / "engine.onnx").write_bytes(b"engine")

    def late_file() -> None:
        with writing(tmp_path / "two") as staging:
            fill(staging)
            (staging / "late.txt").write_text("x")

    with pytest.raises(BundleError, match=MANIFEST):
        without_manifest()
    with pytest.raises(BundleError, match=r"late\.txt: not recorded"):
        late_file()
    assert list(tmp_path.iterdir()) == []


def test_write_manifest_refuses_links_and_a_missing_engine(tmp_path):
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(BundleError, match=r"(?s)link: a symbolic link.*engine\.onnx: named as the engine"):
        write_manifest(tmp_path, manifest())


def test_a_full_disk_is_a_bundle_error_and_leaves_nothing(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is not on this system")

    def full() -> None:
        with writing(tmp_path / "bundle") as staging:
            fill(staging)
            Path("/dev/full").write_bytes(b"x" * 100_000)

    with pytest.raises(BundleError, match="Free some space") as caught:
        full()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_file_size_limit_in_the_middle_of_a_file_leaves_the_old_bundle(bundle, tmp_path):
    before = open_bundle(bundle)
    done = run_python(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            t.make(Path(sys.argv[1]), b"x" * 90_000, overwrite=True)
        except t.BundleError as error:
            print(error)
        """,
        bundle,
    )
    assert "Free some space" in done.stdout, done.stderr
    assert open_bundle(bundle) == before
    assert leftovers(tmp_path) == []


def test_a_parent_that_cannot_be_made_is_a_bundle_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="writable disk"):
        make(tmp_path / "file" / "below" / "bundle")


KILL_AT = {
    "writing": "t.bundle_module.open_bundle = die",
    "syncing": "t.bundle_module._sync_tree = die",
    "just before": "t.bundle_module._exchange = die",
    "just after": "t.bundle_module._sync_folder = after(2)",
    "removing the old": "t.shutil.rmtree = die",
}


@pytest.mark.parametrize("moment", KILL_AT)
def test_kill_at_any_moment_of_an_overwrite_leaves_one_whole_bundle(bundle, tmp_path, moment):
    code = f"""
    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)
    def after(calls):
        left = [calls]
        def sync(folder):
            left[0] -= 1
            if left[0] < 0:
                die()
        return sync
    {KILL_AT[moment]}
    t.make(Path(sys.argv[1]), b"newer", overwrite=True)
    """
    done = run_python(code, bundle)
    assert done.returncode == -signal.SIGKILL, done.stderr
    open_bundle(bundle)
    expected = b"newer" if moment in ("just after", "removing the old") else b"engine"
    assert (bundle / "engine.onnx").read_bytes() == expected
    assert len(leftovers(tmp_path)) == 1
    make(bundle, b"newest", overwrite=True)
    assert (bundle / "engine.onnx").read_bytes() == b"newest"
    assert leftovers(tmp_path) == []


def test_kill_between_two_renames_is_repaired_where_folders_cannot_be_swapped(bundle, tmp_path):
    code = """
    t.bundle_module._exchange = lambda *_: False
    rename = Path.rename
    def once(path, target):
        rename(path, target)
        os.kill(os.getpid(), signal.SIGKILL)
    Path.rename = once
    t.make(Path(sys.argv[1]), b"newer", overwrite=True)
    """
    assert run_python(code, bundle).returncode == -signal.SIGKILL
    with pytest.raises(BundleError, match=r"interrupted overwrite .* rename it back"):
        open_bundle(bundle)
    with pytest.raises(BundleError, match="overwrite=True"):
        make(bundle)
    open_bundle(bundle)
    assert (bundle / "engine.onnx").read_bytes() == b"engine"
    assert leftovers(tmp_path) == []


def test_kill_while_writing_leaves_nothing_that_loads(tmp_path):
    code = """
    with t.writing(Path(sys.argv[1])) as staging:
        t.fill(staging)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_python(code, tmp_path / "bundle").returncode == -signal.SIGKILL
    assert not (tmp_path / "bundle").exists()
    assert len(leftovers(tmp_path)) == 1
    make(tmp_path / "bundle")
    assert leftovers(tmp_path) == []


def test_a_living_writer_is_not_swept_and_the_first_to_finish_wins(tmp_path):
    def slow() -> None:
        with writing(tmp_path / "bundle") as staging:
            fill(staging, b"slow")
            make(tmp_path / "bundle", b"fast")
            assert staging.is_dir()

    with pytest.raises(BundleError, match="holds a bundle already"):
        slow()
    assert (tmp_path / "bundle" / "engine.onnx").read_bytes() == b"fast"


def test_another_bundles_leftovers_are_not_swept(tmp_path):
    (tmp_path / ".bundle.b.0123abcd.partial").mkdir()
    make(tmp_path / "bundle")
    assert leftovers(tmp_path) == [".bundle.b.0123abcd.partial"]


def test_sha256_of_a_file_of_several_pieces(tmp_path):
    content = bytes(range(256)) * 10_000
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_cannot_sync_folders_is_no_error_and_a_broken_disk_is(tmp_path, monkeypatch, number):
    sync = os.fsync

    def only_files(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        sync(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    if number == errno.EIO:
        with pytest.raises(BundleError, match="nothing was left behind"):
            make(tmp_path / "bundle")
        assert not (tmp_path / "bundle").exists()
        return
    make(tmp_path / "bundle")
    open_bundle(tmp_path / "bundle")


def test_a_system_without_renameat2_replaces_a_bundle_in_two_steps(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    make(bundle, b"another", overwrite=True)
    open_bundle(bundle)
    assert (bundle / "engine.onnx").read_bytes() == b"another"
    assert leftovers(tmp_path) == []


def test_a_replacement_that_fails_in_its_second_step_brings_the_old_bundle_back(bundle, tmp_path, monkeypatch):
    rename = Path.rename

    def refuse(self, target):
        if Path(target) == bundle and self.name.endswith(PARTIAL):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(bundle_module, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(BundleError, match="nothing was left behind"):
        make(bundle, b"another", overwrite=True)
    open_bundle(bundle)
    assert (bundle / "engine.onnx").read_bytes() == b"engine"
    assert leftovers(tmp_path) == []
