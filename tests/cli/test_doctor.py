"""``deploykit doctor``: what is here, whatever is broken."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys

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


def test_two_builds_of_one_runtime_are_a_word_in_its_row(call, monkeypatch):
    monkeypatch.setattr(doctor_module, "backend_names", lambda: ("onnxruntime",))
    both = ("onnxruntime", "onnxruntime-gpu")
    monkeypatch.setattr(type(doctor_module.load_backend("onnxruntime").own_package), "installed_builds", lambda _: both)
    row = call("doctor", "--json").json()["runtimes"][0]
    assert row["problem"] == "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other's files"


def test_a_machine_without_a_compiler_or_a_cache_is_told_so(call, monkeypatch):
    monkeypatch.setattr(doctor_module, "backend_names", tuple)
    monkeypatch.setattr(doctor_module.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    monkeypatch.setenv("DEPLOYKIT_CACHE", "~/kept")
    assert doctor_module.find_compiler() is None
    done = call("doctor")
    assert done.code == 0
    assert "broken: DEPLOYKIT_CACHE is '~/kept', and there is no home folder" in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (
            lambda patch: patch.setattr(importlib.util, "find_spec", lambda name: None),
            "huggingface_hub is not installed",
        ),
        (lambda patch: patch.setitem(sys.modules, "huggingface_hub.constants", None), "broken: "),
    ],
    ids=["absent", "broken"],
)
def test_the_hubs_client_is_a_word_too(monkeypatch, break_it, said):
    with monkeypatch.context() as patch:
        break_it(patch)
        found = doctor_module._hub_cache()
    assert found.startswith(said)
