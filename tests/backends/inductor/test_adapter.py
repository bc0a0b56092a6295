from __future__ import annotations

import dataclasses
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deploykit.backends.inductor.adapter import machine_tie
from deploykit.errors import BundleError, DeviceUnavailable, IncompatibleEngine
from tests.conftest_graphs import engine_of, open_engine


@pytest.mark.parametrize(("key", "value"), [("cpu_capability", "AVX1024"), ("machine", "riscv64")])
def test_a_package_for_another_processor_is_refused_before_it_is_loaded(key: str, value: str):
    manifest, folder = engine_of("torch_compile")
    other = dataclasses.replace(manifest, requires={**manifest.requires, key: value})
    with pytest.raises(IncompatibleEngine, match=f"{key} {value}.*{machine_tie()[key]}".replace("+", r"\+")):
        open_engine(other, folder)


def test_a_cpu_package_does_not_open_on_cuda():
    with pytest.raises(DeviceUnavailable, match="compiled for cpu and 'cuda'"):
        open_engine(*engine_of("torch_compile"), "cuda")


@pytest.mark.parametrize("members", [{}, {"model/data/aotinductor/model/code.wrapper.so": b"no library"}])
def test_an_archive_that_is_no_package_is_refused(members: dict[str, bytes], tmp_path: Path):
    manifest, _ = engine_of("torch_compile")
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(BundleError, match=r"model\.pt2 is not a readable AOTInductor package"):
        open_engine(manifest, tmp_path)


def test_a_package_opens_without_the_compiler():
    manifest, folder = engine_of("torch_compile")
    script = (
        "import sys; from pathlib import Path; from deploykit.backends.inductor.adapter import load_package; "
        f"load_package(Path({str(folder / manifest.engine)!r})); print('torch._inductor' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
