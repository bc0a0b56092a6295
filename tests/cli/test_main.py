"""Exit codes and messages of the command itself."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deploykit
from deploykit.cli import main as main_module
from deploykit.errors import (
    DeviceUnavailable,
    EngineMismatch,
    ImageError,
    IncompatibleEngine,
    MissingDependency,
    ParityError,
    StorageError,
    UntrustedEngine,
    WeightsError,
)


def test_an_unknown_command_is_bad_usage(call):
    done = call("exprt")
    assert done.code == 2
    assert "error: No such command 'exprt'" in done.err


def test_a_missing_argument_is_bad_usage_and_names_the_help(call):
    done = call("verify")
    assert done.code == 2
    assert "BUNDLE" in done.err
    assert "deploykit verify --help" in done.err


def test_no_command_prints_the_help_and_no_error(call):
    done = call()
    assert done.code == 2
    assert "Usage: deploykit" in done.out
    assert "error" not in done.err


def test_an_unforeseen_error_is_one_line_without_a_traceback(call, monkeypatch):
    monkeypatch.setattr("deploykit.bundle.open_bundle", lambda folder: 1 / 0)
    done = call("inspect", "somewhere")
    assert done.code == 6
    assert done.err.startswith("error: ZeroDivisionError: division by zero. This is a fault in deploykit")
    assert "Traceback" not in done.err


@pytest.mark.parametrize("place", [0, 2])
def test_debug_shows_the_traceback_wherever_it_stands(call, place, tmp_path):
    words = ["inspect", str(tmp_path)]
    words.insert(place, "--debug")
    done = call(*words)
    assert done.code == 3  # whatever is shown, the code stays that of the error
    assert "Traceback (most recent call last)" in done.err
    assert "deploykit.errors.BundleError" in done.err


def test_an_interrupt_gives_130(call, monkeypatch):
    def interrupt(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("deploykit.bundle.open_bundle", interrupt)
    done = call("inspect", "somewhere")
    assert (done.code, done.err) == (main_module.INTERRUPTED, "error: interrupted; nothing was left half-written.\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ParityError("it"), 1),
        (ImageError("it"), 2),
        (UntrustedEngine("it"), 3),
        (EngineMismatch("it"), 3),
        (StorageError("it"), 6),
        (IncompatibleEngine("it"), 5),
        (DeviceUnavailable("it"), 5),
        (MissingDependency("it", package="onnx", command="pip install onnx"), 4),
        (ModuleNotFoundError("it", name="onnx_ir"), 4),
        (WeightsError("it"), 6),
        (OSError("it"), 6),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_exit_code_tells_errors_apart_and_json_is_on_stdout_alone(call, monkeypatch, error, code):
    def fail(folder):
        raise error

    monkeypatch.setattr("deploykit.bundle.open_bundle", fail)
    done = call("inspect", "somewhere", "--json")
    assert done.code == code
    assert (done.json()["exit_code"], f"error: {done.json()['message']}") == (code, done.err.removesuffix("\n"))
    assert call("inspect", "somewhere").out == ""


def test_bad_usage_is_json_too(call):
    told = call("verfy", "--json").json()
    assert told["exit_code"] == 2
    assert "No such command 'verfy'" in told["message"]


def test_shells_complete_commands(capsys, monkeypatch):
    monkeypatch.setenv("_DEPLOYKIT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "deploykit ex")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit):
        main_module.main([])
    assert "export" in capsys.readouterr().out.split()


def test_a_traceback_comes_before_the_message_and_the_code(call):
    done = call("inspect", "nothing-there", "--debug", "--json")
    assert done.code == done.json()["exit_code"] == 3
    assert done.err.startswith("Traceback")
    assert done.err.splitlines()[-1].startswith("error: ")


def test_an_error_of_the_machine_is_told_from_a_fault_of_deploykit(call, monkeypatch):
    """Python's own MemoryError says nothing by itself."""
    told = {}
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(1 << 60)
    for error in (MemoryError(), of_torch.value, OSError(errno.ENOSPC, "No space left on device")):

        def fail(folder, error=error):
            raise error

        monkeypatch.setattr("deploykit.bundle.open_bundle", fail)
        done = call("inspect", "somewhere")
        assert done.code == 6
        told[type(error)] = done.err
    end = ". This machine could not do it; nothing else is wrong.\n"
    smaller = ". Give a smaller batch or image size, or use a machine with more.\n"
    assert told.pop(RuntimeError).startswith("error: there is not enough memory (")
    assert told == {
        MemoryError: f"error: there is not enough memory{smaller}",
        OSError: f"error: [Errno 28] No space left on device{end}",
    }


def test_a_working_folder_that_was_removed_is_told(tmp_path):
    """The entry point ended with a traceback and exit code 1, which means drift."""
    words = [sys.executable, "-m", "deploykit", "list", "--json"]
    gone = f"cd {tmp_path} && rmdir {tmp_path} && exec {shlex.join(words)}"
    paths = {"PYTHONPATH": str(Path(deploykit.__file__).parent.parent)}
    done = subprocess.run(
        ["sh", "-c", gone], capture_output=True, text=True, check=False, timeout=60, env=os.environ | paths
    )
    assert done.returncode == 6
    assert done.stderr.startswith("error: the folder that the command was called in was removed. Fix: ")
    assert json.loads(done.stdout)["error"] == "StorageError"


@pytest.mark.parametrize(
    ("words", "before"),
    [
        (["run", "bundle", ""], "deploykit run bundle"),
        (["export", "resnet18", "--calibration="], "deploykit export resnet18"),
        (["sensitivity", "resnet18", "--calibration", "", "--json"], "deploykit sensitivity resnet18 --calibration"),
        (["", "bundle"], "deploykit"),
    ],
)
def test_an_empty_argument_is_no_folder(call, words, before):
    """As a path it would be the folder that the command is called in, whose images were calibrated with."""
    done = call(*words)
    assert done.code == 2
    assert f"the argument after `{before}` is empty" in done.err
    assert "--json" not in words or done.json()["error"] == "SpecError"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "resnet18", "--runtime", "onnxruntime", "--runtime", "openvino"], "--runtime was given 2 times"),
        (["export", "resnet18", "--runtime=onnxruntime", "--runtime", "openvino"], "(openvino, onnxruntime)"),
        (["cache", "prune", "--limit", "1GB", "--limit", "2GB"], "--limit was given 2 times (1GB, 2GB)"),
    ],
)
def test_an_option_of_one_value_is_given_once(call, words, said):
    done = call(*words)
    assert done.code == 2
    assert said in done.err and "call the command once for each" in done.err


def test_options_of_many_values_and_words_behind_the_options_may_repeat(call, tmp_path):
    done = call("targets", "--json", "--json")
    assert done.code == 0, done.err
    done = call("export", "resnet18", "--target", "rpi5", "--target", "nowhere", "-o", tmp_path / "engines")
    assert "nowhere" in done.err and "times" not in done.err
