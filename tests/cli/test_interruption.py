"""SIGTERM and SIGHUP end a command as Ctrl-C does: cleaned up, with exit code 130, from its first moment on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deploykit.interruption import INTERRUPTED

ROOT = Path(__file__).parent.parent.parent
ENDING = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]


TWICE = """
import os, signal, sys, time
from deploykit.interruption import interruptible
number = int(sys.argv[1])
signal.signal(number, signal.SIG_DFL)  # however these tests were started
before = signal.getsignal(number)
try:
    with interruptible():
        try:
            os.kill(os.getpid(), number)
            time.sleep(20)
        finally:
            os.kill(os.getpid(), number)  # a second one does not break into the cleaning up
            time.sleep(0.05)
            print("cleaned up")
except KeyboardInterrupt:
    print("interrupted", signal.getsignal(number) is before)
"""

IGNORED = """
import os, signal, sys, time
from deploykit.interruption import interruptible
signal.signal(int(sys.argv[1]), signal.SIG_IGN)  # as nohup does
with interruptible():
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(0.05)
print("went on")
"""


def printed(code: str, number: int) -> str:
    """Run code in a process of its own, so that a signal not taken ends that one alone."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code, str(int(number))]
    return subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("number", ENDING[:2])
def test_a_signal_becomes_a_keyboard_interrupt_once(number):
    assert printed(TWICE, number) == "cleaned up\ninterrupted True\n"


def test_an_ignored_signal_stays_ignored():
    assert printed(IGNORED, signal.SIGHUP) == "went on\n"


def start(*words: object, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | (environment or {})
    command = [sys.executable, "-m", "deploykit", *map(str, words)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "number", [ENDING[0], *(pytest.param(number, marks=pytest.mark.slow) for number in ENDING[1:])]
)
def test_an_export_that_is_stopped_leaves_nothing(number, tmp_path):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    process = start(
        *("export", "resnet18", "--runtime", "onnxruntime", "--image-size", "32", "-o", tmp_path / "out" / "bundle"),
        environment={"TMPDIR": str(temporary)},
    )
    line = process.stderr.readline()  # the first stage has begun
    assert "[1/" in line, line + process.stderr.read()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, err
    assert "interrupted; nothing was left half-written" in err
    assert "Traceback" not in err
    assert list((tmp_path / "out").rglob("*")) == []
    assert [path for path in temporary.rglob("*") if not path.is_dir() or "deploykit" in path.name] == []


@pytest.mark.parametrize("number", ENDING)
def test_a_command_that_is_stopped_while_it_is_imported_says_so(number, tmp_path):
    """The signal comes when the first module of the command line is asked for."""
    hook = (
        "import os, signal, sys\n"
        f"signal.signal({int(number)}, signal.{'default_int_handler' if number == signal.SIGINT else 'SIG_DFL'})\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'deploykit.cli':\n"
        f"            os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Stop())\n"
        "sys.argv = ['deploykit', 'list']\n"
        "from deploykit.__main__ import main\n"
        "sys.exit(main())\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", hook], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == INTERRUPTED
    assert done.stderr == "deploykit: interrupted; nothing was left half-written.\n"
