"""A program that deploykit starts runs no module of the working directory, and does not outlive who started it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploykit import child_process
from deploykit.child_process import child_environment, run_code, run_module
from deploykit.cli import doctor
from tests.processes import ends, is_running

ROOT = Path(__file__).parent.parent
PLANTED = ("msgspec", "onnxruntime", "openvino", "torch", "numpy", "tensorrt_rtx", "typer")


@pytest.fixture
def planted(tmp_path: Path, monkeypatch) -> Path:
    """The working directory, with modules that tell that they were run."""
    for name in PLANTED:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + ' ')\n")
    (tmp_path / "own.py").write_text("print('of the working directory')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "ran"


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", ["", os.pathsep, f"{ROOT}{os.pathsep}"], ids=["none", "empty entries", "trailing"])
@pytest.mark.parametrize("has_safe_path", [True, False], ids=["3.11 and newer", "3.10"])
def test_neither_code_nor_a_module_sees_the_working_directory(path, has_safe_path, planted, monkeypatch):
    if has_safe_path and sys.version_info < (3, 11):
        pytest.skip("this Python has no -P")
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setattr(child_process, "_HAS_SAFE_PATH", has_safe_path)
    environment = child_environment()
    if not has_safe_path:
        del environment["PYTHONSAFEPATH"]  # which an older Python does not read
    done = run(run_code("import sys, msgspec; print(sys.argv[1], msgspec.__file__)", "word"), environment)
    assert done.stdout.startswith("word ") and "site-packages" in done.stdout
    assert run(run_module("own"), environment).returncode != 0
    assert run(run_module("deploykit", "--version"), environment).stdout.startswith("deploykit ")
    assert not planted.exists()


def test_a_path_that_the_user_names_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "mine")
    assert child_environment()["PYTHONPATH"] == os.pathsep.join([str(ROOT), str(tmp_path / "mine")])


def test_neither_a_command_nor_a_probe_of_doctor_runs_anything_of_it(planted, monkeypatch):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert run([sys.executable, "-m", "deploykit", "inspect", "nowhere"], environment).returncode == 3
    monkeypatch.setattr(doctor, "backend_names", lambda: ("onnxruntime", "openvino"))
    rows = {row.runtime: row for row in doctor.examine().runtimes}
    assert [(rows[name].devices[0], rows[name].problem) for name in ("onnxruntime", "openvino")] == [("cpu", None)] * 2
    assert not planted.exists()


@pytest.mark.slow
def test_doctor_runs_nothing_of_the_working_directory(planted):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = run([sys.executable, "-m", "deploykit", "doctor", "--json"], environment)
    assert done.returncode == 0, done.stderr
    assert '"onnxruntime"' in done.stdout
    assert not planted.exists()


def test_the_tensorrt_builder_runs_nothing_of_the_working_directory(planted, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    from deploykit.backends.tensorrt.build import BuildSettings, build_plan
    from deploykit.errors import ExportError

    (tmp_path / "model.onnx").write_bytes(b"not an ONNX file")
    with pytest.raises(ExportError, match="build for sm86 failed"):
        build_plan(
            tmp_path / "model.onnx",
            tmp_path / "model.plan",
            BuildSettings(flavour="tensorrt_rtx", input="images", capability="sm86"),
        )
    assert not planted.exists()


STARTING = """
import subprocess
from deploykit.child_process import child_environment, run_module

stays = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
subprocess.run(run_module("timeit", "-n1", "-r1", stays), env=child_environment())
"""

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent-death signal")


@needs_linux
def test_a_killed_process_takes_the_program_that_it_started_with_it():
    command = run_code(STARTING)
    with subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, text=True) as process:
        started = int(process.stdout.readline())
        assert is_running(started)
        process.kill()
    assert ends(started)


@needs_linux
def test_a_program_whose_parent_died_before_it_began_ends(monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)
    done = run(run_module("timeit", "-n1", "-r1", "print('on')"), child_environment())
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
