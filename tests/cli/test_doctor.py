"""``deploykit doctor``: what is here, whatever is broken."""

from __future__ import annotations

import importlib.metadata
import platform

import pytest

from deploykit.backends.backend import Backend
from deploykit.cli import doctor as doctor_module


def test_the_machine_is_told_as_json(call, tmp_path, monkeypatch):
    monkeypatch.setenv("DEPLOYKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor_module, "backend_names", lambda: ("torch", "onnxruntime"))
    told = call("doctor", "--json").json()
    rows = {row["runtime"]: row for row in told["runtimes"]}
    assert rows["onnxruntime"]["version"] == importlib.metadata.version("onnxruntime")
    assert "cpu" in rows["onnxruntime"]["devices"]
    assert "cpu" in rows["torch"]["devices"]
    assert told["engine_cache"] == str(tmp_path / "engines")


def test_the_machine_is_told_as_text(call, monkeypatch):
    monkeypatch.setattr(doctor_module, "backend_names", lambda: ("onnxruntime",))
    text = call("doctor")
    assert text.code == 0
    assert text.out.splitlines()[-1] == "Next: deploykit export resnet18 --runtime onnxruntime"


def test_an_absent_runtime_has_its_pip_command(call, monkeypatch):
    monkeypatch.setattr(Backend, "installed_version", lambda backend: None)
    done = call("doctor")
    assert done.code == 0
    for package in ("torch", "onnxruntime", "openvino", "tensorrt_rtx"):
        assert f"pip install {package}" in done.out
    assert done.out.splitlines()[-1] == "Next: install a runtime, as above."


@pytest.mark.skipif(platform.system() == "Darwin", reason="this is macOS, which runs Core ML")
def test_a_runtime_of_another_system_can_build(call, monkeypatch):
    monkeypatch.setattr(doctor_module, "backend_names", lambda: ("coreml",))
    (row,) = call("doctor", "--json").json()["runtimes"]
    assert (row["devices"], row["problem"]) == ([], None)
    assert row["version"] == importlib.metadata.version("coremltools")
    assert "no device here: it can build, not run" in call("doctor").out


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise OSError('libfoo.so.1: cannot open shared object file')", "libfoo.so.1"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
    ],
    ids=["raises", "crashes"],
)
def test_a_broken_runtime_is_a_word_in_its_row(call, tmp_path, monkeypatch, code, problem):
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor_module, "backend_names", lambda: ("openvino",))
    (row,) = call("doctor", "--json").json()["runtimes"]
    assert row["devices"] == []
    assert row["problem"].startswith("broken: ")
    assert problem in row["problem"]
    text = call("doctor")
    assert text.code == 0
    assert problem in text.out


def test_a_runtime_that_hangs_is_given_up(call, tmp_path, monkeypatch):
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "__init__.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor_module, "PROBE_SECONDS", 1.0)
    monkeypatch.setattr(doctor_module, "backend_names", lambda: ("openvino",))
    (row,) = call("doctor", "--json").json()["runtimes"]
    assert row["problem"] == "broken: it did not answer in 1 s"


def test_a_broken_weights_package_is_a_word_in_its_row(call, monkeypatch):
    from deploykit.errors import WeightsError

    def broken():
        raise WeightsError("the entry point 'mine' fails")

    monkeypatch.setattr(doctor_module, "backend_names", tuple)
    monkeypatch.setattr("deploykit.backbones.weight_packages.installed_offers", broken)
    done = call("doctor")
    assert done.code == 0
    assert "broken: the entry point 'mine' fails" in done.out
