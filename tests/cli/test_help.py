"""Help needs neither torch nor any runtime: each is made impossible to import."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

COMMANDS = ("bench", "cache", "cache clear", "cache list", "cache prune", "cache verify", "compare", "demo", "doctor")
COMMANDS += ("evaluate", "export", "extract", "import", "inspect", "list", "pull", "push", "report", "repository")
COMMANDS += ("run", "sensitivity", "sign", "sweep", "targets", "tune", "verify")
BLOCKED = ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "tensorrt_rtx", "timm", "skimage")

SCRIPT = """
import contextlib, io, json, sys

sys.modules.update(dict.fromkeys({blocked!r}))  # as if absent, to whoever imports or looks for them
from deploykit.cli.main import main

answers = {{}}
for words in {calls!r}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    answers[" ".join(words)] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def without_packages():
    """Exit code, stdout and stderr of each call in a process where the packages cannot be imported."""
    calls = [["--help"], ["-h"], ["--version"]]
    calls += [[*command.split(), flag] for command in COMMANDS for flag in ("-h", "--help")]
    calls += [["list"], ["export", "resnet18", "--runtime", "onnxruntime"]]
    script = SCRIPT.format(blocked=set(BLOCKED), calls=calls)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_help_with_an_example_last(without_packages, command, flag):
    code, out, err = without_packages[f"{command} {flag}"]
    assert (code, err) == (0, "")
    assert f"deploykit {command}" in out
    assert re.split(r"\n\s*\n", out.strip())[-1].strip().startswith(f"Example: deploykit {command}")


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_root_help_lists_every_command(without_packages, flag):
    code, out, _ = without_packages[flag]
    assert code == 0
    assert all(f"│ {command.split()[0]} " in out for command in COMMANDS)


def test_the_commands_of_this_file_are_all_that_there_are():
    from deploykit.cli.main import _command

    commands = _command().commands
    inner = {f"{name} {each}" for name, command in commands.items() for each in getattr(command, "commands", ())}
    assert {*commands, *inner} == {*COMMANDS}


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("pull", "hf://owner/name[@revision][/folder]"),
        ("push", "hf://owner/name[@branch][/folder]"),
        ("compare", "[default: the bundle's]"),
    ],
)
def test_brackets_of_the_help_are_printed(without_packages, command, text):
    assert text in " ".join(without_packages[f"{command} --help"][1].replace("│", " ").split())


def test_the_version_is_printed(without_packages):
    import deploykit

    assert without_packages["--version"] == [0, f"deploykit {deploykit.__version__}\n", ""]


@pytest.mark.parametrize("words", ["list", "export resnet18 --runtime onnxruntime"])
def test_without_torch_the_error_has_the_pip_command(without_packages, words):
    code, out, err = without_packages[words]
    assert (code, out) == (4, "")
    assert err.startswith("error: ")
    assert "pip install torch" in err


def test_a_wrong_name_of_tensorrt_in_the_environment_breaks_no_help():
    done = subprocess.run(
        [sys.executable, "-m", "deploykit", "export", "--help"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"DEPLOYKIT_TENSORRT": "tensorrt_llm"},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_python_dash_m_is_the_command():
    done = subprocess.run([sys.executable, "-m", "deploykit", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("deploykit ")
