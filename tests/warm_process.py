"""Python code in a process of its own, forked from one that has already imported torch and exported once.

A fresh process spends six seconds on that before its first export. The first process opens no engine and has one
thread, so that its children are as good as new. A test of what is imported, and when, starts Python anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a child ended: its exit status, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


class WarmProcess:
    """A process that forks a child for each piece of code; it ends when it is closed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from tests.warm_process import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def run(self, code: str, *arguments: str, stdin: str, cwd: Path, environment: dict[str, str]) -> Ended:
        """Run code with ``sys.argv[1:]`` in a folder; ``environment`` is added to that of the tests."""
        with tempfile.TemporaryDirectory() as folder:
            files = {name: str(Path(folder) / name) for name in ("stdin", "stdout", "stderr")}
            Path(files["stdin"]).write_text(stdin)
            asked = {"code": code, "argv": ["-c", *arguments], "cwd": str(cwd), "files": files}
            print(
                json.dumps(asked | {"environment": {**os.environ, **environment}}), file=self._process.stdin, flush=True
            )
            returncode = int(self._process.stdout.readline())
            said, complaint = (Path(files[name]).read_text() for name in ("stdout", "stderr"))
        return Ended(returncode=returncode, stdout=said, stderr=complaint)

    def close(self) -> None:
        """End the process, which has no child left."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def serve() -> None:
    """Fork a child for each line of standard input, and answer with its exit status."""
    _export_once()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(**json.loads(line))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


def _export_once() -> None:
    """Export as far as an ONNX graph, keep torch's tables, and leave the random numbers as they were."""
    import pytest
    import torch

    from deploykit import create_backbone
    from deploykit.export.to_onnx import to_onnx
    from deploykit.export.trace import output_names, trace
    from tests.torch_tables import keep_tables

    keep_tables(pytest.MonkeyPatch())
    with torch.random.fork_rng():
        backbone = create_backbone("mobilenetv2_050", image_size=32)
        to_onnx(trace(backbone, backbone.input_spec), backbone.input_spec, output_names(backbone))


def _become(code: str, argv: list[str], cwd: str, files: dict[str, str], environment: dict[str, str]) -> None:
    """Run code as ``python -c`` does, and end the process."""
    for name, flags in (
        ("stdin", os.O_RDONLY),
        ("stdout", os.O_WRONLY | os.O_CREAT),
        ("stderr", os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(files[name], flags, 0o600), getattr(sys, name).fileno())
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  (the old one may have read ahead)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = argv
    status = 1
    try:
        exec(compile(code, "<string>", "exec", dont_inherit=True), {"__name__": "__main__"})  # noqa: S102  (what a test wrote)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
