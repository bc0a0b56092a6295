"""A package is loaded from its bytes, leaves no file, and says which folder cannot be used."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest

from deploykit.backends.inductor.archive import open_package, sweep_left_behind
from deploykit.errors import BundleError, StorageError
from tests.conftest_graphs import engine_of

ROOT = Path(__file__).parent.parent.parent.parent
OLD = 3600.0


@pytest.fixture(scope="module")
def package() -> Path:
    manifest, folder = engine_of("torch_compile")
    return folder / manifest.engine


LOAD = """
import os, signal, sys
from pathlib import Path
import torch
from deploykit.backends.inductor.archive import open_package
runner = open_package(Path(sys.argv[1]).read_bytes(), "model.pt2")
how = sys.argv[2]
if how == "exit": os._exit(0)
if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
if how == "term": os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("how", ["end", "exit", "kill", "term"])
def test_no_way_of_ending_leaves_a_file(how, package, tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", LOAD, str(package), how], env=environment, check=False, timeout=120)
    assert list(tmp_path.rglob("*")) == []


def test_opening_one_package_again_and_again_loads_its_library_once(package):
    content = package.read_bytes()

    def mapped() -> int:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sum(".so" in line and "deploykit-inductor" in line for line in lines)

    kept = [open_package(content, "model.pt2")]
    before = mapped()
    kept += [open_package(content, "model.pt2") for _ in range(5)]
    assert before > 0
    assert mapped() == before


def test_a_member_cannot_leave_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "evil.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data/aotinductor/model/../../../../../../evil.so", b"no library")
        archive.writestr("model/data/aotinductor/model/code.wrapper.so", b"no library")
    with pytest.raises(BundleError, match="not a readable AOTInductor package"):
        open_package(path.read_bytes(), "model.pt2")
    assert [entry.name for entry in tmp_path.iterdir()] == ["evil.pt2"]


def test_a_folder_that_lets_no_code_run_is_named_with_its_variable(package, monkeypatch):
    real = os.statvfs

    def noexec(path):
        seen = list(real(path))
        seen[8] |= os.ST_NOEXEC
        return os.statvfs_result(seen)

    monkeypatch.setattr(os, "statvfs", noexec)
    monkeypatch.setattr("deploykit.backends.inductor.archive._libraries", {})
    with pytest.raises(
        StorageError, match=r"folder for temporary files \S+ lets no machine code.*set TMPDIR"
    ) as caught:
        open_package(package.read_bytes(), "model.pt2")
    assert "Export the bundle again" not in str(caught.value)


def left(root: Path, name: str, *, age: float = OLD) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "code.wrapper.so").write_bytes(b"x" * 1000)
    os.utime(folder, (time.time() - age,) * 2)
    return folder


def test_what_torchs_own_loader_left_is_swept(tmp_path):
    gone, young = left(tmp_path, "aotinductor_abc123"), left(tmp_path, "aotinductor_young1", age=0)
    other = left(tmp_path, "something_else")
    kernels = left(tmp_path, "aotinductor_gpu123")
    (kernels / "kernel.cubin").touch()
    os.utime(kernels, (time.time() - OLD,) * 2)
    sweep_left_behind(tmp_path)
    assert not gone.exists()
    assert young.exists() and other.exists() and kernels.exists()


def test_a_folder_that_a_living_process_has_mapped_stays(tmp_path, package):
    import ctypes

    folder = left(tmp_path, "aotinductor_inuse1")
    with zipfile.ZipFile(package) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".so"))
        (folder / "code.wrapper.so").write_bytes(archive.read(name))
    import torch

    assert torch is not None  # whose symbols the library needs
    ctypes.CDLL(str(folder / "code.wrapper.so"))
    os.utime(folder, (time.time() - OLD,) * 2)
    sweep_left_behind(tmp_path)
    assert folder.exists()
