"""No runtime phones home, and none leaves a file in the home folder or among temporary files.

Every system call that opens a connection is seen by strace, in the process and in all that it starts.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.backends.bundles import write_bundle

ROOT = Path(__file__).parent.parent
SLOW_EXPORTS = ("openvino", "torch_compile", "tensorrt")

UNSET_HERE = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "CI", "TF_BUILD", "JENKINS_URL", "GITHUB_ACTIONS", "TRAVIS")
"""What would keep a runtime silent in the tests and not on a user's machine."""

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")

_OUTWARD = re.compile(r"\b(connect|sendto|sendmsg|sendmmsg|bind)\(|socket\(AF_INET6?\b")
_LOCAL = re.compile(r"AF_UNIX|AF_NETLINK|\b(sendto|sendmsg|sendmmsg)\(\d+, (NULL|\"|\{msg_name=NULL)")

EXPORT = """
import sys
import numpy as np
import torch
from torch import nn
import deploykit

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU())
        self.head = nn.Linear(8, 10)
    def forward(self, images):
        return self.head(self.stem(images).mean((2, 3)))

runtime, folder = sys.argv[1:]
deploykit.export_backbone(Small().eval(), folder, runtime=runtime, image_size=32)
try:
    deploykit.load_bundle(folder)(np.zeros((1, 3, 32, 32), np.float32))
    assert deploykit.verify_bundle(folder).passed
except deploykit.DeviceUnavailable as error:
    print("no device:", error)
"""

RUN = """
import sys
import numpy as np
import deploykit
with deploykit.load_bundle(sys.argv[2], trust=True) as model:
    model(np.zeros((1, 3, 32, 32), np.float32))
assert deploykit.verify_bundle(sys.argv[2], trust=True).passed
"""


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What a program did: its connections, what it left in the home and temporary folders, and what it printed."""

    outward: list[str]
    left: list[str]
    err: str


def traced(tmp_path: Path, *command: str, environment: dict[str, str] | None = None) -> Traced:
    home, temporary, trace = tmp_path / "home", tmp_path / "tmp", tmp_path / "trace"
    for folder in (home, temporary):
        folder.mkdir(exist_ok=True)
    env = {name: value for name, value in os.environ.items() if name not in UNSET_HERE}
    env |= {"HOME": str(home), "TMPDIR": str(temporary), "DEPLOYKIT_CACHE": str(tmp_path / "cache")}
    env |= {"PYTHONPATH": str(ROOT)} | (environment or {})
    calls = "connect,sendto,sendmsg,sendmmsg,bind,socket"
    done = subprocess.run(
        ["strace", "-f", "--seccomp-bpf", "-qq", "-o", str(trace), "-e", f"trace={calls}", sys.executable, *command],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = trace.read_text(errors="replace").splitlines()
    return Traced(
        outward=[line for line in lines if _OUTWARD.search(line) and not _LOCAL.search(line)],
        left=[str(path) for folder in (home, temporary) for path in folder.rglob("*") if not path.is_dir()],
        err=done.stderr,
    )


@needs_strace
@pytest.mark.parametrize(
    "runtime",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW_EXPORTS else []) for name in
     ("onnxruntime", "openvino", "torch_compile", "tensorrt")],
)  # fmt: skip
def test_an_export_a_run_and_a_verify_connect_to_nothing_and_leave_nothing(runtime, tmp_path):
    seen = traced(tmp_path, "-c", EXPORT, runtime, str(tmp_path / "bundle"))
    assert seen.outward == []
    assert seen.left == []


@needs_strace
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", pytest.param("torch_compile", marks=pytest.mark.slow)])
def test_a_run_and_a_verify_connect_to_nothing_and_leave_nothing(runtime, tmp_path):
    bundle = write_bundle(tmp_path / "bundle", runtime)
    seen = traced(tmp_path, "-c", RUN, runtime, str(bundle))
    assert seen.outward == []
    assert seen.left == []
    assert seen.err == ""


@pytest.mark.slow  # what an export, a run and a verify ask of a runtime is traced above
@needs_strace
def test_doctor_which_asks_every_runtime_connects_to_nothing_and_leaves_nothing(tmp_path):
    seen = traced(tmp_path, "-m", "deploykit", "doctor")
    assert seen.outward == []
    assert seen.left == []


@needs_strace
def test_the_trace_sees_a_runtime_that_phones_home(tmp_path):
    if importlib.util.find_spec("openvino") is None or not _is_installed("openvino-telemetry"):
        pytest.skip("openvino and openvino-telemetry are not both installed")
    seen = traced(tmp_path, "-c", "import openvino")
    assert seen.outward
    assert seen.left


@needs_strace
def test_onnxruntime_would_write_its_device_id(tmp_path):
    pytest.importorskip("onnxruntime")
    seen = traced(tmp_path, "-c", "import onnxruntime", environment={"ORT_DISABLE_TELEMETRY": "0"})
    assert seen.left


def test_a_setting_of_the_user_stands():
    code = "import os, deploykit; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for given, expected in (({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        env = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"} | given
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_importing_deploykit_switches_reports_off_before_anybody_imports_a_runtime():
    code = (
        "import deploykit, onnxruntime, os, sys; pid = os.fork()\n"
        "if pid == 0: sys.exit(0)\n"  # onnxruntime's reporter keeps a forked child from ending
        "import signal; signal.alarm(30); sys.exit(os.waitpid(pid, 0)[1])"
    )
    env = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=60)
